"""Functions timed in turns: shared by bench/ and gpucheck."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from tqdm import tqdm

Reading = TypeVar("Reading")


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[Callable[[], object]], Reading],
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[Reading]]:
    """The readings of ``clock`` for each function. The functions run in turns.

    A busy period of the machine then affects all of them. ``before`` holds functions that are
    called, but not timed, before each function of the same name.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in functions}
    for repeat in tqdm(range(-2, repeats), desc="repeats", leave=False, disable=None):
        for name, function in functions.items():
            if before is not None:
                before[name]()
            reading = clock(function)
            if repeat >= 0:  # the first two warm up
                readings[name].append(reading)
    return readings


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
