"""Which weights of a run are the best: the order, and the names of their files."""

import math
import re
from dataclasses import dataclass

FEW = 20
"""Utterances below which the CER is compared, not the WER: the WER of so few is often 1."""

_LARGEST = 1e9  # larger numbers count as Inf, so that names stay short
_NUMBER = r"-?\d{1,9}\.\d{6}|nan|inf"
NAME_OF_BEST = re.compile(rf"best_({_NUMBER})(?:_loss_({_NUMBER}))?_(\d{{9,18}})\.pt")
"""Names of the files of the best weights; those of older versions have no loss."""


def comparable(wer: float, cer: float, utterances: int, words: int) -> float:
    """The number by which weights are compared that had these error rates.

    It is the WER. Of fewer than FEW utterances it is the CER in steps of 0.5 / sqrt(words): the
    standard error of a mean of so many numbers between 0 and 1 is at most that, and smaller
    differences are chance.

    Args:
        wer, cer: error rates, perhaps NaN or Inf.
        utterances, words: number of what was evaluated.
    """
    if utterances >= FEW:
        return wer
    if not math.isfinite(cer):
        return cer
    step = 0.5 / math.sqrt(words)
    return step * round(cer / step)


@dataclass(frozen=True)
class Rank:
    """The place of weights among those of a run; the lowest is the best.

    Weights with a lower error rate come first, of equals those with a lower loss, and of equals
    the older ones. NaN is higher than every number. Numbers have the six decimals of a file name.
    """

    #: What :func:`comparable` gives.
    rate: float
    #: Mean training loss of the epoch.
    loss: float
    #: Optimizer steps of the run.
    step: int

    def __post_init__(self) -> None:
        for name in ("rate", "loss"):
            value = getattr(self, name)
            value = math.inf if value >= _LARGEST else float(f"{value:.6f}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_name(cls, name: str) -> "Rank":
        """The rank in a name that ``NAME_OF_BEST`` matches. A missing loss counts as Inf."""
        rate, loss, step = NAME_OF_BEST.fullmatch(name).groups()
        return cls(float(rate), float(loss or math.inf), int(step))

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"best_{self.rate:.6f}_loss_{self.loss:.6f}_{self.step:09d}.pt"

    def __lt__(self, other: "Rank") -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple:
        return (*_nan_last(self.rate), *_nan_last(self.loss), self.step)


def _nan_last(value: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(value) else (False, value)
