"""Train one small network three times on the same batches, four of which are bad.

    python bench/explosion.py [--json docs/results/explosion.json]

The network has 12 residual blocks without normalisation and learns a function of four numbers.
In three batches one sample is too large by a factor of 10,000; in one batch one input is NaN. Each
contender begins with the same weights: AdamW alone, ``clip_grad_norm_`` and AdamW, and fastguard.
The loss that is recorded is that of a batch that nobody trains on and that is never bad.
"""

import argparse
import math
from pathlib import Path

import torch
from timing import print_machine, table, write_json
from torch import nn

import fastguard

STEPS = 300
LOUD, NAN = (60, 120, 240), (170,)
MAX_NORM, SKIP_NORM = 1.0, 10.0
LEARNING_RATE = 1e-3


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.inner(x)


def batch(number: int):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(64, 4, generator=generator)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    if number in LOUD:
        x[5] *= 1e4
    if number in NAN:
        x[5, 2] = math.nan
    return x, y


def alone(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step():
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        return norm.item(), False

    return step


def clipped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return norm.item(), False

    return step


def guarded(model):
    optimizer = fastguard.AdamW(model.parameters(), lr=LEARNING_RATE)
    guard = fastguard.GradGuard(model, max_norm=MAX_NORM, skip_norm=SKIP_NORM)

    def step():
        report = guard.step(optimizer)
        return report.total_norm, report.skipped

    return step


CONTENDERS = {
    "AdamW": alone,
    "clip_grad_norm_ + AdamW": clipped,
    "fastguard": guarded,
}


def train(contender) -> dict[str, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), *[Block(64) for _ in range(12)], nn.Linear(64, 1))
    step = contender(model)
    x_held, y_held = batch(-1)
    losses, norms, skipped = [], [], []
    for number in range(STEPS):
        x, y = batch(number)
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        norm, skip = step()
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(x_held), y_held).item())
        norms.append(norm)
        if skip:
            skipped.append(number)
    return {"loss": losses, "grad_norm": norms, "skipped": skipped}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write every step there")
    options = parser.parse_args()
    facts = print_machine(torch.device("cpu"))
    runs = {name: train(contender) for name, contender in CONTENDERS.items()}
    header = ["run", "last loss", "skipped steps"]
    print(table(f"{STEPS} steps", header, list(map(row, runs, runs.values()))))
    settings = {"steps": STEPS, "loud": LOUD, "nan": NAN, "max_norm": MAX_NORM}
    write_json(options.json, {"machine": facts, **settings, "runs": rounded(runs)})


def row(name: str, run: dict) -> list[str]:
    return [name, f"{run['loss'][-1]:.4f}", ", ".join(map(str, run["skipped"])) or "none"]


def rounded(runs: dict) -> dict:
    """Four digits of each number; None, which JSON has, for NaN, which it has not."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else None
        return value

    return {
        name: {key: [short(value) for value in values] for key, values in run.items()}
        for name, run in runs.items()
    }


if __name__ == "__main__":
    main()
