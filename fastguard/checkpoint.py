"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
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
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer of archives says so of a full disk
            raise OSError(f"{path} could not be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path``, whole and on the disk, if all goes well; and
    otherwise nothing: what was there stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too. Not every system opens folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to trust the file
            reason = "it is damaged, or holds other things than tensors and plain values"
        raise CheckpointError(f"{path} can not be read as a checkpoint: {reason}") from error
    missing = {"model", "config", "tokenizer"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of fastguard: it lacks {sorted(missing)}")
    return state


def average(states: list[dict]) -> dict:
    """The first checkpoint with the mean of the weights of all (Polyak and Juditsky 1992).

    Integers, as BatchNorm's count of batches, are the first one's.
    """
    mean = {
        name: torch.stack([state["model"][name].double() for state in states]).mean(0).to(w.dtype)
        if w.is_floating_point()
        else w
        for name, w in states[0]["model"].items()
    }
    return {**states[0], "model": mean}


def best_of(path: Path) -> Path:
    """The checkpoint to use of a run folder: best.pt, or last.pt; a file as it is.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no checkpoint: give a .pt file, or the folder of a run")
