"""What bench/stability.py keeps of a cell, the verdict on it, and the tables of all cells."""

import json
import math
from collections import Counter
from collections.abc import Iterable

from .cell import Run, finite
from .faults import FAULTS, WITHOUT, Fault
from .patients import PATIENTS, Patient
from .recipes import RECIPES, Recipe

#: The first that applies is the verdict.
VERDICTS = {
    "NaN weights": "a parameter is NaN or Inf at the end",
    "NaN moments": "a moment of AdamW is",
    "NaN buffers": "a buffer is, of a BatchNorm",
    "NaN loss": "the loss of the evaluation is",
    "stopped": "an error ended the run; everything is finite",
    "starved": "more than half of the steps were skipped",
    "worse": "the held-out loss fell by less than half of what it fell without the fault",
    "finite": "everything is finite, but not bitwise equal, or not comparable",
    "equal": "parameters, moments and buffers are bitwise those without the faulty batches",
}


def key(patient: str, recipe: str, fault: str) -> str:
    return f"{patient} / {recipe} / {fault}"


def describe(patient: Patient, recipe: Recipe, fault: Fault, found: Run, clean: Run) -> dict:
    """The record of a cell, ready for JSON.

    Args:
        clean: the same without the faulty batches.
    """
    state = found.state
    same = {"weights": None, "buffers": None}
    if fault.bitwise:
        same["weights"] = state.same_weights(clean.state)
        same["buffers"] = bool((state.buffers == clean.state.buffers).all())
    start, end = found.evaluation
    record = {
        "patient": patient.name,
        "recipe": recipe.name,
        "fault": fault.name,
        "steps": len(found.losses),
        "nonfinite_updates": found.nonfinite_updates,
        "skipped": found.skipped,
        "ended": found.ended,
        "finite": {
            "parameters": finite(state.parameters),
            "moments": finite(state.moments),
            "buffers": finite(state.buffers),
            "evaluation": math.isfinite(end),
        },
        "same": same,
        "evaluation": {"start": start, "end": end, "without": clean.evaluation[1]},
        "seconds": found.seconds,
    }
    if patient.curves:
        record |= {"bad": list(patient.bad), "losses": found.losses, "norms": found.norms}
    return {"verdict": verdict(record), **rounded(record)}


def verdict(record: dict) -> str:
    held, there = record["finite"], record["evaluation"]
    names = {"parameters": "weights", "evaluation": "loss"}
    bad = [name for name in held if not held[name]]
    if bad:
        return f"NaN {names.get(bad[0], bad[0])}"
    if record["ended"]:
        return "stopped"
    if len(record["skipped"]) > record["steps"] / 2:
        return "starved"
    if not there["start"] - there["end"] >= (there["start"] - there["without"]) / 2:
        return "worse"
    return "equal" if all(record["same"].values()) else "finite"


def rounded(value):
    """Four digits of each float; None, which JSON has, for NaN and Inf, which it has not."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def json_text(record: dict) -> str:
    """The record as JSON with one line for each cell."""
    cells = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(cell)}" for name, cell in record["cells"].items()
    )
    machine = json.dumps(record["machine"])
    return f'{{\n "machine": {machine},\n "cells": {{\n{cells}\n }}\n}}\n'


def line(record: dict) -> str:
    """One cell in one line of text."""
    there = record["evaluation"]
    losses = " -> ".join(
        "nan" if there[name] is None else f"{there[name]:.3g}" for name in ("start", "end")
    )
    ended = f", {record['ended']}" if record["ended"] else ""
    return (
        f"{key(record['patient'], record['recipe'], record['fault'])}: {record['verdict']}"
        f" ({record['nonfinite_updates']} non-finite updates, {len(record['skipped'])} of "
        f"{record['steps']} steps skipped{ended}, loss {losses}, {record['seconds']:.1f} s)"
    )


# --- tables ---------------------------------------------------------------------------------------


def left_out() -> Iterable[str]:
    """What is not in the grid, one sentence each."""
    for need, why in WITHOUT.items():
        names = [p.name for p in PATIENTS.values() if need not in p.has]
        faults = [f.name for f in FAULTS.values() if need in f.needs]
        yield f"{', '.join(faults)} of {', '.join(names)}: {why}."
    few = [p for p in PATIENTS.values() if p.recipes]
    for patient in few:
        yield f"{patient.name} has the faults and recipes of its table alone, for its time."
    names = ", ".join(r.name for r in RECIPES.values() if not r.scales)
    yield f"fp16 of {names}: bench/grid/published.py says why."
    for need in sorted({need for r in RECIPES.values() for need in r.needs}):
        recipes = ", ".join(r.name for r in RECIPES.values() if need in r.needs)
        names = ", ".join(p.name for p in PATIENTS.values() if need not in p.has)
        yield f"{recipes} of {names}: no {need}."


def grid_of(cells: dict[str, dict], patient: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a patient's table: recipes by faults."""
    mine = {(c["recipe"], c["fault"]): c for c in cells.values() if c["patient"] == patient}
    faults = [name for name in FAULTS if any(name == fault for _, fault in mine)]
    recipes = [name for name in RECIPES if any(name == recipe for recipe, _ in mine)]
    rows = [[recipe, *(shown(mine.get((recipe, fault))) for fault in faults)] for recipe in recipes]
    return ["recipe", *faults], rows


def shown(record: dict | None) -> str:
    if record is None:
        return "-"
    if record["fault"] == "none":
        end = record["evaluation"]["end"]
        loss = "nan" if end is None else f"{end:.3g}"
        return f"starved, {loss}" if record["verdict"] == "starved" else loss
    return record["verdict"] + (
        ", stopped" if record["ended"] and "NaN" in record["verdict"] else ""
    )


def worst(cells: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Of each recipe and fault the worst verdict of all patients."""
    faults = [name for name in FAULTS if name != "none"]
    rows = []
    for recipe in RECIPES:
        row = [recipe]
        for fault in faults:
            found = {
                cell["verdict"]
                for cell in cells.values()
                if (cell["recipe"], cell["fault"]) == (recipe, fault)
            }
            row.append(next((name for name in VERDICTS if name in found), "-"))
        if set(row[1:]) != {"-"}:
            rows.append(row)
    return ["recipe", *faults], rows


def summary(cells: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Of each recipe, how many cells with a fault have which verdict."""
    rows = []
    for recipe in RECIPES:
        mine = [c for c in cells.values() if c["recipe"] == recipe and c["fault"] != "none"]
        counts = Counter(c["verdict"] for c in mine)
        if mine:
            rows.append([recipe, str(len(mine)), *(str(counts[name] or "") for name in VERDICTS)])
    return ["recipe", "cells", *VERDICTS], rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(record: dict) -> str:
    """docs/results/stability.md."""
    cells = record["cells"]
    commits = sorted({c["commit"] for c in cells.values()})
    facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    parts = [
        "# The stability grid",
        "Written by `python bench/stability.py --json docs/results/stability.json`. "
        "[stability.json](stability.json) has the figures of each cell; "
        "`python bench/stability.py --patient teacher --recipe before --fault 'nan input'` runs "
        "one.",
        f"{len(cells)} cells, {sum(c['seconds'] for c in cells.values()) / 60:.0f} minutes on one "
        f"thread, commit {', '.join(commits)}; {facts}.",
        "## Verdicts",
        "The first that applies. Of the fault `none` the tables show the held-out loss at the end.",
        markdown_table(["verdict", ""], [list(row) for row in VERDICTS.items()]),
        "## Summary",
        "Cells with a fault, by verdict:",
        markdown_table(*summary(cells)),
        "The worst verdict of all patients, by fault:",
        markdown_table(*worst(cells)),
        "## Patients",
    ]
    trained = {cell["patient"] for cell in cells.values()}
    for patient in (p for p in PATIENTS.values() if p.name in trained):
        places = ", ".join(map(str, patient.bad))
        parts += [
            f"### {patient.name}",
            f"{patient.says}. Faulty are the batches {places} of {patient.steps}.",
            markdown_table(*grid_of(cells, patient.name)),
        ]
    parts += [
        f"### {patient.name}",
        patient.says + ".",
        markdown_table(*grid_of(cells, patient.name)),
    ]
    parts += [
        "## Recipes",
        markdown_table(["recipe", ""], [[r.name, r.says] for r in RECIPES.values()]),
        "## Faults",
        markdown_table(["fault", ""], [[f.name, f.says] for f in FAULTS.values()]),
        "## What is left out",
        "\n".join(f"- {text}" for text in left_out()),
    ]
    return "\n\n".join(parts) + "\n"
