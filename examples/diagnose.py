"""Why did it explode? One forward and one backward pass name the layer and the setting.

python examples/diagnose.py
"""

import torch
from torch import nn

from fastguard import diagnose, stable_init_


class Block(nn.Module):
    """A residual branch without normalisation."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.inner(x)


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), *[Block(64) for _ in range(16)], nn.Linear(64, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # initial weights that are too large
    x = torch.randn(32, 8)
    y = x.sum(dim=1, keepdim=True)

    def loss():
        return nn.functional.mse_loss(model(x), y)

    print(diagnose(model, loss).verdict)

    stable_init_(model, linear_std=0.05)
    print("After stable_init_:")
    print(diagnose(model, loss).verdict)


if __name__ == "__main__":
    main()
