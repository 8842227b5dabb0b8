"""A recording of any length in overlapping windows, with memory for one of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from fastguard.speech.data.audio import Recording
from fastguard.speech.data.features import RESAMPLING_WIDTH, resample, resampling_ratio


@dataclass(frozen=True)
class Window:
    """``samples`` (N,) float32, of which the first and last frames are context.

    A model's frames ``[skip, skip + keep)`` go on where those of the window before end; ``keep`` is
    None in the last one, all of whose frames to the end are kept.
    """

    samples: Tensor
    skip: int
    keep: int | None


class Windows:
    """Iterates over a recording from its start: mono, at ``sample_rate``, in windows of about
    ``seconds`` that share about ``context_seconds`` with each neighbour.

    ``samples_per_frame`` is the hop of the model's output.  Every window starts on a frame, and on
    a sample of the recording too, so that resampled windows agree with the resampled recording;
    odd rates make the windows longer for it.  A recording that fits is one window.
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
        # From here on in samples of the file.
        self._kept, self._context = self._before(kept), self._before(context)
        reach = RESAMPLING_WIDTH * max(1.0, file.samplerate / sample_rate) / 0.99 + 1
        self._margin = math.ceil(reach / self._from) * self._from

    @property
    def seconds_read(self) -> float:
        return self.samples_read / self.file.samplerate

    def __iter__(self) -> Iterator[Window]:
        around = self._context + self._margin
        held, first = self._read(self._kept + around), 0
        for number in count():
            more = self._read(self._kept)
            last = len(more) == 0
            if len(held):
                yield self._window(held, first, number * self._kept, last)
            if last:
                return
            start = max(0, (number + 1) * self._kept - around)
            held, first = torch.cat([held[start - first :], more]), start

    def _read(self, frames: int) -> Tensor:
        samples = self.file.read(frames)
        self.samples_read += len(samples)
        return torch.from_numpy(samples)

    def _window(self, held: Tensor, first: int, kept_from: int, last: bool) -> Window:
        """``held`` begins with sample ``first`` of the file."""
        start = max(0, kept_from - self._context)
        end = kept_from + self._kept + self._context
        samples = resample(held, self._from, self._to)
        return Window(
            samples[self._after(start - first) : None if last else self._after(end - first)],
            self._after(kept_from - start) // self.samples_per_frame,
            None if last else self._after(self._kept) // self.samples_per_frame,
        )

    def _after(self, samples: int) -> int:
        """Samples of the file, a multiple of _from, as samples after resampling."""
        return samples // self._from * self._to

    def _before(self, samples: int) -> int:
        return samples // self._to * self._from
