"""``glu_depthwise``: a gated linear unit and a depthwise convolution over frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._autograd import Differentiable, computed_dtype, served_by_cpu
from ._checks import check_same_device

#: The longest filter that the CPU kernel takes. The reference serves longer ones.
MOST_TAPS = 65


def glu_depthwise(x: Tensor, padding_mask: Tensor, weight: Tensor) -> Tensor:
    """Filter ``GLU(x)`` over frames, one filter for each channel; differentiable.

    The middle of a conformer's convolution module (Gulati et al. 2020, arXiv 2005.08100). The CPU
    kernel keeps the gated frames in registers and cache; they never exist as a tensor. The
    reference serves other devices.

    Args:
        x: (B, T, 2 C), float32, float64, bfloat16 or float16: C values, then C logits of their
            gates. Not read where it is padding.
        padding_mask: bool (B, T), True = padding, which counts as zeros, as do frames beyond both
            ends.
        weight: (C, 1, K), K odd, as `nn.Conv1d` of C groups has it; any floating-point dtype.

    Returns:
        (B, T, C), dtype of x.
    """
    wide = computed_dtype(x)
    fits = weight.size(2) <= MOST_TAPS and torch.promote_types(weight.dtype, wide) == wide
    if not fits or not served_by_cpu(x, weight):
        return glu_depthwise_ref(x, padding_mask, weight)
    return _glu_depthwise(x, padding_mask, weight.squeeze(1).to(wide))


def glu_depthwise_ref(x: Tensor, padding_mask: Tensor, weight: Tensor) -> Tensor:
    """:func:`glu_depthwise` in plain torch."""
    gated = F.glu(x.masked_fill(padding_mask[:, :, None], 0.0), dim=-1)
    # conv1d would copy to (B, C, T) and back. A channels-last image of width 1 needs no copy.
    image = gated.transpose(1, 2).unsqueeze(3)  # (B, C, T, 1)
    channels, _, taps = weight.shape
    filters = weight.to(x.dtype).unsqueeze(3)
    image = F.conv2d(image, filters, padding=(taps // 2, 0), groups=channels)
    return image.squeeze(3).transpose(1, 2)


def glu_depthwise_backward_ref(
    grad_output: Tensor, x: Tensor, padding_mask: Tensor, weight: Tensor
):
    """The backward operator's gradients of x and of weight (C, K), by autograd of the reference."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        output = glu_depthwise_ref(leaves[0], padding_mask, leaves[1].unsqueeze(1))
    return torch.autograd.grad(output, leaves, grad_output)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, operator, grad_output):
    grad_x, grad_weight = operator(grad_output, *ctx.saved_tensors)
    return grad_x, None, grad_weight


def _fake_glu_depthwise(x, padding_mask, weight):
    check_same_device("glu_depthwise", (x, padding_mask, weight))
    batch, frames, width = x.shape
    return torch.empty(batch, frames, width // 2, dtype=x.dtype, device=x.device)


def _fake_glu_depthwise_backward(grad_output, x, padding_mask, weight):
    check_same_device("glu_depthwise_backward", (grad_output, x, padding_mask, weight))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


_library.register("glu_depthwise", _fake_glu_depthwise)
_library.register("glu_depthwise_backward", _fake_glu_depthwise_backward)
_glu_depthwise = Differentiable("glu_depthwise", _save, _backward, arguments=3)
