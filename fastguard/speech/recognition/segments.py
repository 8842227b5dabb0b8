"""A recording of any length as overlapping segments, of which one at a time is in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Cuts:
    """Where a recording is cut, in its own samples. Segment n is from n * kept - context, or the
    start, to (n + 1) * kept + context. It is the last one, and longer, if at most ``margin``
    samples follow.

    Attributes:
        kept: of which a segment gives the output.
        context: before and after them.
        margin: which the filter of :func:`resample` reaches.
    """

    kept: int
    context: int
    margin: int

    @classmethod
    def of(
        cls,
        rate: int,
        sample_rate: int,
        samples_per_frame: int,
        seconds: float = 20.0,
        context_seconds: float = 2.0,
    ) -> "Cuts":
        """The cuts of a recording at ``rate`` Hz; the other arguments are those of Segments."""
        ratio = resampling_ratio(rate, sample_rate)
        unit = math.lcm(samples_per_frame, ratio.denominator)  # samples after resampling
        kept_seconds = max(0.0, seconds - 2 * context_seconds)
        kept = max(1, int(kept_seconds * sample_rate / unit)) * unit
        context = math.ceil(context_seconds * sample_rate / unit) * unit
        reach = RESAMPLING_WIDTH * max(1.0, rate / sample_rate) / 0.99 + 1
        margin = math.ceil(reach / ratio.numerator) * ratio.numerator
        return cls(int(kept * ratio), int(context * ratio), margin)


class Segments:
    """Cuts a recording into segments while it comes in.

    Every segment starts on an output frame and on a sample of the recording. The resampled segments
    therefore equal the resampled recording; unusual rates make the segments longer. A recording
    that is short enough is one segment. The segments do not depend on the sizes of the blocks.

    Args:
        rate: of the recording, in Hz.
        sample_rate: of the segments, in Hz.
        samples_per_frame: hop of the model's output, in samples at ``sample_rate``.
        seconds: approximate length of a segment.
        context_seconds: approximate length of what it shares with each neighbour.
    """

    def __init__(
        self,
        rate: int,
        sample_rate: int,
        samples_per_frame: int,
        seconds: float = 20.0,
        context_seconds: float = 2.0,
    ) -> None:
        self.rate = rate
        self.sample_rate = sample_rate
        self.samples_per_frame = samples_per_frame
        self.samples_read = 0
        ratio = resampling_ratio(rate, sample_rate)
        self._from, self._to = ratio.numerator, ratio.denominator
        cuts = Cuts.of(rate, sample_rate, samples_per_frame, seconds, context_seconds)
        self._kept, self._context = cuts.kept, cuts.context
        self._around = cuts.context + cuts.margin
        self._held, self._first = torch.empty(0), 0  # samples, and the number of the first one
        self._kept_from = 0

    @property
    def seconds_read(self) -> float:
        """Duration in seconds of the samples so far."""
        return self.samples_read / self.rate

    def push(self, samples: Tensor) -> Iterator[Segment]:
        """The segments that end before these further samples (N,) float32 do."""
        self.samples_read += len(samples)
        self._held = torch.cat([self._held, samples])
        while self.samples_read > (end := self._kept_from + self._kept + self._around):
            yield self._segment(self._held[: end - self._first], last=False)
            self._kept_from += self._kept
            start = max(0, self._kept_from - self._around)
            self._held, self._first = self._held[start - self._first :], start

    def rest(self) -> Segment | None:
        """The last segment, if the recording ends here; None without samples."""
        return self._segment(self._held, last=True) if len(self._held) else None

    def _segment(self, held: Tensor, last: bool) -> Segment:
        """The segment whose own frames begin at ``_kept_from``; ``held`` (N,) from ``_first``."""
        start = max(0, self._kept_from - self._context)
        end = self._kept_from + self._kept + self._context
        samples = resample(held, self._from, self._to)
        return Segment(
            samples[
                self._after(start - self._first) : None if last else self._after(end - self._first)
            ],
            self._after(self._kept_from - start) // self.samples_per_frame,
            None if last else self._after(self._kept) // self.samples_per_frame,
        )

    def _after(self, samples: int) -> int:
        """The number of samples after resampling, for a multiple of _from samples of the file."""
        return samples // self._from * self._to
