"""Where :class:`fastguard.GradGuard` begins to clip: at a fixed norm, or at one that it learns.

``max_norm`` is the upper limit of a learnt threshold. Until ``warmup`` norms were accepted, it is
the threshold. A threshold learns from accepted steps only: with one NaN in their statistics ZClip
and AutoClip would not clip for the rest of a run. ZClip and AdaGC learn from norms after clipping.
Where norms have risen for good, both restart at the new level; the papers do not have this.
csrc/decide.h holds the arithmetic for every device.
"""

import dataclasses
import enum
import functools
import math
from typing import ClassVar, NamedTuple


def check_threshold(name: str, value: float) -> float:
    """``value`` as a float; ValueError if it is negative or NaN (torch flips signs, writes NaN)."""
    value = float(value)
    if not value >= 0:
        raise ValueError(f"{name} must be a number >= 0 (inf turns it off), got {value}")
    return value


class Kind(enum.IntEnum):
    """The numbers are those of csrc/decide.h."""

    FIXED = 0
    ZCLIP = 1
    RUNNING_MEDIAN = 2
    AUTOCLIP = 3
    ADAGC = 4


class Options(NamedTuple):
    """What the native code takes of a threshold. Twin: Policy in csrc/decide.h."""

    a: float  # the first parameter of the dataclass: ZClip's z, AdaGC's relative, ...
    b: float  # the second: ZClip's alpha, AdaGC's beta
    warmup: float  # accepted norms before the threshold leaves max_norm


class Threshold:
    """The base class of all thresholds: the numbers that the native code needs."""

    kind: ClassVar[Kind]
    warmup: int

    @functools.cached_property
    def options(self) -> Options:
        """The threshold's parameters as numbers; 0 for those that it does not have."""
        a, b = (*self._parameters(), 0.0, 0.0)[:2]
        return Options(float(a), float(b), float(self.warmup))

    def _parameters(self) -> tuple[float, ...]:
        return ()

    def _check(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            upper = "" if high == math.inf else f" and <= {high:g}"
            raise ValueError(
                f"{type(self).__name__}: {name} must be a number >= {low:g}{upper}, got {value}"
            )


@dataclasses.dataclass(frozen=True)
class Fixed(Threshold):
    """Clip to ``max_norm``: what ``clip_grad_norm_`` does."""

    kind: ClassVar[Kind] = Kind.FIXED
    warmup: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True)
class ZClip(Threshold):
    """Clip a norm that lies ``z`` standard deviations above the mean of the accepted ones.

    Down to ``mean + z * deviation * (z / z_of_the_norm)``: the larger the spike, the nearer to the
    mean. Mean and variance are those of the first ``warmup`` norms, from there exponential moving
    averages with factor ``alpha``, of norms as clipped by this threshold.

    As published, it never finds a level that is well above the old one: after norms rise from 0.1
    to 1.0, it clips to 6 % for ever, since the mean takes in the clipped norms. Here the moments
    restart where the present norm and the median of the last 128 norms seen both lie above ``z``
    deviations: the mean becomes the median, and the deviation the distance between the two. With a
    full window that is after 65 steps at the new level; a shorter row of spikes changes nothing.

    Source: Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
    arXiv 2504.02507.

    Raises:
        ValueError: ``z`` < 0, ``alpha`` outside [0, 1], ``warmup`` < 2.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    kind: ClassVar[Kind] = Kind.ZCLIP

    def __post_init__(self):
        self._check("z", 0.0)
        self._check("alpha", 0.0, 1.0)
        self._check("warmup", 2)

    def _parameters(self):
        return self.z, self.alpha


@dataclasses.dataclass(frozen=True)
class RunningMedian(Threshold):
    """Clip to ``factor`` times the median of the last 128 accepted norms.

    After icefall's ScaledAdam with ``clipping_scale=2.0``, which takes norms relative to the
    parameters' and renews its median every 100 steps.

    Raises:
        ValueError: ``factor`` < 0, ``warmup`` < 1.
    """

    factor: float = 2.0
    warmup: int = 16
    kind: ClassVar[Kind] = Kind.RUNNING_MEDIAN

    def __post_init__(self):
        self._check("factor", 0.0)
        self._check("warmup", 1)

    def _parameters(self):
        return (self.factor,)


@dataclasses.dataclass(frozen=True)
class AutoClip(Threshold):
    """Clip to a percentile of the last 128 accepted norms.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks", MLSP 2020; there of all norms since the start of the training, the
    present one among them.

    Raises:
        ValueError: ``percentile`` outside [0, 100], ``warmup`` < 1.
    """

    percentile: float = 10.0
    warmup: int = 16
    kind: ClassVar[Kind] = Kind.AUTOCLIP

    def __post_init__(self):
        self._check("percentile", 0.0, 100.0)
        self._check("warmup", 1)

    def _parameters(self):
        return (self.percentile,)


@dataclasses.dataclass(frozen=True)
class AdaGC(Threshold):
    """Clip each parameter's gradient to ``relative`` times a moving average of its own norm.

    The average has factor ``beta`` and takes in norms as clipped. During the ``warmup`` the global
    norm is clipped to ``max_norm`` and the average is the smallest norm so far; after it
    ``max_norm`` plays no part.

    As published, the average of a norm that has risen for good follows by 0.1 % a step, so a factor
    of 10 takes 2300 steps. Here it restarts at the parameter's usual norm (an average of its
    unclipped norms, in which a single one counts no more than 4 times the average) once its
    gradient was clipped to less than half in 128 steps in a row.

    Source: Wang et al., "AdaGC: Improving Training Stability for Large Language Model
    Pretraining", arXiv 2502.11034.

    Raises:
        ValueError: ``relative`` < 0, ``beta`` outside [0, 1], ``warmup`` < 1.
    """

    relative: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    kind: ClassVar[Kind] = Kind.ADAGC

    def __post_init__(self):
        self._check("relative", 0.0)
        self._check("beta", 0.0, 1.0)
        self._check("warmup", 1)

    def _parameters(self):
        return self.relative, self.beta
