"""Interleaved timing, tables and JSON, shared by the benchmarks."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastguard._io import files
from fastguard._table import table
from fastguard._timing import in_turns, synchronize
from fastguard.env import processor, version

#: Of each call of `interleaved`: the 10th, 50th and 90th percentile of each row, in seconds.
_PERCENTILES: list[dict[str, list[float]]] = []

__all__ = ["arguments", "interleaved", "print_machine", "table", "write_json"]


def arguments(description: str, repeats: int, **choices: tuple[str, ...]) -> argparse.Namespace:
    """--device, --repeats and --json, which every benchmark takes; of ``choices`` the first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    for name, names in choices.items():
        parser.add_argument(f"--{name}", choices=names, default=names[0])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    args.device = torch.device(args.device)
    return args


def print_machine(device: torch.device) -> dict[str, str | int]:
    """The first line of every benchmark: what a figure is worth nothing without."""
    facts = machine(device)
    print("  ".join(f"{k}={v}" for k, v in facts.items()), end="\n\n")
    return facts


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each function, by the wall clock, from an idle device to an idle device."""

    def clock(function):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    seconds = in_turns(functions, repeats, clock, before)
    _PERCENTILES.append({name: percentiles(values) for name, values in seconds.items()})
    return {name: statistics.median(values) for name, values in seconds.items()}


def percentiles(values: list[float]) -> list[float]:
    """The 10th, 50th and 90th; of few values the lowest and the highest may stand for the ends."""
    if len(values) < 2:
        return values * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return [tenths[0], statistics.median(values), tenths[-1]]


def machine(device: torch.device) -> dict[str, str | int]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastguard": version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def write_json(path: Path | None, result: dict) -> None:
    if path is not None:
        if _PERCENTILES:
            result = {**result, "percentiles 10, 50, 90": _PERCENTILES}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_where_told(path, json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
