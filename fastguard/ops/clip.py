"""``clip_``: measure, decide and scale in place, in one launch on CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._checks import check_no_overlap
from .decide import decide_ref, fake_decide
from .grad_norm import fake_grad_norm, grad_norm_ref
from .scale import scale_ref_
from .types import Decision, GradNorm


@torch.no_grad()
def clip_(
    grads: Sequence[Tensor], max_norm: float, skip_norm: float, float32_norm: bool = False
) -> tuple[GradNorm, Decision]:
    """:func:`grad_norm`, :func:`decide` and :func:`scale_` in one; on CUDA in one launch.

    Args:
        grads: N >= 0 tensors as for :func:`scale_`.
        float32_norm: decide by the norm rounded to float32, unless that is Inf. A caller who gets
            the norm in float32 then comes to the same decision.
        max_norm, skip_norm: as for :func:`decide`.

    Raises:
        RuntimeError: a tensor of another dtype or device, or one that is expanded; nothing is
            written then.
    """
    grads = grads if isinstance(grads, list) else list(grads)
    if grads and _library.has_kernel(grads[0]):
        found = torch.ops.fastguard.clip_.default(grads, max_norm, skip_norm, float32_norm)
        measured, decision = GradNorm(*found[:3]), Decision(*found[3:])
        if decision.clip_coef.device.type != "cpu" or decision.clip_coef != 1:
            _library.count_writes(grads)
        return measured, decision
    found = clip_ref_(grads, max_norm, skip_norm, float32_norm)
    return GradNorm(*found[:3]), Decision(*found[3:])


@torch.no_grad()
def clip_ref_(
    grads: Sequence[Tensor], max_norm: float, skip_norm: float, float32_norm: bool
) -> tuple[Tensor, ...]:
    """The operator behind :func:`clip_` in plain torch."""
    check_no_overlap("clip_", grads)
    measured = grad_norm_ref(grads)
    norm = measured.total_norm
    if float32_norm:
        rounded = norm.float().double()
        norm = torch.where(rounded.isfinite(), rounded, norm)
    decision = decide_ref(norm, max_norm, skip_norm)
    if decision.clip_coef.device.type != "cpu" or decision.clip_coef != 1:
        scale_ref_(grads, decision.clip_coef)
    return *measured, *decision


def _fake_clip_(grads, max_norm, skip_norm, float32_norm):
    measured = fake_grad_norm(grads)
    return *measured, *fake_decide(measured[0], max_norm, skip_norm)


_library.register("clip_", _fake_clip_, writes=True)
