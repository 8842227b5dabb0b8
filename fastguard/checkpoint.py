"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import os
import shutil
from pathlib import Path

import torch


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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """A second name for a checkpoint, atomically; :func:`save` never writes into an old file."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def load(path: Path, map_location: torch.device | str = "cpu") -> dict:
    """Read what :func:`save` wrote; only tensors, numbers, strings and containers are accepted.

    Raises:
        CheckpointError: the file is missing, truncated, or not a checkpoint of fastguard.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # on garbage, torch's unpickler raises whatever it trips over
        raise CheckpointError(f"{path} can not be read as a checkpoint: {error}") from error
    missing = {"model", "config", "tokenizer"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of fastguard: it lacks {sorted(missing)}")
    return state


def best_of(path: Path) -> Path:
    """The checkpoint to use of a run folder: averaged.pt, best.pt or last.pt; a file as it is.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        return path
    for name in ("averaged.pt", "best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no checkpoint: give a .pt file, or the folder of a run")
