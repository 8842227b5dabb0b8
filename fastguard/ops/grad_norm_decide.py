"""``grad_norm_decide_``: measure the gradients and decide, in one launch on CUDA."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.thresholds import Threshold

from . import _library
from ._checks import check_same_device, check_writable
from .decide import GuardDecideArguments, fake_guard_decide_, guard_decide_ref_
from .grad_norm import fake_grad_norm, grad_norm_ref
from .types import GradNorm, GuardDecision, Scaling, Statistics


class GradNormDecideArguments(NamedTuple):
    """The arguments of the operator ``grad_norm_decide_`` after the gradients, in its order."""

    unscale: Tensor | None
    loss: Tensor | None
    numbers: Tensor
    seen_norms: Tensor
    accepted_norms: Tensor
    per_tensor: Tensor
    step: int
    threshold: int
    max_norm: float
    skip_norm: float
    options: Sequence[float]
    scale: Tensor | None
    growth_tracker: Tensor | None
    #: growth_factor, backoff_factor and growth_interval of :class:`Scaling`.
    growth: Sequence[float]

    def about(self, total_norm: Tensor, norms: Tensor) -> GuardDecideArguments:
        """The arguments of ``guard_decide_`` for gradients with these norms."""
        of_scaler = ("scale", "growth_tracker", "growth")
        shared = {k: v for k, v in self._asdict().items() if k not in of_scaler}
        return GuardDecideArguments(total_norm, norms, **shared)


@torch.no_grad()
def grad_norm_decide_(
    grads: Sequence[Tensor],
    unscale: Tensor | None,
    loss: Tensor | None,
    statistics: Statistics,
    step: int,
    threshold: Threshold,
    max_norm: float,
    skip_norm: float,
    scaling: Scaling | None = None,
) -> tuple[GradNorm, GuardDecision]:
    """:func:`grad_norm` and :func:`guard_decide_` in one; on CUDA in one launch.

    Args:
        scaling: updated in place as ``GradScaler.update`` does. A measured norm that is not finite
            multiplies the scale by ``backoff_factor``; ``growth_interval`` finite norms in a row
            multiply it by ``growth_factor``. None without a scaler.
        grads, unscale, loss, statistics, step, threshold, max_norm, skip_norm: as for those two.

    Raises:
        RuntimeError: what those two raise; nothing is written then.
    """
    grads = grads if isinstance(grads, list) else list(grads)
    state, growth = (None, None), (0.0, 0.0, 0.0)
    if scaling is not None:
        state, growth = scaling[:2], scaling[2:]
    args = (unscale, loss, *statistics, step, int(threshold.kind), max_norm, skip_norm)
    args += (threshold.options, *state, growth)
    if grads and _library.has_kernel(grads[0]):
        found = torch.ops.fastguard.grad_norm_decide_.default(grads, *args)
        written = (*statistics, *(state if scaling is not None else ()))
        _library.count_writes(written)
    else:
        found = grad_norm_decide_ref_(grads, *args)
    return GradNorm(*found[:3]), GuardDecision(*found[3:])


def grad_norm_decide_ref_(grads: Sequence[Tensor], *arguments) -> tuple[Tensor, ...]:
    """The operator behind :func:`grad_norm_decide_` in plain torch.

    Args:
        arguments: those of :class:`GradNormDecideArguments`.
    """
    given = GradNormDecideArguments(*arguments)
    _check_growth("grad_norm_decide_", given.scale, given.growth_tracker, given.growth)
    check_same_device(
        "grad_norm_decide_", (*grads, given.numbers, given.scale, given.growth_tracker)
    )
    measured = grad_norm_ref(grads, given.numbers.device)
    decided = guard_decide_ref_(*given.about(measured.total_norm, measured.norms))
    if given.scale is not None:
        _grow(Scaling(given.scale, given.growth_tracker, *given.growth), measured.total_norm)
    return *measured, *decided


def _grow(scaling: Scaling, total_norm: Tensor) -> None:
    """``GradScaler.update`` in place. Twin: grow in csrc/decide.h."""
    # Both hold one number, in any shape.
    scale, tracker = scaling.scale.reshape(()), scaling.growth_tracker.reshape(())
    interval = scaling.growth_interval
    interval = math.floor(min(interval, 2.0**53)) if interval >= 1 else 0
    good = total_norm.isfinite()
    steps = torch.where(good, tracker + 1, 0)
    grown = (scale.double() * scaling.growth_factor).float()
    full = (steps.long() == interval) & grown.isfinite()
    kept = torch.where(full, grown, scale)
    scale.copy_(torch.where(good, kept, (scale.double() * scaling.backoff_factor).float()))
    tracker.copy_(torch.where(steps.long() == interval, 0, steps))


def _check_growth(op, scale, growth_tracker, growth) -> None:
    """Twin: check_growth in csrc/checks.h."""
    if (scale is None) != (growth_tracker is None) or len(growth) != 3:
        raise RuntimeError(
            f"{op}: scale and growth_tracker come together, and growth has 3 numbers; got "
            f"{len(growth)}"
        )
    if scale is not None:
        found = (scale.numel(), scale.dtype, growth_tracker.numel(), growth_tracker.dtype)
        if found != (1, torch.float32, 1, torch.int32):
            raise RuntimeError(f"{op}: scale and growth_tracker must be one float32 and one int32")
        check_writable(op, (scale, growth_tracker))


def _fake_grad_norm_decide_(grads, *arguments):
    given = GradNormDecideArguments(*arguments)
    tensors = [x for x in given if isinstance(x, Tensor)]
    check_same_device("grad_norm_decide_", (*grads, *tensors))
    total_norm, norms, nonfinite = fake_grad_norm(grads, given.numbers)
    decided = fake_guard_decide_(*given.about(total_norm, norms))
    return total_norm, norms, nonfinite, *decided


_library.register("grad_norm_decide_", _fake_grad_norm_decide_, writes=True)
