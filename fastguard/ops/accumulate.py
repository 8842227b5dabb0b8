"""``accumulate_``: add the gradients of a micro-batch to sums, unless its verdict is a skip."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._checks import (
    check_dtypes,
    check_no_overlap,
    check_same_device,
    check_tensor,
    check_writable,
)
from .types import Verdict


@torch.no_grad()
def accumulate_(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    verdict: Tensor,
    window: Tensor,
    weight: float,
) -> None:
    """Add a micro-batch's gradients to the sums and count it, unless its verdict is a skip.

    Args:
        sums, grads: as many tensors, equal in shape in pairs; gradients of the dtypes of
            :func:`grad_norm`, sums of float64 for float64 gradients, of float32 for all others.
        verdict: int64, shape ().
        window: float64, shape (3,): the number of micro-batches, the number of good ones, and the
            weight of the good ones.
        weight: the weight of this micro-batch, e.g. its number of samples.

    Raises:
        RuntimeError: the lists do not match, or a sum is expanded or has another dtype.

    The operator does not look for sums that share memory: GradGuard allocates one per parameter.
    """
    if _library.has_kernel(window):
        torch.ops.fastguard.accumulate_.default(sums, grads, verdict, window, weight)
        if sums:
            _library.count_writes(sums)
    else:
        accumulate_ref_(sums, grads, verdict, window, weight)


@torch.no_grad()
def accumulate_ref_(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    verdict: Tensor,
    window: Tensor,
    weight: float,
) -> None:
    """:func:`accumulate_` in plain torch."""
    _check_accumulate(sums, grads, verdict, window)
    good = verdict < int(Verdict.SKIP_NONFINITE)
    for total, grad in zip(sums, grads, strict=True):
        total.copy_(torch.where(good, total + grad, total))
    added = torch.where(good, torch.full_like(window[0], weight), 0.0)  # 0 * inf is NaN
    window.add_(torch.stack([torch.ones_like(window[0]), good.double(), added]))


def _check_accumulate(sums, grads, verdict, window) -> None:
    """Twin: check_accumulate in csrc/checks.h."""
    op = "accumulate_"
    check_tensor(op, "verdict", verdict, torch.int64)
    check_tensor(op, "window", window, torch.float64, 3)
    if len(sums) != len(grads):
        raise RuntimeError(
            f"{op}: as many gradients as sums are needed; got {len(sums)} sums and {len(grads)} "
            "gradients"
        )
    for tensors in (sums, grads):
        check_dtypes(op, tensors)
    for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        if total.shape != grad.shape or total.dtype != wide:
            raise RuntimeError(
                f"{op}: sum {i} must have its gradient's shape, and be float64 for a float64 "
                "gradient, float32 for any other"
            )
    check_same_device(op, (*sums, *grads, verdict, window))
    check_no_overlap(op, sums)
    check_writable(op, (*sums, window))


def _fake_accumulate_(sums, grads, verdict, window, weight):
    check_same_device("accumulate_", (*sums, *grads, verdict, window))


_library.register("accumulate_", _fake_accumulate_, writes=True)
