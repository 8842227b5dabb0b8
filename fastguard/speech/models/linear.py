"""Linear layers whose float32 products are the faster library's of the two that torch has."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguard._compiling import is_exporting
from fastguard.env import processor


class Linear(nn.Linear):
    """`nn.Linear` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; in float32 training on AMD's CPUs by oneDNN where torch has MKL do it.

    MKL has slower kernels for CPUs that are not Intel's. oneDNN has not: products of 250 rows ran
    at 180 to 200 GFLOP/s against MKL's 135 to 160 (two cores of an EPYC).

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or None.

    Returns:
        (..., O), equal to F.linear's up to rounding.
    """
    plain = torch.compiler.is_compiling() or is_exporting() or torch.jit.is_tracing()
    if (
        plain
        or not torch.is_grad_enabled()
        or not weight.requires_grad
        or not has_faster_products()
    ):
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    served = all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 and t.numel()
        for t in tensors
    )
    if not served or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


@functools.cache
def has_faster_products() -> bool:
    """Whether torch has MKL for products, oneDNN beside it, and a CPU on which MKL is slower."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    # Private, but what torch.compile makes of a linear layer since torch 2.0.
    return libraries and "AMD" in processor() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias, of (M, K) and (N, K) in any layout."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        rows = x.reshape(-1, x.size(-1))
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        x, weight = ctx.saved_tensors
        rows, grad_rows = (t.reshape(-1, t.size(-1)) for t in (x, grad_output))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_rows, weight.t()).view(x.shape)
        # oneDNN is the slower one where the product has more rows than columns.
        tall = weight.size(0) > weight.size(1)
        grad_weight = grad_rows.t() @ rows if tall else _product(grad_rows.t(), rows.t())
        return grad_x, grad_weight, grad_rows.sum(0) if ctx.has_bias else None
