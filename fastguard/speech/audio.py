"""Recordings read with a bound: what a file claims is judged before its samples are decoded."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from fastguard.speech.readers import Unusable

# Below 1 kHz nothing of a voice is left; no recorder samples faster than 384 kHz.
SAMPLE_RATES = (1_000, 384_000)
_UNKNOWN = 2**63 - 1  # libsndfile's number of frames of such a file; it can not read on in it
_BLOCK = 1 << 20  # samples of all channels together that are decoded at a time


class AudioError(Unusable):
    """A recording that can not be used; the message names the file and the cure."""


def read_mono(path: Path | str, max_duration: float, finite: bool = True) -> tuple[np.ndarray, int]:
    """Samples (N,) float32 in [-1, 1], the channels averaged, and their rate in Hz.

    Raises AudioError for a file that is missing, no regular file, not decodable, longer than
    ``max_duration`` seconds, of a rate outside SAMPLE_RATES, or with samples that are NaN or Inf,
    unless those are what one looks for, with ``finite=False``.
    """
    with _opened(path) as file:
        blocks = list(_mono_blocks(path, file, max_duration, finite))
        return np.concatenate([np.zeros(0, np.float32), *blocks]), file.samplerate


def decoded_duration(path: Path | str, max_duration: float) -> float:
    """Seconds that the file decodes to; raises AudioError as :func:`read_mono` does."""
    with _opened(path) as file:
        samples = sum(len(block) for block in _mono_blocks(path, file, max_duration))
        return samples / file.samplerate


def header_duration(path: Path | str) -> float:
    """Seconds that the header claims; raises AudioError for a file that can not be opened."""
    with _opened(path) as file:
        return file.frames / file.samplerate


def check_duration(path: Path | str, seconds: float, shortest: float, longest: float) -> None:
    """Raises AudioError unless ``seconds`` lies between ``shortest`` and ``longest``."""
    if seconds < shortest:
        raise AudioError(
            f"too short: {seconds:.2f} s, under {shortest:g} s; lower min_duration to keep "
            f"{str(path)!r}"
        )
    if seconds > longest:
        raise AudioError(
            f"too long: {seconds:.2f} s, over {longest:g} s; cut {str(path)!r}, or raise "
            "max_duration"
        )


@contextmanager
def _opened(path: Path | str) -> Iterator[soundfile.SoundFile]:
    name = repr(str(path))
    try:
        # Opening a FIFO waits for a writer, and /dev/zero never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(f"no recording: {name} is no regular file; correct the path")
        with soundfile.SoundFile(path) as file:
            lowest, highest = SAMPLE_RATES
            if not lowest <= file.samplerate <= highest:
                raise AudioError(
                    f"odd rate: {name} has {file.samplerate} Hz, outside {lowest} to {highest}; "
                    "its header may be damaged: export it again"
                )
            if file.frames == _UNKNOWN:
                raise AudioError(
                    f"no length: the header of {name} has none, as after a pipe; write it again"
                )
            yield file
    except FileNotFoundError:
        raise AudioError(f"no recording: {name} is not there; correct the path") from None
    except AudioError:
        raise
    # ValueError: NUL in the path; TypeError: a headerless .raw
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise AudioError(f"unreadable audio: {name}: {error}; convert it to wav or flac") from error


def _mono_blocks(
    path: Path | str, file: soundfile.SoundFile, max_duration: float, finite: bool = True
) -> Iterator[np.ndarray]:
    """The recording in blocks (n,) float32.  A header may claim too little, so the bound holds for
    what is decoded as well."""
    check_duration(path, file.frames / file.samplerate, 0.0, max_duration)
    size = max(1, _BLOCK // file.channels)
    samples = bad = 0
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        mono = block.mean(axis=1)
        samples += len(mono)
        bad += int(np.count_nonzero(~np.isfinite(mono)))
        check_duration(path, samples / file.samplerate, 0.0, max_duration)
        yield mono
    if bad and finite:
        raise AudioError(
            f"samples not finite: {bad} of {samples} in {str(path)!r} are NaN or Inf; export it "
            "again"
        )
