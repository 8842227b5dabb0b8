"""DistributedDataParallel: a NaN in the loss of one process skips the step in all of them.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import logging
import math

import torch
import torch.distributed as dist
from torch import nn

from fastguard import AdamW, GradGuard


def batch(step, rank, bad):
    """The share of a rank in the batch of a step; rank 1 has one NaN in that of step ``bad``."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 8, generator=generator)
    y = x.sum(dim=1, keepdim=True)
    if step == bad and rank == 1:
        x[5, 2] = math.nan
    return x, y


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank > 0:  # all ranks decide alike; one of them reports
        logging.getLogger("fastguard").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1))
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    guard = GradGuard(model, max_norm=1.0, process_group=dist.group.WORLD)

    for step in range(40):
        x, y = batch(step, rank, bad=20)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        report = guard.step(optimizer, loss=loss, batch_id=step)
        if report.skipped:
            print(f"rank {rank}, step {step}: {report.verdict.name}", flush=True)
        elif rank == 0 and step % 10 == 0:
            print(f"step {step}: loss={report.loss:.3f} grad_norm={report.total_norm:.3f}")

    finite = all(p.isfinite().all() for p in model.parameters())
    print(f"rank {rank}: last loss {report.loss:.3f}, weights finite: {finite}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
