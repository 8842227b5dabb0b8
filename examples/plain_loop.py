"""The guard in a training loop of your own, which one NaN in a batch cannot harm.

python examples/plain_loop.py
"""

import math

import torch
from torch import nn

from fastguard import AdamW, GradGuard


def batches(count, bad):
    """Pairs (x, y) of a linear task; the batch with number ``bad`` has one NaN."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        x = torch.randn(32, 8, generator=generator)
        y = x.sum(dim=1, keepdim=True)
        if i == bad:
            x[5, 2] = math.nan
        yield x, y


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    guard = GradGuard(model, max_norm=1.0, skip_norm=10.0)

    for i, (x, y) in enumerate(batches(100, bad=40)):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        report = guard.step(optimizer, batch_id=i)  # in place of clip_grad_norm_ and step
        if report.skipped:
            print(f"batch {i}: {report.verdict.name}, first NaN at {report.first_nonfinite}")
        elif i % 20 == 0:
            print(f"batch {i}: loss={loss:.3f} grad_norm={report.total_norm:.3f}")

    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    print(f"last loss {loss:.3f}, weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
