"""``grad_norm``: the norm of all gradients and of each, and the NaNs and Infs, in one read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._checks import check_dtypes, check_same_device
from .types import GradNorm


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> GradNorm:
    """Global norm, norm of each tensor and place of the non-finite elements, from one read.

    Finite float32, bfloat16 and float16 elements cannot overflow and small ones do not vanish: the
    sum is in float64. CUDA first sums 32 elements at a time in float32, which may change the norm
    by a relative 1.1e-7. The result does not depend on the number of threads or blocks, nor on the
    CPU's instruction set.

    Args:
        grads: N >= 0 dense tensors of one device and any shape, stride and dtype of float32,
            float64, bfloat16, float16; mixed dtypes, empty and 0-d tensors are fine.

    Raises:
        RuntimeError: a tensor of another dtype, or tensors on several devices.
    """
    grads = list(grads)
    if grads and _library.has_kernel(grads[0]):
        return GradNorm(*torch.ops.fastguard.grad_norm.default(grads))
    return grad_norm_ref(grads)


@torch.no_grad()
def grad_norm_ref(grads: Sequence[Tensor], device: torch.device | None = None) -> GradNorm:
    """:func:`grad_norm` in plain torch: several reads of every tensor, and copies in float64.

    Args:
        grads: as for :func:`grad_norm`.
        device: the device of the results if there are no tensors.
    """
    check_dtypes("grad_norm", grads)
    check_same_device("grad_norm", grads)
    device = grads[0].device if grads else device
    norms = torch.zeros(len(grads), dtype=torch.float64, device=device)
    nonfinite = torch.zeros(len(grads), 3, dtype=torch.int64, device=device)
    nonfinite[:, 2] = -1
    for i, grad in enumerate(grads):
        if grad.numel() == 0:
            continue
        norms[i] = grad.to(torch.float64).square().sum().sqrt()
        bad = ~grad.isfinite().flatten()
        first = torch.where(bad.any(), bad.int().argmax(), -1)
        nonfinite[i] = torch.stack([grad.isnan().sum(), grad.isinf().sum(), first])
    return GradNorm(norms.square().sum().sqrt(), norms, nonfinite)


def fake_grad_norm(grads, like=None):
    n = len(grads)
    like = grads[0] if grads else like
    check_same_device("grad_norm", grads)
    return (
        like.new_empty((), dtype=torch.float64),
        like.new_empty(n, dtype=torch.float64),
        like.new_empty((n, 3), dtype=torch.int64),
    )


_library.register("grad_norm", fake_grad_norm)
