"""Which part of a recording is used: a stretch of time, and one channel or the mean of all."""

from dataclasses import dataclass

#: Channels by name, counted from 0; None is the mean of all.
CHANNELS = {"mix": None, "left": 0, "right": 1}


@dataclass(frozen=True)
class Part:
    """A part of a recording; by default the whole, with its channels averaged.

    Attributes:
        start: in seconds.
        seconds: length; None to the end.
        channel: the channel that is used alone, counted from 0; None averages all.
    """

    start: float = 0.0
    seconds: float | None = None
    channel: int | None = None

    @property
    def is_segment(self) -> bool:
        """Whether a stretch of the recording is named, rather than all of it."""
        return self.start > 0 or self.seconds is not None


WHOLE = Part()
