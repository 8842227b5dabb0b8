"""``scale_``: multiply gradients in place by one factor, or by one each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._checks import check_dtypes, check_no_overlap, check_same_device, check_writable


@torch.no_grad()
def scale_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """Multiply every gradient by ``clip_coef`` in place; write nothing where it is 1.

    The products are computed in float64, so that no coefficient underflows.

    Args:
        grads: N >= 0 tensors as for :func:`grad_norm`, none of which overlaps itself or another.
        clip_coef: float64, shape () for one factor or (N,) for one each, on their device.

    Raises:
        RuntimeError: a tensor of another dtype or device, or one that is expanded.

    Tensors that share memory are not looked for, because each step has new gradients. Shared
    elements may be multiplied once or twice. Callers must pass each tensor once.
    """
    grads = list(grads)
    if grads and _library.has_kernel(grads[0]):
        torch.ops.fastguard.scale_.default(grads, clip_coef)
        _library.count_writes(grads)
    else:
        scale_ref_(grads, clip_coef)


@torch.no_grad()
def scale_ref_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """:func:`scale_` in plain torch; it also writes products with 1, to avoid a sync."""
    check_dtypes("scale_", grads)
    check_no_overlap("scale_", grads)
    check_same_device("scale_", (*grads, clip_coef))
    check_writable("scale_", grads)
    fits = clip_coef.dtype == torch.float64 and clip_coef.is_contiguous()
    if not fits or clip_coef.shape not in ((), (len(grads),)):
        raise RuntimeError(
            f"scale_: clip_coef must be a float64 tensor of shape () or ({len(grads)},), as decide "
            f"returns it; got {clip_coef.dtype} of shape {tuple(clip_coef.shape)}"
        )
    for grad, coef in zip(grads, clip_coef.expand(len(grads)), strict=True):
        grad.copy_(grad.to(torch.float64) * coef)


def _fake_scale_(grads, clip_coef):
    check_same_device("scale_", (*grads, clip_coef))


_library.register("scale_", _fake_scale_, writes=True)
