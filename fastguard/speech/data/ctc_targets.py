"""What CTC needs for a text: tokens, and enough output frames for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .readers import Unusable


@dataclass(frozen=True)
class Needed:
    """The output frames that CTC needs for a sequence of tokens: one for each, and a blank between
    two equal neighbours (Graves et al. 2006)."""

    symbols: int
    repeats: int

    @classmethod
    def by(cls, tokens: Sequence) -> "Needed":
        """What the tokens need."""
        return cls(len(tokens), sum(a == b for a, b in pairwise(tokens)))

    @property
    def frames(self) -> int:
        """Output frames in total."""
        return self.symbols + self.repeats

    def __str__(self) -> str:
        return f"{self.frames} frames ({self.symbols} symbols + {self.repeats} repeats)"


def check_feasible(tokens: Sequence, frames: int) -> None:
    """Raises :class:`Unusable` if CTC cannot align the tokens to so many output frames."""
    needed = Needed.by(tokens)
    if frames < needed.frames:
        raise Unusable(
            f"infeasible target: needs {needed}, has {frames}; check the text, or use a model of "
            "smaller stride"
        )


def encoded(encode: Callable[[str], Sequence], text: str) -> Sequence:
    """What ``encode`` gives; raises :class:`Unusable` for a text that has no tokens."""
    try:
        return encode(text)
    except ValueError as error:
        raise Unusable(f"no tokens: {error}") from error
