"""The guard under autocast to fp16 with a GradScaler: torch's recipe, and one line more.

python examples/amp.py
"""

import math

import torch
from torch import nn

from fastguard import GradGuard


def batches(count, bad):
    """Pairs (x, y) of a linear task; the batch with number ``bad`` has one Inf."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        x = torch.randn(32, 8, generator=generator)
        y = x.sum(dim=1, keepdim=True)
        if i == bad:
            x[5, 2] = math.inf
        yield x, y


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    guard = GradGuard(model, max_norm=1.0)
    guard.attach(optimizer)  # from here on optimizer.step() is the guarded step

    for i, (x, y) in enumerate(batches(100, bad=40)):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        report = guard.last_report
        if report.skipped:
            print(f"batch {i}: {report.verdict.name}, scale now {scaler.get_scale():g}")
        elif i % 20 == 0:
            print(f"batch {i}: loss={loss:.3f} grad_norm={report.total_norm:.3f}")

    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    print(f"last loss {loss:.3f}, weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
