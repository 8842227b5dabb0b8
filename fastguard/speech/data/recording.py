"""An open recording: its samples as one channel, checked against what its container claims."""

import functools
import logging
from pathlib import Path

import numpy as np
import soundfile

from fastguard._io.failures import in_a_line

from . import ffmpeg
from .part import WHOLE, Part
from .readers import Unusable

logger = logging.getLogger(__name__)

BLOCK = 1 << 20  # samples of all channels that are decoded at once
_LOST = 0.15  # seconds; an MP3 decoder may drop its first frames, up to 72 ms
_CANCEL = 1 / 8  # of the energy of the mean of unrelated channels
# Where libsndfile finds any sample without decoding those before it.
_SEEKABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "FLAC")
_SEEKABLE_ENCODINGS = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")


class AudioError(Unusable):
    """A recording cannot be used; the message names the file and what to do."""


class ForwardFile(soundfile.SoundFile):
    """Reads from start to end only. soundfile would seek after each block, which restarts decoders
    and fails at the end of a file whose header has no length.

    Attributes:
        direct: whether the file is read as it is, without corrections of its header.
    """

    direct = False

    def seekable(self) -> bool:
        return False


class Recording:
    """An open recording, or a part of one, read from its start to its end; see
    :func:`open_recording`.

    Attributes:
        samplerate: in Hz.
        channels: their number.
        frames: samples per channel that the container claims; None if it claims nothing.
        estimate: of the duration in seconds, where ``frames`` is None; None if nothing is known.
    """

    def __init__(
        self,
        path: Path | str,
        file: "soundfile.SoundFile | ffmpeg.Decoding",
        total: int | None,
        part: Part = WHOLE,
    ) -> None:
        self.path = path
        self.samplerate: int = file.samplerate
        self.channels: int = file.channels
        self.part = part
        self._file = file
        self._total = total  # samples per channel of the whole file
        self._first = round(part.start * self.samplerate)
        self._end = None
        if part.seconds is not None:
            self._end = self._first + max(1, round(part.seconds * self.samplerate))
        self._read = 0  # samples per channel, from the start of the file
        self._kept = part.channel  # the channel that is used alone
        if part.channel is not None and part.channel >= self.channels:
            raise AudioError(
                f"no such channel: {shown_path(path)} has {self.channels}, and channel "
                f"{part.channel}, counted from 0, is asked for; use --channel mix, or correct the "
                "manifest"
            )
        if total is not None and part.is_segment:
            self._check_inside(total)
        self.frames: int | None = self._claimed()

    @property
    def estimate(self) -> float | None:
        if not isinstance(self._file, ffmpeg.Decoding) or self._end is not None:
            return self.part.seconds
        seconds = self._file.duration
        return None if seconds is None else max(0.0, seconds - self.part.start)

    def _claimed(self) -> int | None:
        if self._total is None:
            return None
        end = self._total if self._end is None else min(self._end, self._total)
        return end - self._first

    def _check_inside(self, total: int) -> None:
        """Raise AudioError for a segment beyond the ``total`` samples of the file. One whose
        length was rounded up, or measured with another decoder, may be a little longer."""
        end = self._first + 1 if self._end is None else self._end - _LOST * self.samplerate
        if end > total or self._first >= total:
            length = "" if self.part.seconds is None else f" with duration {self.part.seconds:g} s"
            raise AudioError(
                f"segment beyond the end: offset {self.part.start:g} s{length} of "
                f"{shown_path(self.path)}, which has {total / self.samplerate:.2f} s; correct the "
                "manifest"
            )

    def read(self, frames: int) -> np.ndarray:
        """The next samples (n,) float32, n <= ``frames``: one channel, or the channels averaged;
        empty at the end.

        If channels cancel (stereo with one side inverted, as from a wrongly wired microphone), a
        warning names the file, and only the loudest channel is used from there on.

        Raises:
            AudioError: the file cannot be decoded, or is shorter than it claims.
        """
        blocks = [np.zeros(0, np.float32)]
        while frames > 0 and len(block := self._block(min(frames, self._most))):
            blocks.append(block)
            frames -= len(block)
        return np.concatenate(blocks)

    @property
    def _most(self) -> int:
        """Samples per channel that are decoded at once."""
        return max(1, BLOCK // self.channels)

    def _block(self, frames: int) -> np.ndarray:
        if self._read < self._first:
            self._skip()
        if self._end is not None:
            frames = min(frames, self._end - self._read)
        block = self._decoded(frames) if frames else np.zeros((0, self.channels), np.float32)
        if frames and not len(block):
            self._check_whole()
        return self._mono(block)

    def _decoded(self, frames: int) -> np.ndarray:
        try:
            block = self._file.read(frames, dtype="float32", always_2d=True)
        except ffmpeg.FfmpegError as error:
            raise failed_audio(self.path, error) from error
        except (soundfile.SoundFileError, OSError) as error:
            raise unreadable_audio(self.path, error) from error
        self._read += len(block)
        return block

    def _skip(self) -> None:
        """Go to the first sample of the part."""
        file = self._file
        if (
            isinstance(file, ForwardFile)
            and file.direct
            and file.format in _SEEKABLE
            and file.subtype.startswith(_SEEKABLE_ENCODINGS)
            and self._total is not None
        ):
            self._read = file.seek(self._first)
            return
        while self._read < self._first:
            if not len(self._decoded(min(self._most, self._first - self._read))):
                break

    def _check_whole(self) -> None:
        """Raise AudioError if the file has ended before what it claims, or before the segment."""
        missing = (self._total or 0) - self._read
        if missing > _LOST * self.samplerate:
            raise incomplete_audio(
                self.path,
                f"cut off: it decodes to {self._read / self.samplerate:.2f} s of the "
                f"{self._total / self.samplerate:.2f} s that its header claims",
            )
        if self.part.is_segment:
            self._check_inside(self._read)

    def _mono(self, block: np.ndarray) -> np.ndarray:
        if self._kept is not None:
            return block[:, self._kept].copy()  # a view would hold the other channels
        mono = block.mean(axis=1)
        if self.channels > 1 and len(block):
            energies = np.einsum("nc,nc->c", block, block, dtype=np.float64)
            together = np.einsum("n,n->", mono, mono, dtype=np.float64)
            # The mean of unrelated channels has 1 / channels of one's energy. NaN is not below.
            if self.channels * together < _CANCEL * energies.mean():
                self._kept = int(energies.argmax())
                _warn_of_cancelling(str(self.path), self._kept, self.channels)
                return block[:, self._kept].copy()
        return mono


@functools.lru_cache(maxsize=4096)  # once for each file
def _warn_of_cancelling(path: str, taken: int, channels: int) -> None:
    logger.warning(
        "The channels of %s cancel each other, as if one is inverted: only channel %d of %d, "
        "counted from 0, is used",
        ascii(path) if not path.isprintable() else path,
        taken,
        channels,
    )


def shown_path(path: Path | str) -> str:
    return repr(str(path))


def unreadable_audio(path: Path | str, why: object) -> AudioError:
    why = str(why).partition(": ")[2] if "Error opening" in str(why) else why
    return AudioError(
        f"unreadable audio: {shown_path(path)}: {why}; readable are wav, flac, ogg, opus, mp3, "
        "aiff, au, caf, w64, sph, and m4a, aac, webm, wma, amr and videos through ffmpeg: convert "
        f"it, {_conversion(path)}"
    )


def failed_audio(path: Path | str, error: ffmpeg.FfmpegError) -> AudioError:
    if error.kind == "unreadable audio":
        return unreadable_audio(path, in_a_line(error))
    if error.kind == "incomplete audio":
        return incomplete_audio(path, f"{error.kind}: {in_a_line(error)}")
    return AudioError(
        f"{error.kind}: {shown_path(path)}: {error}, or convert it, {_conversion(path)}"
    )


def incomplete_audio(path: Path | str, reason: str) -> AudioError:
    kind, _, what = reason.partition(": ")
    return AudioError(
        f"{kind}: {shown_path(path)}: {what}; copy or record it again, or keep what can be "
        f"decoded: {_conversion(path)}"
    )


def _conversion(path: Path | str) -> str:
    stem = Path(path).stem
    return f"ffmpeg -i {shown_path(Path(path).name)} {stem + '-converted.wav'!r}"
