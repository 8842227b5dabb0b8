"""Small initial weights for models that explode in their first steps."""

from __future__ import annotations

import math

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# nn.MultiheadAttention splits the first when key or value have a width of their own.
INPUT_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@torch.no_grad()
def stable_init_(model: nn.Module, linear_std: float = 0.001, conv_scale: float = 0.5) -> nn.Module:
    """Re-initialise `model` in place and return it.

    ============================================  =====================================
    linear layers, input projections of attention weight ~ N(0, `linear_std`^2), bias = 0
    convolutions                                  weight *= `conv_scale`, bias kept
    normalisation, embedding, everything else     untouched
    ============================================  =====================================

    The defaults are the settings of ``train --stable``; the run they replace used 0.01
    and 1.0. They are a recipe, not a law: with residual branches close to zero a deep
    model starts as nearly the identity, but a small weight directly under a
    normalisation receives a gradient that is larger in proportion.

    Args:
        model: any module on any device; draws come from torch's global generator.
        linear_std: standard deviation of the linear weights, finite and >= 0.
        conv_scale: factor on the present convolution weights, finite and >= 0; applied
            again by each call.

    Raises:
        ValueError: `linear_std` or `conv_scale` is negative, NaN or infinite.
    """
    for name, number in (("linear_std", linear_std), ("conv_scale", conv_scale)):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {number}: try the default")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_linear_(module.weight, module.bias, linear_std)
        elif isinstance(module, nn.MultiheadAttention):
            for projection in INPUT_PROJECTIONS:
                weight = getattr(module, projection, None)
                if weight is not None:
                    init_linear_(weight, module.in_proj_bias, linear_std)
        elif isinstance(module, CONVOLUTIONS):
            module.weight.mul_(conv_scale)
    return model


def init_linear_(weight: nn.Parameter, bias: nn.Parameter | None, std: float) -> None:
    weight.normal_(0.0, std)
    if bias is not None:
        bias.zero_()
