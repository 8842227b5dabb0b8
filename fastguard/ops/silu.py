"""``silu``: x * sigmoid(x)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._autograd import Differentiable, served_by_cpu
from ._checks import check_same_device


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, differentiable (Elfwing et al. 2017, arXiv 1702.03118).

    Torch's in one pass over memory whose exponential is vectorised for every dtype, forward and
    backward. Where there is no CPU kernel for the tensor, it is torch's.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the shape and dtype of `x`. NaN stays NaN.
    """
    return _silu(x) if served_by_cpu(x) else silu_ref(x)


def silu_ref(x: Tensor) -> Tensor:
    """:func:`silu` in plain torch."""
    return F.silu(x)


def silu_backward_ref(grad_output: Tensor, x: Tensor) -> Tensor:
    """The backward operator's gradient, by autograd of the reference."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (grad_x,) = torch.autograd.grad(silu_ref(x), x, grad_output)
    return grad_x


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, operator, grad_output):
    return operator(grad_output, *ctx.saved_tensors)


def _fake_silu(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_silu_backward(grad_output, x):
    check_same_device("silu_backward", (grad_output, x))
    return _fake_silu(x)


_library.register("silu", _fake_silu)
_library.register("silu_backward", _fake_silu_backward)
_silu = Differentiable("silu", _save, _backward, arguments=1)
