"""``add_layer_norm``: a residual connection and the layer normalisation that follows it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._autograd import Differentiable, computed_dtype, served_by_cpu
from ._checks import check_same_device


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    alpha: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``sum = x + alpha * scale * branch`` and its layer normalisation, differentiable.

    Ba et al. 2016 (arXiv 1607.06450). Dropout of whole channels is a `scale` of zeros and ones, and
    ``1 / (1 - p)`` in `alpha`. The CPU kernel passes over memory once, forward and backward. The
    reference serves other devices.

    Args:
        x: (B, T, C), float32, float64, bfloat16 or float16.
        branch: (B, T, C), or None: then the normalisation of `x` alone. The reference serves one of
            another dtype.
        scale: (B, C), factors that are no part of the graph, or None for ones.
        weight, bias: (C,), any floating-point dtype.
        eps: added to the variance.

    Returns:
        The sum (B, T, C), of the dtype that ``x + branch`` has, and the normalised frames, likewise
        (float32 under CUDA's autocast, as `F.layer_norm` there). Without a branch the sum is `x`.
    """
    wide = computed_dtype(x)
    others = [t for t in (branch, weight, bias) if t is not None]
    same = branch is None or branch.dtype == x.dtype
    fits = x.size(2) > 0 and all(torch.promote_types(t.dtype, wide) == wide for t in others)
    if not (same and fits and served_by_cpu(x, *others)):
        return add_layer_norm_ref(x, branch, scale, weight, bias, alpha, eps)
    scale = None if scale is None else scale.to(wide)
    total, normed, *_ = _add_layer_norm(
        x, branch, scale, weight.to(wide), bias.to(wide), alpha, eps
    )
    return (x if branch is None else total), normed


def add_layer_norm_ref(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    alpha: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` in plain torch."""
    wide = computed_dtype(x)
    total = x
    if branch is not None:
        factor = alpha if scale is None else alpha * scale.to(wide)[:, None, :]
        total = x.to(wide) + factor * branch.to(wide)
        total = total.to(torch.promote_types(x.dtype, branch.dtype))
    shape = (x.size(2),)
    normed = F.layer_norm(total.to(wide), shape, weight.to(wide), bias.to(wide), eps)
    if total.is_cuda and torch.is_autocast_enabled("cuda"):
        return total, normed
    return total, normed.to(total.dtype)


def add_layer_norm_backward_ref(
    grad_sum, grad_normed, total, scale, weight, mean, rstd, alpha, has_branch
):
    """The backward operator's gradients of x, branch, weight and bias, by the derivative's formula.

    The operator gets the sum. Autograd would have to start from what it was made of.
    """
    wide = computed_dtype(total)
    mean, rstd = (of_row.view(*total.shape[:2], 1) for of_row in (mean, rstd))
    normalised, upstream = (total.to(wide) - mean) * rstd, grad_normed.to(wide)
    grad = upstream * weight
    mean_grad, mean_product = (g.mean(2, keepdim=True) for g in (grad, grad * normalised))
    grad_x = rstd * (grad - mean_grad - normalised * mean_product)
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(wide)
    grad_branch = total.new_empty(0)
    if has_branch:
        factor = alpha if scale is None else alpha * scale[:, None, :]
        grad_branch = (grad_x * factor).to(total.dtype)
    grad_weight, grad_bias = (upstream * normalised).sum((0, 1)), upstream.sum((0, 1))
    return grad_x.to(total.dtype), grad_branch, grad_weight, grad_bias


def _save(ctx, inputs, output):
    x, branch, scale, weight, _, ctx.alpha, _ = inputs
    total, _, mean, rstd = output
    ctx.has_branch = branch is not None
    ctx.save_for_backward(total if ctx.has_branch else x, scale, weight, mean, rstd)


def _backward(ctx, operator, grad_sum, grad_normed):
    total, scale, weight, mean, rstd = ctx.saved_tensors
    if not ctx.has_branch:
        grad_sum = None  # of a result without elements
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    args = (grad_sum, grad_normed, total, scale, weight, mean, rstd, ctx.alpha, ctx.has_branch)
    grad_x, grad_branch, grad_weight, grad_bias = operator(*args)
    return grad_x, grad_branch if ctx.has_branch else None, None, grad_weight, grad_bias


def _fake_add_layer_norm(x, branch, scale, weight, bias, alpha, eps):
    check_same_device("add_layer_norm", (x, branch, scale, weight, bias))
    batch, frames, _ = x.shape
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = normed.new_empty(0) if branch is None else torch.empty_like(normed)
    of_row = torch.empty(batch * frames, dtype=computed_dtype(x), device=x.device)
    return total, normed, of_row, torch.empty_like(of_row)


def _fake_add_layer_norm_backward(
    grad_sum, grad_normed, total, scale, weight, mean, rstd, alpha, has_branch
):
    tensors = (grad_sum, grad_normed, total, scale, weight, mean, rstd)
    check_same_device("add_layer_norm_backward", tensors)
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    of_branch = torch.empty_like(grad_x) if has_branch else grad_x.new_empty(0)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return grad_x, of_branch, grad_weight, torch.empty_like(grad_weight)


_library.register("add_layer_norm", _fake_add_layer_norm)
_library.register("add_layer_norm_backward", _fake_add_layer_norm_backward)
_add_layer_norm = Differentiable("add_layer_norm", _save, _backward, arguments=5, results=2)
