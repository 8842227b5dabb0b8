"""Samples that still come in: WAV or raw PCM from a pipe."""

import wave
from typing import BinaryIO

import numpy as np

from .audio import SAMPLE_RATES
from .recording import AudioError

# What programs write as the size of a stream whose end they do not know is above this.
_UNKNOWN = 0x7FFF_0000  # bytes
_CURE = "give raw PCM, as of ffmpeg -i IN -f s16le -ac 1 -ar 16000 -, with --raw-rate 16000"


class LiveSamples:
    """Mono samples from a stream that is read once, as they arrive.

    Args:
        file: a WAV file of integer PCM, whose channels are averaged; with ``raw_rate`` raw PCM of
            one channel, 16 bits, little-endian.
        raw_rate: of raw PCM, in Hz.

    Raises:
        AudioError: the stream is not such a WAV file, or its rate is outside SAMPLE_RATES.
    """

    def __init__(self, file: BinaryIO, raw_rate: int | None = None) -> None:
        self._raw = self._wave = None
        self._frames_read = 0
        if raw_rate is not None:
            self._raw, self.samplerate = file, raw_rate
        else:
            try:
                self._wave = wave.Wave_read(file)
            except (EOFError, wave.Error) as error:
                why = str(error) or "it ends in its header"
                raise AudioError(f"cannot be read as a WAV stream: {why}; {_CURE}") from error
            self.samplerate = self._wave.getframerate()
            if not 1 <= self._wave.getsampwidth() <= 4:
                bits = 8 * self._wave.getsampwidth()
                raise AudioError(f"cannot be read as a WAV stream: {bits} bits; {_CURE}")
        lowest, highest = SAMPLE_RATES
        if not lowest <= self.samplerate <= highest:
            raise AudioError(
                f"unusual rate: {self.samplerate} Hz, outside {lowest} to {highest}; {_CURE}"
            )

    def read(self, frames: int) -> np.ndarray:
        """The next ``frames`` samples (n,) float32, fewer only at the end; waits for them.

        Raises:
            AudioError: a WAV file ends before its header says.
        """
        if self._raw is not None:
            data = self._raw.read(2 * frames)
            return np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
        samples = _mono(self._wave.readframes(frames), self._wave)
        self._frames_read += len(samples)
        if len(samples) < frames:
            self._check_whole()
        return samples

    def _check_whole(self) -> None:
        claimed = self._wave.getnframes()
        size = claimed * self._wave.getsampwidth() * self._wave.getnchannels()
        if size < _UNKNOWN and self._frames_read < claimed:
            raise AudioError(
                f"cut off: {self._frames_read / self.samplerate:.2f} s of the "
                f"{claimed / self.samplerate:.2f} s that the header claims came in"
            )


def _mono(data: bytes, header: wave.Wave_read) -> np.ndarray:
    """Samples (n,) float32 in [-1, 1] of whole frames of PCM."""
    width, channels = header.getsampwidth(), header.getnchannels()
    data = data[: len(data) // (width * channels) * (width * channels)]
    if width == 1:  # unsigned
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(parts), 4), np.uint8)
        wide[:, 1:] = parts
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        samples = np.frombuffer(data, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(axis=1)
