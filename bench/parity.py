"""Training with the guard beside training without it, where nothing goes wrong.

    python bench/parity.py [--json docs/results/parity.json]

Three models of bench/grid/patients.py are trained from three seeds on the same batches, with one
learning rate and one threshold:

- torch: ``clip_grad_norm_`` and torch's AdamW
- guard: ``GradGuard.step`` with the same AdamW
- fastguard: ``GradGuard.step`` with ``fastguard.AdamW``

A first table has the same with a threshold of inf, where nothing is clipped: with the same AdamW
the weights must be bitwise equal. The figures of the second are the largest distance from torch's
loss at any step, and the distance between the seeds of torch's own runs.
"""

import argparse
import math
from pathlib import Path

import torch
from grid.cell import one, same_bits
from grid.patients import PATIENTS, Patient
from grid.published import fused_adamw
from timing import print_machine, table, write_json

import fastguard

MODELS = ("teacher", "gpt", "vit")
SEEDS = (0, 1, 2)
STEPS = 150
LOOPS = ("torch", "guard", "fastguard")
MAX_NORM = 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write each loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"machine": print_machine(torch.device("cpu")), "steps": STEPS, "max_norm": MAX_NORM}
    found["inf"] = {name: without_clipping(PATIENTS[name]) for name in MODELS}
    print(weights_table(found), end="\n\n")
    found["runs"] = {name: curves(PATIENTS[name]) for name in MODELS}
    print(losses_table(found))
    write_json(options.json, found)


def weights_table(found: dict) -> str:
    rows = [[name, *row.values()] for name, row in found["inf"].items()]
    header = ["max_norm=inf", "guard: weights", "fastguard: weights differ by"]
    return table(f"after {found['steps']} steps, three seeds", header, rows)


def losses_table(found: dict) -> str:
    rows = [
        [name, *(f"{value:.2g}" for value in distances(runs))]
        for name, runs in found["runs"].items()
    ]
    header = [f"max_norm={found['max_norm']:g}", "guard", "fastguard", "seeds of torch"]
    return table("largest difference of the loss at any step", header, rows)


def train(
    patient: Patient, loop: str, seed: int, max_norm: float
) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the weights at the end."""
    torch.manual_seed(seed)
    model = patient.make()
    make = fastguard.AdamW if loop == "fastguard" else fused_adamw
    optimizer = make(model.parameters(), lr=patient.lr)
    guard = fastguard.GradGuard(model, max_norm=max_norm)
    losses = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = patient.loss(model, patient.batch(number))
        loss.backward()
        if loop == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        else:
            guard.step(optimizer)
        losses.append(loss.item())
    return losses, one(model.parameters())


def without_clipping(patient: Patient) -> dict[str, str]:
    """Whether the weights are those of torch's loop, and the largest relative difference."""
    same, largest = True, 0.0
    for seed in SEEDS:
        torchs, guards, ours = (train(patient, loop, seed, math.inf)[1] for loop in LOOPS)
        same = same and same_bits(torchs, guards)
        largest = max(largest, ((ours - torchs).norm() / torchs.norm()).item())
    return {"guard": "bitwise torch's" if same else "differ", "fastguard": f"{largest:.1e}"}


def curves(patient: Patient) -> dict[str, list[list[float]]]:
    """Of each loop the losses, seed by seed."""
    return {
        loop: [
            [float(f"{loss:.5g}") for loss in train(patient, loop, seed, MAX_NORM)[0]]
            for seed in SEEDS
        ]
        for loop in LOOPS
    }


def distances(runs: dict[str, list[list[float]]]) -> list[float]:
    """Of both guarded loops the largest distance from torch's; of torch's, of the seeds."""
    torchs = torch.tensor(runs["torch"])
    found = [(torch.tensor(runs[loop]) - torchs).abs().max().item() for loop in LOOPS[1:]]
    return [*found, (torchs.amax(0) - torchs.amin(0)).max().item()]


if __name__ == "__main__":
    main()
