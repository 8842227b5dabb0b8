"""What is left of a training run after a fault: patients x recipes x faults, by real training.

    python bench/stability.py [--quick] [--json docs/results/stability.json] [--again]
    python bench/stability.py --patient teacher --recipe before --fault "nan input"

Patients are small models of six kinds and the 54.5 M parameters of the log that began this project;
recipes are torch's loop, ours, and others that people use; faults are what is known to end runs.
Each cell trains one patient by one recipe with one fault, and once more without the faulty batches
to compare with. --patient, --recipe and --fault may be given several times.

--json keeps the cells that the file has already, unless --again is given, and is written after
each cell: a run that is stopped goes on where it was. The tables go to a .md file beside it. The
packages zclip, smartclip and stabilityguard come by `pip install -e .[bench]`; without one its
cells are left out, and the program says so.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from grid import records
from grid.cell import run, without_faults
from grid.faults import FAULTS, Fault
from grid.patients import PATIENTS, Patient
from grid.recipes import RECIPES, Recipe
from timing import print_machine, table

from fastguard._io import files

ROOT = Path(__file__).resolve().parent.parent
#: Of each patient of --quick the faults, and the recipes of all.
QUICK = {
    "teacher": ("infeasible", "nan input", "nan forward"),
    "baseline": ("nan input", "1e30 gradient"),
    "deep": ("none", "nan forward"),
    "gpt": ("inf gradient", "poisoned moment"),
    "vit": ("nan input", "inf gradient"),
    "lstm": ("nan input", "1e30 gradient"),
}
QUICK_RECIPES = (
    "before",
    "clip, look, skip",
    "stable, literal",
    "stable",
    "guarded",
    "SpeechBrain",
)

Cell = tuple[Patient, Recipe, Fault]


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Run the cells that are asked for; the records of all, by key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part, names in (("patient", PATIENTS), ("recipe", RECIPES), ("fault", FAULTS)):
        parser.add_argument(f"--{part}", action="append", choices=names, default=[])
    parser.add_argument("--quick", action="store_true", help="the cells that the tests run")
    parser.add_argument("--json", type=Path, help="keep the cells there")
    parser.add_argument("--again", action="store_true", help="run cells that the file has, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # of models this small more threads are slower
    record = {"machine": print_machine(torch.device("cpu")), "cells": {}}
    if options.json and options.json.exists():
        record["cells"] = json.loads(options.json.read_text(encoding="utf-8"))["cells"]
    wanted = chosen(options.patient, options.recipe, options.fault, options.quick)
    missing = [cell for cell in wanted if options.again or name(cell) not in record["cells"]]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} of them in {options.json}")
    try:
        for number, cell in enumerate(missing, 1):
            record["cells"][name(cell)] = done = measure(*cell)
            print(f"{number}/{len(missing)} {records.line(done)}", flush=True)
            save(record, options.json)
    except KeyboardInterrupt:
        print(f"stopped; {options.json or 'nothing'} has what was run")
    save(record, options.json)  # the tables anew, where no cell was missing
    show({name(cell): record["cells"].get(name(cell)) for cell in wanted})
    return record["cells"]


def chosen(
    patients: Sequence[str] = (),
    recipes: Sequence[str] = (),
    faults: Sequence[str] = (),
    quick: bool = False,
) -> list[Cell]:
    """The cells of these names, in the order of the grid; no name stands for all."""
    found, without = [], set()
    for patient in PATIENTS.values():
        for recipe in RECIPES.values():
            for fault in FAULTS.values():
                asked = (
                    (not patients or patient.name in patients)
                    and (not recipes or recipe.name in recipes)
                    and (not faults or fault.name in faults)
                    and (not quick or is_quick(patient, recipe, fault))
                )
                if not asked or not has_meaning(patient, recipe, fault):
                    continue
                if recipe.package and not is_installed(recipe.package):
                    without.add(recipe.package)
                    continue
                found.append((patient, recipe, fault))
    for package in sorted(without):
        print(f"without {package}: pip install 'torch-fastguard[bench]'")
    return found


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_quick(patient: Patient, recipe: Recipe, fault: Fault) -> bool:
    return recipe.name in QUICK_RECIPES and fault.name in QUICK.get(patient.name, ())


def has_meaning(patient: Patient, recipe: Recipe, fault: Fault) -> bool:
    return (
        fault.fits(patient)
        and recipe.needs <= patient.has
        and (recipe.scales or not fault.fp16)
        and (not patient.recipes or recipe.name in patient.recipes)
        and (not patient.faults or fault.name in patient.faults)
    )


def name(cell: Cell) -> str:
    return records.key(*(part.name for part in cell))


def measure(patient: Patient, recipe: Recipe, fault: Fault) -> dict:
    with quiet():
        clean = without_faults(patient, recipe, fault if fault.fp16 else FAULTS["none"], seed=0)
        found = clean if fault.name == "none" else run(patient, recipe, fault)
    return {
        **records.describe(patient, recipe, fault, found, clean),
        "commit": commit(),
        "day": time.strftime("%Y-%m-%d"),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of skips and of patients that have no attention to clamp."""
    logger = logging.getLogger("fastguard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def commit() -> str:
    """Of this checkout, with + where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def save(record: dict, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_where_told(path, records.json_text(record))
        files.write_where_told(path.with_suffix(".md"), records.markdown(record))


def show(cells: dict[str, dict | None]) -> None:
    there = {name: cell for name, cell in cells.items() if cell}
    for patient in PATIENTS:
        header, rows = records.grid_of(there, patient)
        if rows:
            print("\n" + table(patient, header, rows))
    print("\n" + table("cells with a fault, by verdict", *records.summary(there)))


if __name__ == "__main__":
    main()
