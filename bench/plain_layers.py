"""The teacher's layers in torch's operators, for the rows that do without fastguard."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguard.ops.masked_batch_norm import masked_batch_norm_ref
from fastguard.speech.models.layers import MaskedBatchNorm1d
from fastguard.speech.models.teacher import AddLayerNorm, FeedForward, GatedDepthwiseConv1d


def in_plain_torch(model: nn.Module) -> nn.Module:
    """The same model, whose layers call none of fastguard's operators; attention stays."""
    forwards = {
        AddLayerNorm: add_layer_norm,
        FeedForward: feed_forward,
        GatedDepthwiseConv1d: gated_depthwise,
        MaskedBatchNorm1d: batch_norm,
    }
    for module in model.modules():
        if forward := forwards.get(type(module)):
            module.forward = MethodType(forward, module)
    return model


def add_layer_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One pass over memory for dropout and addition, and torch's fused LayerNorm."""
    if scale is not None:
        x = torch.addcmul(x, branch, scale[:, None, :].to(branch.dtype), value=alpha)
    elif branch is not None:
        x = torch.add(x, branch, alpha=alpha)
    return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def feed_forward(module: FeedForward, x: Tensor) -> Tensor:
    return module.down(F.silu(module.up(x)))


def gated_depthwise(conv: nn.Conv1d, x: Tensor, padding_mask: Tensor) -> Tensor:
    """As a channels-last image of width 1, which needs no copy to (B, C, T) and back."""
    gated = F.glu(x, dim=-1).masked_fill(padding_mask[:, :, None], 0.0)
    image = gated.transpose(1, 2).unsqueeze(3)
    padding = (*conv.padding, 0)
    image = F.conv2d(image, conv.weight.unsqueeze(3), padding=padding, groups=conv.groups)
    return image.squeeze(3).transpose(1, 2)


def batch_norm(
    norm: MaskedBatchNorm1d, x: Tensor, padding_mask: Tensor, silu: bool = False
) -> Tensor:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.training, silu)
    frames = x.transpose(1, 2)
    output, mean, var = masked_batch_norm_ref(
        frames, padding_mask, norm.weight, norm.bias, *statistics
    )
    norm.update_running_statistics(mean, var, padding_mask)
    return output.transpose(1, 2)
