"""A recording of any length as overlapping segments, of which one at a time is in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from fastguard.speech.data.audio import Recording
from fastguard.speech.data.features import RESAMPLING_WIDTH, resample, resampling_ratio


@dataclass(frozen=True)
class Segment:
    """A part of a recording with context on both sides.

    Attributes:
        samples: (N,) float32.
        skip: output frames of the model at the start that belong to the segment before.
        keep: output frames after those that belong to this segment; None in the last segment, whose
            frames are kept to the end.
    """

    samples: Tensor
    skip: int
    keep: int | None


class Segments:
    """Iterates over the segments of a recording, in order.

    Every segment starts on an output frame and on a sample of the file. The resampled segments
    therefore equal the resampled recording; unusual rates make the segments longer. A recording
    that is short enough is one segment.

    Args:
        file: the recording, read from its start; its channels are averaged.
        sample_rate: of the segments, in Hz.
        samples_per_frame: hop of the model's output, in samples at ``sample_rate``.
        seconds: approximate length of a segment.
        context_seconds: approximate length of what it shares with each neighbour.
    """

    def __init__(
        self,
        file: Recording,
        sample_rate: int,
        samples_per_frame: int,
        seconds: float = 20.0,
        context_seconds: float = 2.0,
    ) -> None:
        self.file = file
        self.sample_rate = sample_rate
        self.samples_per_frame = samples_per_frame
        self.samples_read = 0
        ratio = resampling_ratio(file.samplerate, sample_rate)
        self._from, self._to = ratio.numerator, ratio.denominator
        unit = math.lcm(samples_per_frame, self._to)  # samples after resampling
        kept_seconds = max(0.0, seconds - 2 * context_seconds)
        kept = max(1, int(kept_seconds * sample_rate / unit)) * unit
        context = math.ceil(context_seconds * sample_rate / unit) * unit
        # From here on counts are in samples of the file.
        self._kept, self._context = self._before(kept), self._before(context)
        reach = RESAMPLING_WIDTH * max(1.0, file.samplerate / sample_rate) / 0.99 + 1
        self._margin = math.ceil(reach / self._from) * self._from

    @property
    def seconds_read(self) -> float:
        """Duration in seconds that has been read from the file."""
        return self.samples_read / self.file.samplerate

    def __iter__(self) -> Iterator[Segment]:
        around = self._context + self._margin
        held, first = self._read(self._kept + around), 0
        for number in count():
            more = self._read(self._kept)
            last = len(more) == 0
            if len(held):
                yield self._segment(held, first, number * self._kept, last)
            if last:
                return
            start = max(0, (number + 1) * self._kept - around)
            held, first = torch.cat([held[start - first :], more]), start

    def _read(self, frames: int) -> Tensor:
        samples = self.file.read(frames)
        self.samples_read += len(samples)
        return torch.from_numpy(samples)

    def _segment(self, held: Tensor, first: int, kept_from: int, last: bool) -> Segment:
        """The segment whose own frames begin at ``kept_from``; ``held`` (N,) is from ``first``."""
        start = max(0, kept_from - self._context)
        end = kept_from + self._kept + self._context
        samples = resample(held, self._from, self._to)
        return Segment(
            samples[self._after(start - first) : None if last else self._after(end - first)],
            self._after(kept_from - start) // self.samples_per_frame,
            None if last else self._after(self._kept) // self.samples_per_frame,
        )

    def _after(self, samples: int) -> int:
        """The number of samples after resampling, for a multiple of _from samples of the file."""
        return samples // self._from * self._to

    def _before(self, samples: int) -> int:
        return samples // self._to * self._from
