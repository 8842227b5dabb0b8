"""Checkpoints: written atomically, and read without running code from the file."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastguard._io import files

from . import torch_archive
from .plain import shown

LARGEST = 4 << 30
"""Largest checkpoint that is read, in bytes; a state of the teacher has 0.6 billion."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the reason."""


def save(path: Path, state: dict) -> None:
    """Write ``state`` to ``path`` atomically: a crash leaves the old file or the new one.

    Raises:
        CheckpointError: a weight of ``state["model"]`` is NaN or Inf; an older checkpoint at
            ``path`` stays as it is.
        OSError: the disk is full or the folder not writable; the older checkpoint stays too.
    """
    bad = [
        name
        for name, value in state["model"].items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"{path} not written: {len(bad)} tensors of the model are not finite, first {bad[0]}"
        )
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # which torch raises for a full disk
            raise OSError(f"{path} could not be written: {error}") from error


def load(path: Path, map_location: torch.device | str = "cpu") -> dict:
    """Read what :func:`save` wrote; only tensors, numbers, strings and containers are accepted.

    Raises:
        CheckpointError: the file is missing, not a regular file, damaged, would take more memory
            than its size, or is not a checkpoint of fastguard.
    """
    try:
        with files.open_regular(path, LARGEST) as file:
            torch_archive.check(file)
            file.seek(0)
            state = torch.load(file, map_location=map_location, weights_only=True)
        check(state)
    except Exception as error:  # for a damaged file torch's unpickler raises any type
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose message advises to trust the file
            reason = "it is damaged, or has more than tensors and plain values"
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    return state


def check(state: object) -> None:
    """Raise ValueError unless the state has what recognition needs, of the right types."""
    if not isinstance(state, dict):
        raise ValueError(f"it is {shown(state)}, not a dict")
    if missing := {"model", "config", "tokenizer"} - state.keys():
        raise ValueError(f"it lacks {sorted(missing)}, which every checkpoint of fastguard has")
    for key in ("model", "config", "tokenizer"):
        if not isinstance(state[key], dict):
            raise ValueError(f"its {key} is {shown(state[key])}, not a dict")
    for name, value in state["model"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its weight {shown(name)} is {shown(value)}, not a tensor")
    for key in ("wer", "cer", "loss"):
        if not isinstance(value := state.get(key, 0.0), float):
            raise ValueError(f"its {key} is {shown(value)}, not a number")


def check_fit(weights: object, wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``weights`` has the names, shapes and dtypes of ``wanted``."""
    if not isinstance(weights, dict):
        raise ValueError(f"the weights are {shown(weights)}, not a dict")
    if other := sorted(map(shown, weights.keys() ^ wanted.keys())):
        raise ValueError(f"{len(other)} weights are missing or unknown, such as {other[0]}")
    for name, tensor in wanted.items():
        found = weights[name]
        if not isinstance(found, Tensor):
            raise ValueError(f"{name} is {shown(found)}, not a tensor")
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, got "
                f"{found.dtype} of shape {tuple(found.shape)}"
            )


def average(states: list[dict]) -> dict:
    """The first checkpoint with the mean weights of all (Polyak and Juditsky 1992).

    Integers, such as BatchNorm's count of batches, are those of the first checkpoint.
    """
    mean = {
        name: torch.stack([state["model"][name].double() for state in states]).mean(0).to(w.dtype)
        if w.is_floating_point()
        else w
        for name, w in states[0]["model"].items()
    }
    return {**states[0], "model": mean}


def best_of(path: Path) -> Path:
    """The checkpoint of a run folder: best.pt, or else last.pt. A path of a file is returned.

    Raises:
        CheckpointError: the folder has neither.
    """
    if not path.is_dir():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} has no checkpoint: give a .pt file, or the folder of a run")
