"""A GradScaler's search for its scale: which skipped steps belong to it, and how many it may cost.

A GradScaler multiplies the loss by a scale S, so that small gradients do not vanish in fp16. Where
S is too large, gradients overflow to Inf; the scaler lowers S, by default to half, and tries again.
A fresh scaler of 65536 may need 16 such steps, one that starts at 2^40 may need 40, and later one
follows each growth of S. This is how a GradScaler works, and no explosion.
"""

import operator
from collections import deque
from collections.abc import Iterable

from torch import Tensor

from fastguard.ops import GradNorm, GuardDecision, Verdict

#: From 2^40 down to 1 are 40 halvings.
_FREE = 40
#: Steps in which as many searches are free; torch's ``growth_interval``, after which S grows.
_INTERVAL = 2000


def is_search(
    verdict: Verdict, scaled: bool, loss_scale: float | None, infinite: bool, loss_is_bad: bool
) -> bool:
    """Whether a step was skipped because a GradScaler searches for its scale.

    What is known of such a step: the gradients of S times the loss overflowed. While S is above 1
    those of the loss itself may well be ordinary, and a lower S is the first thing to try. The
    dtype of the gradients tells no more: under autocast an Inf in a float32 ``.grad`` may come from
    an fp16 activation. At S = 1 and below the gradients of the loss themselves overflow.

    A NaN beside an Inf changes nothing: an Inf becomes a NaN on its way through backward (Inf - Inf
    in a matrix product, Inf times 0 in a ReLU). NaNs alone come from no overflow.

    Args:
        scaled: whether an enabled GradScaler scaled the loss.
        loss_scale: S at the time of the step; None if it is not known, as after ``unscale_`` in an
            attached optimizer.
        infinite: whether any gradient holds an Inf.
        loss_is_bad: whether the loss is known to be NaN or Inf.
    """
    if verdict is not Verdict.SKIP_NONFINITE or not scaled or not infinite or loss_is_bad:
        return False
    return loss_scale is None or loss_scale > 1


def overflowed(decision: GuardDecision, measured: GradNorm, loss_counts: bool) -> Tensor:
    """Whether a micro-batch has an Inf and no bad loss, on the device, bool, shape ().

    A window in which all did so, on all ranks, is a search; no rank may come to another answer.

    Args:
        loss_counts: whether the record has a loss.
    """
    found = (decision.verdict == int(Verdict.SKIP_NONFINITE)) & measured.nonfinite[:, 1].any()
    return found & decision.record[4].isfinite() if loss_counts else found


class Searches:
    """Which searches are free: they spend no patience.

    At most 40 in 2000 steps are: a scaler that never gets to a scale of 1, or whose scale is not
    known, must not let a run skip for ever.

    Args:
        steps: of the last free ones, as :meth:`state_dict` gave them.
    """

    def __init__(self, steps: Iterable[int] = ()):
        self._steps: deque[int] = deque(map(operator.index, steps), maxlen=_FREE)

    def is_free(self, step: int) -> bool:
        """Whether the search at this step is free; it is counted then."""
        if len(self._steps) == _FREE and step - self._steps[0] < _INTERVAL:
            return False
        self._steps.append(step)
        return True

    def state_dict(self) -> list[int]:
        return list(self._steps)
