"""What the operators take and return: dtypes, named results, and the constants of the decision."""

import enum
from typing import NamedTuple

import torch
from torch import Tensor

# Constants of the guard's decision. Each has a twin of the same name, in lower case, in
# csrc/decide.h; tests/ops/test_twins.py compares them.

#: A finite norm is an outlier only after this many norms were seen: a median of fewer says little.
OUTLIER_AFTER = 16

#: An outlier is above ``skip_norm`` and above this many times the median of the last norms seen.
OUTLIER_FACTOR = 4.0

#: The factor of the moving average of each tensor's norm.
USUAL_BETA = 0.98

#: A tensor's norm has risen when it is above this many times its moving average.
RISEN_FACTOR = 4.0

#: After this many steps in a row clipped to less than half, AdaGC's average of a tensor restarts.
ADAGC_RESTART_AFTER = 128

#: The largest norm, after clipping, that a step is taken with. Beyond it the second moments of
#: Adam overflow in float32.
LARGEST_APPLIED = 1e18

#: The dtypes that the kernels read.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: The kernels read complex tensors as their real and imaginary parts.
COMPLEX_DTYPES = (torch.complex64, torch.complex128, torch.complex32)
#: The dtypes that can hold a NaN or Inf, and whose gradients can be measured and clipped.
FLOATING_DTYPES = (*DTYPES, *COMPLEX_DTYPES)


class Verdict(enum.IntEnum):
    """What becomes of a step; the numbers are those of csrc/decide.h."""

    APPLY = 0
    CLIP = 1
    SKIP_NONFINITE = 2
    SKIP_OUTLIER = 3
    #: The batches after a rollback; decided on the host, so csrc/decide.h does not know it.
    SKIP_ROLLBACK = 4

    @property
    def skipped(self) -> bool:
        """Whether the step is not taken."""
        return self >= Verdict.SKIP_NONFINITE


class GradNorm(NamedTuple):
    """What one read of N gradients says about them."""

    #: L2 norm over all elements, float64, shape (). NaN or Inf where an element is; Inf also where
    #: the sum of squares of finite float64 elements overflows.
    total_norm: Tensor
    #: L2 norm of each tensor, float64, shape (N,).
    norms: Tensor
    #: For each tensor the number of its NaNs, the number of its Infs and the flat row-major index
    #: of the first of either (-1 if there is none), int64, shape (N, 3).
    nonfinite: Tensor


class Decision(NamedTuple):
    """What to do with the gradients, on the device of the norm."""

    #: Factor for the gradients, float64, shape (); exactly 1 unless the verdict is CLIP.
    clip_coef: Tensor
    #: A :class:`Verdict`, int64, shape ().
    verdict: Tensor


class Statistics(NamedTuple):
    """What the guard remembers of global norms: no NaN, no Inf, no 0.

    A norm is *seen* when it and its loss are finite, whether its step was skipped or not; it is
    *accepted* when its step was taken.
    """

    #: How many norms were seen, how many accepted, mean and variance of the accepted ones (these
    #: two for ZClip), float64, shape (4,).
    numbers: Tensor
    #: The last W norms seen, the oldest overwritten first, float64, shape (W,). Outliers are judged
    #: by their median.
    seen_norms: Tensor
    #: The last W norms accepted, likewise. RunningMedian and AutoClip learn from them.
    accepted_norms: Tensor
    #: Of each of N gradients the four numbers below, float64, shape (4, N); or (4, 0), where
    #: nothing of that kind is to be remembered.
    per_tensor: Tensor

    @property
    def ema_norms(self) -> Tensor:
        """AdaGC's moving average of each norm, as clipped; inf where there is none yet."""
        return self.per_tensor[0]

    @property
    def clipped_since(self) -> Tensor:
        """The step since which AdaGC has clipped it to less than half; -1 where it has not."""
        return self.per_tensor[1]

    @property
    def usual_norms(self) -> Tensor:
        """A moving average (factor 0.98) of each norm, skipped steps included; inf where unseen.

        At most 4 times the present value gets in, so one spike raises it by 6 %.
        """
        return self.per_tensor[2]

    @property
    def risen_since(self) -> Tensor:
        """The step since which the norm is above 4 times its usual one; -1 where it is not."""
        return self.per_tensor[3]

    @property
    def counts(self) -> Tensor:
        """:attr:`seen` and :attr:`accepted`, shape (2,)."""
        return self.numbers[:2]

    @property
    def moments(self) -> Tensor:
        """:attr:`mean` and :attr:`variance`, shape (2,)."""
        return self.numbers[2:]

    @property
    def seen(self) -> Tensor:
        """How many norms were seen, shape ()."""
        return self.numbers[0]

    @property
    def accepted(self) -> Tensor:
        """How many norms were accepted, shape ()."""
        return self.numbers[1]

    @property
    def mean(self) -> Tensor:
        """ZClip's mean of the accepted norms, shape ()."""
        return self.numbers[2]

    @property
    def variance(self) -> Tensor:
        """ZClip's variance of the accepted norms, shape ()."""
        return self.numbers[3]

    def copy(self) -> "Statistics":
        """The same values in memory of their own."""
        flat = [*self[:-1], self.per_tensor.view(-1)]
        *copies, per_tensor = torch.cat(flat).split([len(tensor) for tensor in flat])  # one launch
        return Statistics(*copies, per_tensor.view_as(self.per_tensor))


class Record(NamedTuple):
    """The entries of :attr:`GuardDecision.record`, as tensors of shape () or read as floats."""

    verdict: Tensor | float
    #: The smallest clip coefficient; 1 where nothing is clipped.
    clip_coef: Tensor | float
    #: After unscaling.
    total_norm: Tensor | float
    #: The clipping threshold in force.
    limit: Tensor | float
    #: NaN if none was given.
    loss: Tensor | float
    #: The norm above which a finite norm was an outlier; inf where none could be.
    outlier_above: Tensor | float


class GuardDecision(NamedTuple):
    """What to do with N gradients, on their device."""

    #: Factor for the gradients, clipping and unscaling in one, float64, shape () or, with AdaGC,
    #: (N,); exactly 1 on a skip.
    grad_coef: Tensor
    #: A :class:`Verdict`, int64, shape ().
    verdict: Tensor
    #: For the host: the entries of a :class:`Record`, float64, shape (6,).
    record: Tensor

    @property
    def entries(self) -> Record:
        """The record's entries by name, as tensors of shape ()."""
        return Record(*self.record.unbind())


class Scaling(NamedTuple):
    """A ``torch.amp.GradScaler``'s state and settings, for its update."""

    #: What the loss is multiplied by, float32, one element; shrinks after a NaN or Inf.
    scale: Tensor
    #: Steps without one since the scale last changed, int32, one element.
    growth_tracker: Tensor
    growth_factor: float
    backoff_factor: float
    growth_interval: int
