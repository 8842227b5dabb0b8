"""The log that began this project, again: Inf norms from the first batch on, with a finite loss.

    python bench/first_log.py [--json docs/results/first_log.json]

The model is "deep 54 M" of bench/grid/patients.py: 12 blocks without normalisation on their
branches. It is trained with the settings of ``before`` under fp16 autocast with a fresh GradScaler,
first by torch's loop and then with a GradGuard. A line of the log also has the scale of the loss
and the norm of the same gradients in float32. Tables say what the norm depends on.
"""

import argparse
import math
from pathlib import Path

import torch
from grid.cell import norm
from grid.patients import PATIENTS, Deep, ctc, speech
from grid.recipes import BEFORE, RECIPES, STABLE
from timing import print_machine, table, write_json

import fastguard

PATIENT = PATIENTS["deep 54 M"]
BATCHES = 10
SCALES = (0.1, 1.0, 10.0, 100.0, 1000.0)
LOSS = 104.0  # of the log
BLOCKS = (1, 3, 6, 12, 24)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"machine": print_machine(torch.device("cpu"))}
    for recipe in ("before", "before, guarded"):
        print(f"fp16 autocast, a fresh GradScaler, {recipe}")
        found[recipe] = log(recipe)
        print()
    found["by input"] = by_input()
    found["by depth"] = by_depth()
    found["diagnosis"] = diagnoses()
    write_json(options.json, found)


def fresh(settings, blocks: int = 12) -> Deep:
    torch.manual_seed(0)
    return fastguard.stable_init_(Deep(512, 80, blocks), settings.linear_std, settings.conv_scale)


def log(name: str) -> list[dict]:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model, scaler = PATIENT.make(), torch.amp.GradScaler("cpu")
    optimizer, step = recipe.build(model, PATIENT.lr, scaler)
    lines = []
    for number in range(BATCHES):
        batch = PATIENT.batch(number)
        true = gradient(model, batch)[1]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = ctc(model, batch)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        line = {
            "batch": number,
            "loss": round(loss.item(), 2),
            "grad_norm": round(norm(model) / scale, 2),
            "scale": scale,
            "float32 norm": round(true, 1),
        }
        report = step(loss)
        if report is not None:
            line["scale_search"] = report.scale_search
        print(text(line), flush=True)
        lines.append(line | {"grad_norm": finite_or_none(line["grad_norm"])})
    return lines


def text(line: dict) -> str:
    """A line of the log; a norm that is missing was Inf."""
    grad_norm = math.inf if line["grad_norm"] is None else line["grad_norm"]
    said = f"Batch {line['batch']}: loss={line['loss']:.2f}, grad_norm={grad_norm:.2f}"
    said += f", scale={line['scale']:g}, float32 norm={line['float32 norm']:.1f}"
    searches = line.get("scale_search")
    return said if searches is None else f"{said}, scale_search={searches}"


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def gradient(model: Deep, batch) -> tuple[float, float]:
    """Loss and norm of the gradients in float32; the model's buffers stay as they are."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad()
    loss = ctc(model, batch)
    loss.backward()
    for buffer, saved in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(saved)
    return loss.item(), norm(model)


def by_input() -> list[list[str]]:
    """Loss and norm of the first batch by the scale of its input, and the scale of LOSS."""
    model = fresh(BEFORE)

    def at(scale: float) -> tuple[float, float]:
        return gradient(model, speech(0, 2, 80, scale))

    low, high = math.log(100.0), math.log(3000.0)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if at(math.exp(middle))[0] < LOSS else (low, middle)
    rows = [[f"{s:.4g}", *(f"{value:.4g}" for value in at(s))] for s in (*SCALES, math.exp(low))]
    print(input_table(rows), end="\n\n")
    return rows


def input_table(rows: list[list[str]]) -> str:
    return table("batch 0, settings of before, float32", ["input times", "loss", "norm"], rows)


def by_depth() -> list[list[str]]:
    """Loss and norm of the first batch by the number of blocks, as before and as stable."""
    rows = []
    for blocks in BLOCKS:
        row = [str(blocks)]
        for settings in (BEFORE, STABLE):
            row += [f"{value:.4g}" for value in gradient(fresh(settings, blocks), PATIENT.batch(0))]
        rows.append(row)
    print(depth_table(rows), end="\n\n")
    return rows


def depth_table(rows: list[list[str]]) -> str:
    header = ["blocks", "before: loss", "norm", "stable: loss", "norm"]
    return table("batch 0, initial weights, float32", header, rows)


def diagnoses() -> dict[str, list[str]]:
    """What fastguard.diagnose says of the model before training, above its table of layers."""
    model, batch = fresh(BEFORE), PATIENT.batch(0)

    def half():
        with torch.autocast("cpu", torch.float16):
            return ctc(model, batch)

    said = {}
    for name, loss, scale in (
        ("float32", lambda: ctc(model, batch), 1.0),
        ("fp16, a loss scale of 65536", half, 65536.0),
        ("fp16, a loss scale of 64", half, 64.0),
    ):
        found = str(fastguard.diagnose(model, loss, loss_scale=scale))
        said[name] = found.partition("\n\n")[0].splitlines()
        print(diagnosis_text(name, said[name]), end="\n\n")
    return said


def diagnosis_text(name: str, lines: list[str]) -> str:
    return "\n".join([f"diagnose, {name}:", *lines])


if __name__ == "__main__":
    main()
