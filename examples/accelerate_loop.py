"""The guard in a loop of Hugging Face accelerate, with accumulation and a scheduler.

python examples/accelerate_loop.py
"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from fastguard.integrations.accelerate import attach_guard


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
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=50)
    loader = torch.utils.data.DataLoader([*batches(100, bad=40)], batch_size=None)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    guard = attach_guard(accelerator, model, optimizer, max_norm=1.0, skip_norm=10.0)

    for i, (x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()  # guarded; no accelerator.clip_grad_norm_ before it
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and accelerator.optimizer_step_was_skipped:
            print(f"batch {i}: {guard.last_report.verdict.name}, the scheduler waits")
        elif i % 20 == 1:
            norm = guard.last_report.total_norm
            print(f"batch {i}: loss={loss:.3f} grad_norm={norm:.3f}")

    steps = scheduler.scheduler.last_epoch
    print(f"{guard.last_report.step + 1} steps; the scheduler took {steps}")
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    print(f"last loss {loss:.3f}, weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
