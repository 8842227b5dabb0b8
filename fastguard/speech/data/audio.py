"""Reads recordings within bounds: the header is checked before the samples are decoded, and the
decoded length afterwards, so that no part of a recording is lost without an error."""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from . import ffmpeg
from .containers import READABLE, Extent, Incomplete, examine
from .part import WHOLE, Part
from .recording import (
    BLOCK,
    AudioError,
    ForwardFile,
    Recording,
    failed_audio,
    incomplete_audio,
    shown_path,
    unreadable_audio,
)

# In Hz. Below 1 kHz no speech is left; no recorder samples faster than 384 kHz.
SAMPLE_RATES = (1_000, 384_000)
_UNSUPPORTED = 4  # libsndfile's error for an encoding that it does not know
_UNKNOWN = 2**63 - 1  # libsndfile's number of frames of a file whose header has none


@contextmanager
def open_recording(path: Path | str, part: Part = WHOLE) -> Iterator[Recording]:
    """Open a recording, or a part of one: in a format of libsndfile whose completeness can be
    checked (containers.READABLE), or in one that ffmpeg decodes, if that is on the PATH.

    Raises:
        AudioError: the file is missing, not a regular file, of another format, of a rate outside
            SAMPLE_RATES, incomplete or damaged; or it does not have the part.
    """
    try:
        # Opening a FIFO waits for a writer, and /dev/zero never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(
                f"no recording: {shown_path(path)} is not a regular file; correct the path"
            )
        with open(path, "rb") as raw, ExitStack() as opened:
            # ffmpeg's formats first: in a video there may be frames of MP3.
            other = ffmpeg.knows(_head(raw)) or ffmpeg.named(path)
            extent = None if other else examine(raw)
            if extent is None and not other:
                raise unreadable_audio(path, "Format not recognised")
            file = None if extent is None else _decoder(raw, extent)
            file = opened.enter_context(ffmpeg.Decoding(path) if file is None else file)
            _check_format(path, file)
            yield Recording(path, file, _total(file, extent), part)
    except FileNotFoundError:
        raise AudioError(
            f"no recording: {shown_path(path)} does not exist; correct the path"
        ) from None
    except Incomplete as error:
        raise incomplete_audio(path, str(error)) from error
    except ffmpeg.FfmpegError as error:
        raise failed_audio(path, error) from error
    except AudioError:
        raise
    # ValueError: NUL in the path
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise unreadable_audio(path, error) from error


def _head(raw: BinaryIO) -> bytes:
    raw.seek(0)
    return raw.read(16)


def _decoder(raw: BinaryIO, extent: Extent) -> soundfile.SoundFile | None:
    """The file in libsndfile; None if it does not know the encoding, but ffmpeg may."""
    view = extent.view(raw)
    try:
        if view is not raw:
            return ForwardFile(view)
        # By descriptor: from names libsndfile guesses formats, and soundfile refuses some.
        os.lseek(raw.fileno(), 0, os.SEEK_SET)
        file = ForwardFile(raw.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        if error.code == _UNSUPPORTED:
            return None
        raise
    file.direct = True
    return file


def _total(file: "soundfile.SoundFile | ffmpeg.Decoding", extent: Extent | None) -> int | None:
    """Samples per channel that the container claims; None if it claims nothing."""
    if isinstance(file, ffmpeg.Decoding):
        return None
    if extent.frames is not None:
        return extent.frames
    return None if file.frames == _UNKNOWN else file.frames


def _check_format(path: Path | str, file: "soundfile.SoundFile | ffmpeg.Decoding") -> None:
    if isinstance(file, soundfile.SoundFile) and file.format not in READABLE:
        raise unreadable_audio(path, f"the length of the format {file.format} cannot be checked")
    lowest, highest = SAMPLE_RATES
    if not lowest <= file.samplerate <= highest:
        raise AudioError(
            f"unusual rate: {shown_path(path)} has {file.samplerate} Hz, outside {lowest} to "
            f"{highest}; its header may be damaged: export it again"
        )


def read_mono(
    path: Path | str, max_duration: float, finite: bool = True, part: Part = WHOLE
) -> tuple[np.ndarray, int]:
    """Read a recording.

    Args:
        path: of the file.
        max_duration: in seconds; it bounds the memory.
        finite: whether NaN and Inf samples are an error.
        part: of the recording; by default all, with the channels averaged.

    Returns:
        Samples (N,) float32 in [-1, 1], and their rate in Hz.

    Raises:
        AudioError: as :func:`open_recording` and :meth:`Recording.read`; the recording is longer
            than ``max_duration``; or samples are NaN or Inf.
    """
    with open_recording(path, part) as file:
        blocks = list(_mono_blocks(path, file, max_duration, finite))
        return np.concatenate([np.zeros(0, np.float32), *blocks]), file.samplerate


def decoded_duration(path: Path | str, max_duration: float, part: Part = WHOLE) -> float:
    """Decoded duration in seconds; raises AudioError like :func:`read_mono`."""
    with open_recording(path, part) as file:
        samples = sum(len(block) for block in _mono_blocks(path, file, max_duration))
        return samples / file.samplerate


def header_duration(path: Path | str, part: Part = WHOLE) -> float:
    """Duration in seconds that the header claims, or that ffmpeg estimates.

    Raises:
        AudioError: the file cannot be opened, or its header has no length.
    """
    with open_recording(path, part) as file:
        if file.frames is None and (estimate := file.estimate) is not None:
            return estimate
        if file.frames is None:
            raise AudioError(
                f"no length: the header of {shown_path(path)} has none, as in files written to a "
                "pipe; decode it (check=decode), or write it again"
            )
        return file.frames / file.samplerate


def check_duration(path: Path | str, seconds: float, shortest: float, longest: float) -> None:
    """Raise AudioError unless ``shortest <= seconds <= longest``."""
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


def _mono_blocks(
    path: Path | str, file: Recording, max_duration: float, finite: bool = True
) -> Iterator[np.ndarray]:
    """The recording in blocks (n,) float32. The bound also holds for the decoded samples, because a
    header may claim too few."""
    if file.frames is not None:
        check_duration(path, file.frames / file.samplerate, 0.0, max_duration)
    size = max(1, BLOCK // file.channels)
    samples = bad = 0
    while len(mono := file.read(size)):
        samples += len(mono)
        bad += int(np.count_nonzero(~np.isfinite(mono)))
        check_duration(path, samples / file.samplerate, 0.0, max_duration)
        yield mono
    if bad and finite:
        raise AudioError(
            f"samples not finite: {bad} of {samples} in {str(path)!r} are NaN or Inf; export it "
            "again"
        )
