"""fastguard's operators: wrappers, fake kernels and pure-torch references.

The only file that touches ``torch.ops.fastguard``. Each operator has a reference with the same
signature, ``<name>_ref``: the tests compare against it, and it serves where no kernel was built
for a device.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Verdict(enum.IntEnum):
    """What becomes of a step; the numbers are those of csrc/decide.h."""

    APPLY = 0
    CLIP = 1
    SKIP_NONFINITE = 2
    SKIP_OUTLIER = 3

    @property
    def skipped(self) -> bool:
        return self >= Verdict.SKIP_NONFINITE


class GradNorm(NamedTuple):
    """What one read of N gradients says about them."""

    #: L2 norm over all elements, float64, shape (). NaN or Inf where an element is; Inf also where
    #: the sum of squares of finite float64 elements overflows.
    total_norm: Tensor
    #: L2 norm of each tensor, float64, shape (N,).
    norms: Tensor
    #: Number of NaN and Inf elements of each tensor, int64, shape (N,).
    nonfinite_counts: Tensor
    #: (tensor, flat row-major index) of the first NaN or Inf element, int64, shape (2,); (-1, -1)
    #: if there is none.
    first_nonfinite: Tensor


def _has_kernel(tensor: Tensor, cuda: bool) -> bool:
    if tensor.device.type == "cuda":
        return cuda and _native.cuda_problem is None
    return tensor.device.type == "cpu" and _native.cpu_problem is None


def _check_dtypes(op: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: tensor {i} has dtype {tensor.dtype}; float32, float64, bfloat16 and "
                "float16 are supported"
            )


# --- grad_norm ----------------------------------------------------------------------------------


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> GradNorm:
    """Global norm, norm of each tensor and place of the non-finite elements, from one read.

    Accumulates in float64: finite float32, bfloat16 and float16 elements can not overflow, however
    large. The result does not depend on the number of threads, nor on the CPU's instruction set.

    Args:
        grads: N >= 0 dense tensors of one device and any shape, stride and dtype of float32,
            float64, bfloat16, float16; mixed dtypes, empty and 0-d tensors are fine.

    Raises:
        RuntimeError: a tensor of another dtype, or tensors on several devices.
    """
    grads = list(grads)
    if grads and _has_kernel(grads[0], cuda=False):
        return GradNorm(*torch.ops.fastguard.grad_norm.default(grads))
    return grad_norm_ref(grads)


@torch.no_grad()
def grad_norm_ref(grads: Sequence[Tensor]) -> GradNorm:
    """:func:`grad_norm` in plain torch: several reads of every tensor, and copies in float64."""
    _check_dtypes("grad_norm", grads)
    device = grads[0].device if grads else None
    norms = torch.zeros(len(grads), dtype=torch.float64, device=device)
    counts = torch.zeros(len(grads), dtype=torch.int64, device=device)
    first = torch.full((2,), -1, dtype=torch.int64, device=device)
    # Backwards, so that the first tensor with a bad element is the last to write its place.
    for i, grad in reversed(list(enumerate(grads))):
        if grad.numel() == 0:
            continue
        norms[i] = grad.to(torch.float64).square().sum().sqrt()
        bad = ~grad.isfinite().flatten()
        counts[i] = bad.sum()
        place = torch.stack([torch.full_like(counts[i], i), bad.int().argmax()])
        first = torch.where(counts[i] > 0, place, first)
    return GradNorm(norms.square().sum().sqrt(), norms, counts, first)


def _fake_grad_norm(grads):
    n = len(grads)
    like = grads[0]
    return (
        like.new_empty((), dtype=torch.float64),
        like.new_empty(n, dtype=torch.float64),
        like.new_empty(n, dtype=torch.int64),
        like.new_empty(2, dtype=torch.int64),
    )


# --- decide -------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What to do with the gradients, on the device of the norm."""

    #: Factor for the gradients, float64, shape (); exactly 1 unless the verdict is CLIP.
    clip_coef: Tensor
    #: A :class:`Verdict`, int64, shape ().
    verdict: Tensor


def decide(total_norm: Tensor, max_norm: float, skip_norm: float) -> Decision:
    """Apply, clip or skip, without a host synchronisation.

    A non-finite norm is skipped, a norm above ``skip_norm`` is skipped, a norm above ``max_norm``
    is clipped with torch's coefficient ``max_norm / (total_norm + 1e-6)``.

    Args:
        total_norm: float64, shape (), as :func:`grad_norm` returns it.
        max_norm, skip_norm: thresholds; ``inf`` turns one off.

    Raises:
        RuntimeError: ``total_norm`` is not a float64 scalar tensor.
    """
    if _has_kernel(total_norm, cuda=True):
        return Decision(*torch.ops.fastguard.decide.default(total_norm, max_norm, skip_norm))
    return decide_ref(total_norm, max_norm, skip_norm)


def decide_ref(total_norm: Tensor, max_norm: float, skip_norm: float) -> Decision:
    """:func:`decide` in plain torch."""
    if total_norm.dtype != torch.float64 or total_norm.dim() != 0:
        raise RuntimeError(
            "decide: total_norm must be a float64 tensor of shape (), as grad_norm returns it; got "
            f"{total_norm.dtype} of shape {tuple(total_norm.shape)}"
        )
    clip_coef = torch.full_like(total_norm, max_norm) / (total_norm + 1e-6)
    verdict = torch.where(clip_coef < 1, int(Verdict.CLIP), int(Verdict.APPLY))
    verdict = torch.where(total_norm > skip_norm, int(Verdict.SKIP_OUTLIER), verdict)
    verdict = torch.where(total_norm.isfinite(), verdict, int(Verdict.SKIP_NONFINITE))
    return Decision(torch.where(verdict == Verdict.CLIP, clip_coef, 1.0), verdict)


def _fake_decide(total_norm, max_norm, skip_norm):
    return torch.empty_like(total_norm), total_norm.new_empty((), dtype=torch.int64)


# --- scale_ -------------------------------------------------------------------------------------


@torch.no_grad()
def scale_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """Multiply every gradient by ``clip_coef`` in place; write nothing when it is 1.

    The products are computed in float64, so that no coefficient underflows.

    Args:
        grads: N >= 0 tensors as for :func:`grad_norm`, none of which overlaps itself or another.
        clip_coef: float64, shape (), on the gradients' device, as :func:`decide` returns it.

    Raises:
        RuntimeError: a tensor of another dtype or device, or one that is expanded.
    """
    grads = list(grads)
    if grads and _has_kernel(grads[0], cuda=False):
        torch.ops.fastguard.scale_.default(grads, clip_coef)
        torch.autograd.graph.increment_version(grads)  # the dispatcher does not, for a list
    else:
        scale_ref_(grads, clip_coef)


@torch.no_grad()
def scale_ref_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """:func:`scale_` in plain torch; it writes a product with 1 too, lest the host wait."""
    _check_dtypes("scale_", grads)
    if clip_coef.dtype != torch.float64 or clip_coef.dim() != 0:
        raise RuntimeError(
            "scale_: clip_coef must be a float64 tensor of shape (), as decide returns it; got "
            f"{clip_coef.dtype} of shape {tuple(clip_coef.shape)}"
        )
    for grad in grads:
        grad.copy_(grad.to(torch.float64) * clip_coef)


def _fake_scale_(grads, clip_coef):
    return None


# --- what was built -----------------------------------------------------------------------------


def cpu_info() -> dict[str, str]:
    """What the CPU library was built with and which instruction set it chose; {} if not built."""
    return {} if _native.cpu_problem else _parse(torch.ops.fastguard.cpu_info.default())


def cuda_info() -> dict[str, str]:
    """What the CUDA library was built with; {} if it is not in use."""
    return {} if _native.cuda_problem else _parse(torch.ops.fastguard.cuda_info.default())


def _parse(info: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in info.splitlines())


if _native.cpu_problem is None:
    torch.library.register_fake("fastguard::grad_norm", _fake_grad_norm)
    torch.library.register_fake("fastguard::decide", _fake_decide)
    torch.library.register_fake("fastguard::scale_", _fake_scale_)
