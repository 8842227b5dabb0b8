"""How many steps a run will take in all, and how long what is left of it will take."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from .config import Config

if TYPE_CHECKING:
    from .progress import Progress

_LATEST = 100  # steps whose mean time is that of the steps to come


class Outlook:
    """Estimates the end of a run from the times of its latest steps and its latest evaluation.

    Args:
        config: the settings. They limit epochs and steps.
    """

    def __init__(self, config: Config):
        self.epochs = config.epochs
        self._max_steps = config.max_steps
        self._micro_batches = config.grad_accumulation
        self._seconds: deque[float] = deque(maxlen=_LATEST)
        self._evaluation = 0.0  # seconds

    def step_took(self, seconds: float) -> None:
        """Take the wall time of a step into account."""
        self._seconds.append(seconds)

    def evaluation_took(self, seconds: float) -> None:
        """Take the wall time of an evaluation into account."""
        self._evaluation = seconds

    def total_steps(self, progress: Progress, batches: int) -> int:
        """Steps of the whole run, those that it has taken included.

        Args:
            progress: of the run.
            batches: of the current epoch. Later epochs are taken to have as many.
        """
        left = self._steps_left_in_epoch(progress, batches)
        later = self.epochs - progress.epoch
        total = progress.step + left + later * self._steps_of(batches)
        return total if self._max_steps is None else min(total, self._max_steps)

    def seconds_left(self, progress: Progress, batches: int) -> float:
        """Seconds until the run ends; NaN before the first step. Evaluations count once one has
        been timed. Arguments as of :meth:`total_steps`."""
        if not self._seconds:
            return math.nan
        steps = self.total_steps(progress, batches) - progress.step
        beyond = steps - self._steps_left_in_epoch(progress, batches)
        evaluations = 1 + max(0, math.ceil(beyond / self._steps_of(batches)))
        mean = math.fsum(self._seconds) / len(self._seconds)
        return steps * mean + evaluations * self._evaluation

    def _steps_of(self, batches: int) -> int:
        return max(1, math.ceil(batches / self._micro_batches))

    def _steps_left_in_epoch(self, progress: Progress, batches: int) -> int:
        return max(0, math.ceil((batches - progress.batches) / self._micro_batches))


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``; "unknown" for NaN."""
    if math.isnan(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
