"""Reads recordings within bounds: the header is checked before the samples are decoded, and the
decoded length afterwards, so that no part of a recording is lost without an error."""

import functools
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from .containers import READABLE, Extent, Incomplete, examine
from .readers import Unusable

logger = logging.getLogger(__name__)

# In Hz. Below 1 kHz no speech is left; no recorder samples faster than 384 kHz.
SAMPLE_RATES = (1_000, 384_000)
_UNKNOWN = 2**63 - 1  # libsndfile's number of frames of a file whose header has none
_BLOCK = 1 << 20  # samples of all channels that are decoded at once
_LOST = 0.15  # seconds; an MP3 decoder may drop its first frames, up to 72 ms
_CANCEL = 1 / 8  # of the energy of the mean of unrelated channels


class AudioError(Unusable):
    """A recording cannot be used; the message names the file and what to do."""


class Recording:
    """An open recording, read from its start to its end; see :func:`open_recording`.

    Attributes:
        samplerate: in Hz.
        channels: their number.
        frames: samples per channel that the container claims; None if it claims nothing.
    """

    def __init__(self, path: Path | str, file: soundfile.SoundFile, extent: Extent) -> None:
        self.path = path
        self.samplerate: int = file.samplerate
        self.channels: int = file.channels
        known = None if file.frames == _UNKNOWN else file.frames
        self.frames: int | None = extent.frames if extent.frames is not None else known
        self._file = file
        self._read = 0
        self._kept: int | None = None  # the channel that is used alone, if they cancel

    def read(self, frames: int) -> np.ndarray:
        """The next samples (n,) float32, n <= ``frames``, the channels averaged; empty at the end.

        If channels cancel (stereo with one side inverted, as from a wrongly wired microphone), a
        warning names the file, and only the loudest channel is used from there on.

        Raises:
            AudioError: the file cannot be decoded, or is shorter than it claims.
        """
        blocks = [np.zeros(0, np.float32)]
        while frames > 0 and len(block := self._block(min(frames, _BLOCK // self.channels or 1))):
            blocks.append(block)
            frames -= len(block)
        return np.concatenate(blocks)

    def _block(self, frames: int) -> np.ndarray:
        try:
            block = self._file.read(frames, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            raise _unreadable(self.path, error) from error
        self._read += len(block)
        if not len(block):
            self._check_whole()
        return self._mono(block)

    def _check_whole(self) -> None:
        missing = (self.frames or 0) - self._read
        if missing > _LOST * self.samplerate:
            raise _incomplete(
                self.path,
                f"cut off: it decodes to {self._read / self.samplerate:.2f} s of the "
                f"{self.frames / self.samplerate:.2f} s that its header claims",
            )

    def _mono(self, block: np.ndarray) -> np.ndarray:
        mono = block.mean(axis=1)
        if self.channels == 1:
            return mono
        if self._kept is None and len(block):
            energies = np.einsum("nc,nc->c", block, block, dtype=np.float64)
            together = np.einsum("n,n->", mono, mono, dtype=np.float64)
            # The mean of unrelated channels has 1 / channels of one's energy. NaN is not below.
            if self.channels * together < _CANCEL * energies.mean():
                self._kept = int(energies.argmax())
                _warn_of_cancelling(str(self.path), self._kept + 1, self.channels)
        return mono if self._kept is None else block[:, self._kept]


@functools.lru_cache(maxsize=4096)  # once for each file
def _warn_of_cancelling(path: str, taken: int, channels: int) -> None:
    logger.warning(
        "The channels of %s cancel each other, as if one is inverted: only channel %d of %d is "
        "used",
        ascii(path) if not path.isprintable() else path,
        taken,
        channels,
    )


class _Forward(soundfile.SoundFile):
    """Reads from start to end only. soundfile would seek after each block, which restarts decoders
    and fails at the end of a file whose header has no length."""

    def seekable(self) -> bool:
        return False


@contextmanager
def open_recording(path: Path | str) -> Iterator[Recording]:
    """Open a recording in a format whose completeness can be checked (containers.READABLE).

    Raises:
        AudioError: the file is missing, not a regular file, of another format, of a rate outside
            SAMPLE_RATES, incomplete or damaged.
    """
    try:
        # Opening a FIFO waits for a writer, and /dev/zero never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(f"no recording: {_name(path)} is not a regular file; correct the path")
        with open(path, "rb") as raw:
            extent = examine(raw)
            if extent is None:
                raise _unreadable(path, "Format not recognised")
            with _decoder(raw, extent) as file:
                _check_format(path, file)
                yield Recording(path, file, extent)
    except FileNotFoundError:
        raise AudioError(f"no recording: {_name(path)} does not exist; correct the path") from None
    except Incomplete as error:
        raise _incomplete(path, str(error)) from error
    except AudioError:
        raise
    # ValueError: NUL in the path
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _decoder(raw: BinaryIO, extent: Extent) -> soundfile.SoundFile:
    view = extent.view(raw)
    if view is not raw:
        return _Forward(view)
    # By descriptor: from names libsndfile guesses formats, and soundfile refuses some.
    os.lseek(raw.fileno(), 0, os.SEEK_SET)
    return _Forward(raw.fileno(), closefd=False)


def _check_format(path: Path | str, file: soundfile.SoundFile) -> None:
    if file.format not in READABLE:
        raise _unreadable(path, f"the length of the format {file.format} cannot be checked")
    lowest, highest = SAMPLE_RATES
    if not lowest <= file.samplerate <= highest:
        raise AudioError(
            f"unusual rate: {_name(path)} has {file.samplerate} Hz, outside {lowest} to {highest}; "
            "its header may be damaged: export it again"
        )


def _name(path: Path | str) -> str:
    return repr(str(path))


def _unreadable(path: Path | str, why: object) -> AudioError:
    why = str(why).partition(": ")[2] if "Error opening" in str(why) else why
    return AudioError(
        f"unreadable audio: {_name(path)}: {why}; readable are wav, flac, ogg, opus, mp3, aiff, "
        f"au, caf, w64 and sph: convert it, {_conversion(path)}"
    )


def _incomplete(path: Path | str, reason: str) -> AudioError:
    kind, _, what = reason.partition(": ")
    return AudioError(
        f"{kind}: {_name(path)}: {what}; copy or record it again, or keep what can be decoded: "
        f"{_conversion(path)}"
    )


def _conversion(path: Path | str) -> str:
    stem = Path(path).stem
    return f"ffmpeg -i {_name(Path(path).name)} {stem + '-converted.wav'!r}"


def read_mono(path: Path | str, max_duration: float, finite: bool = True) -> tuple[np.ndarray, int]:
    """Read a whole recording.

    Args:
        path: of the file.
        max_duration: in seconds; it bounds the memory.
        finite: whether NaN and Inf samples are an error.

    Returns:
        Samples (N,) float32 in [-1, 1], the channels averaged, and their rate in Hz.

    Raises:
        AudioError: as :func:`open_recording` and :meth:`Recording.read`; the recording is longer
            than ``max_duration``; or samples are NaN or Inf.
    """
    with open_recording(path) as file:
        blocks = list(_mono_blocks(path, file, max_duration, finite))
        return np.concatenate([np.zeros(0, np.float32), *blocks]), file.samplerate


def decoded_duration(path: Path | str, max_duration: float) -> float:
    """Decoded duration in seconds; raises AudioError like :func:`read_mono`."""
    with open_recording(path) as file:
        samples = sum(len(block) for block in _mono_blocks(path, file, max_duration))
        return samples / file.samplerate


def header_duration(path: Path | str) -> float:
    """Duration in seconds that the header claims.

    Raises:
        AudioError: the file cannot be opened, or its header has no length.
    """
    with open_recording(path) as file:
        if file.frames is None:
            raise AudioError(
                f"no length: the header of {_name(path)} has none, as in files written to a pipe; "
                "decode it (check=decode), or write it again"
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
    size = max(1, _BLOCK // file.channels)
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
