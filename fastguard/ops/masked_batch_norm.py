"""``masked_batch_norm``: batch normalisation over valid frames, with SiLU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._autograd import Differentiable, computed_dtype, served_by_cpu
from ._checks import check_same_device


class MaskedBatchNorm(NamedTuple):
    output: Tensor  #: (B, T, C), dtype of x
    mean: Tensor  #: (C,), the mean that was used
    var: Tensor  #: (C,), the biased variance that was used


def masked_batch_norm(
    x: Tensor,
    padding_mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    training: bool,
    silu: bool,
) -> MaskedBatchNorm:
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) of the frames that are valid.

    Statistics take two passes: E[x^2] - E[x]^2 cancels if the mean is large compared with the
    deviation. There is no host-device sync.

    The CPU kernel serves row-major memory. The reference serves other layouts, which it need not
    copy, and other devices.

    Args:
        x: (B, T, C), float32, float64, bfloat16 or float16. Not read where it is padding.
        padding_mask: bool (B, T), True = padding.
        weight, bias: (C,).
        running_mean, running_var: (C,), of the dtype of `weight`. They are used, and not changed,
            where `training` is False or fewer than two frames are valid.
        eps: added to the variance.
        silu: whether ``silu`` follows.

    Returns:
        Padding gets `bias` (with `silu`, its SiLU). `output` alone is differentiable, by x, weight
        and bias.
    """
    args = (x, padding_mask, weight, bias, running_mean, running_var, eps, training, silu)
    wide = computed_dtype(x)
    fits = x.is_contiguous() and weight.dtype == running_mean.dtype == wide
    if not fits or not served_by_cpu(x, weight, bias):
        return masked_batch_norm_ref(*args)
    return MaskedBatchNorm(*_masked_batch_norm(*args))


def masked_batch_norm_ref(
    x: Tensor,
    padding_mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    training: bool,
    silu: bool,
) -> MaskedBatchNorm:
    """:func:`masked_batch_norm` in plain torch."""
    padding_mask = padding_mask[:, :, None]
    # Filled, not multiplied: 0 * NaN is NaN.
    frames = x.to(weight.dtype).masked_fill(padding_mask, 0.0)
    mean, var = running_mean, running_var
    if training:
        count = (~padding_mask).sum().to(frames.dtype)
        enough = count >= 2
        mean = torch.where(enough, frames.sum((0, 1)) / count, mean)
    centred = (frames - mean).masked_fill(padding_mask, 0.0)
    if training:
        var = torch.where(enough, centred.square().sum((0, 1)) / count, var)
    output = torch.addcmul(bias, centred, weight * torch.rsqrt(var + eps)).to(x.dtype)
    output = F.silu(output) if silu else output
    return MaskedBatchNorm(output, mean.detach(), var.detach())


def masked_batch_norm_backward_ref(
    grad_output, x, padding_mask, weight, bias, mean, var, eps, training, silu
):
    """The backward operator's gradients of x, weight and bias, by autograd of the reference."""
    args = (padding_mask, weight, bias, mean, var, eps, training, silu)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        output = masked_batch_norm_ref(leaves[0], padding_mask, *leaves[1:], *args[3:]).output
    return torch.autograd.grad(output, leaves, grad_output)


def _save(ctx, inputs, output):
    x, padding_mask, weight, bias, _, _, *ctx.options = inputs
    _, mean, var = output
    ctx.save_for_backward(x, padding_mask, weight, bias, mean, var)


def _backward(ctx, operator, grad_output):
    grad_x, grad_weight, grad_bias = operator(grad_output, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, grad_weight, grad_bias


def _fake_masked_batch_norm(x, padding_mask, weight, bias, running_mean, running_var, *options):
    check_same_device(
        "masked_batch_norm", (x, padding_mask, weight, bias, running_mean, running_var)
    )
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty_like(running_mean),
        torch.empty_like(running_var),
    )


def _fake_masked_batch_norm_backward(grad_output, x, padding_mask, weight, bias, *rest):
    check_same_device(
        "masked_batch_norm_backward", (grad_output, x, padding_mask, weight, bias, *rest[:2])
    )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


_library.register("masked_batch_norm", _fake_masked_batch_norm)
_library.register("masked_batch_norm_backward", _fake_masked_batch_norm_backward)
_masked_batch_norm = Differentiable("masked_batch_norm", _save, _backward, arguments=4)
