"""Clamped attention in place of nn.MultiheadAttention: padded keys may hold NaN.

python examples/attention.py
"""

import torch
from torch import nn

from fastguard import AdamW, GradGuard, replace_attention_


def batches(count, bad):
    """(x, padding, y): y is the mean of the frames. Batch ``bad`` has NaN in a padded frame."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        x = torch.randn(16, 12, 32, generator=generator)
        lengths = torch.randint(6, 13, (16, 1), generator=generator)
        padding = torch.arange(12) >= lengths
        y = x.masked_fill(padding[..., None], 0).sum(1) / lengths
        if i == bad:
            x[3, -1], padding[3, -1] = torch.nan, True
        yield x, padding, y


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)

    def forward(self, x, padding):
        y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return y.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


def main():
    torch.manual_seed(0)
    model = Encoder()
    print(replace_attention_(model, clamp=10.0))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    guard = GradGuard(model, max_norm=1.0)
    for i, (x, padding, y) in enumerate(batches(60, bad=40)):
        optimizer.zero_grad()
        output = model(x, padding)
        loss = nn.functional.mse_loss(output, y)
        loss.backward()
        report = guard.step(optimizer, batch_id=i)
        if i == 40:
            print(
                f"batch {i}: output finite: {bool(output.isfinite().all())}, {report.verdict.name}"
            )
        elif i % 20 == 0:
            print(f"batch {i}: loss={loss:.4f} grad_norm={report.total_norm:.4f}")
    finite = all(p.isfinite().all() for p in model.parameters())
    print(f"last loss {loss:.4f}, weights finite: {finite}")


if __name__ == "__main__":
    main()
