"""Gradient accumulation: a bad micro-batch is left out, the others of its window are applied.

python examples/accumulation.py
"""

import math

import torch
from torch import nn

from fastguard import AdamW, GradGuard

WINDOW = 4


def windows(count, bad):
    """Windows of WINDOW micro-batches (x, y); micro-batch number ``bad`` has one NaN."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        window = []
        for j in range(WINDOW):
            x = torch.randn(8, 8, generator=generator)
            y = x.sum(dim=1, keepdim=True)
            if i * WINDOW + j == bad:
                x[5, 2] = math.nan
            window.append((x, y))
        yield window


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    guard = GradGuard(model, max_norm=1.0)

    for i, window in enumerate(windows(50, bad=42)):
        optimizer.zero_grad()
        for j, (x, y) in enumerate(window):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()  # not divided by WINDOW: the guard applies the mean of the good ones
            guard.accumulate(batch_id=f"{i}/{j}")
        report = guard.step(optimizer, batch_id=i)
        for micro_batch in report.skipped_micro_batches:
            applied = report.micro_batches - len(report.skipped_micro_batches)
            print(f"micro-batch {micro_batch.batch_id}: left out, {applied} applied")
        if i % 10 == 0:
            print(f"window {i}: loss={loss:.3f} grad_norm={report.total_norm:.3f}")

    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    print(f"last loss {loss:.3f}, weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
