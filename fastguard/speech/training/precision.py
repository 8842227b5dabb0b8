"""The precision that a model computes in: autocast by name, and weights that need no cast."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from fastguard.optim import AdamW
from fastguard.speech.models.teacher import GatedDepthwiseConv1d

# config.py needs PyYAML. A command imports this module before it says which packages are absent.
if TYPE_CHECKING:
    from .config import Config

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch's autocast to ``precision``; "fp32" turns it off."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keeps_masters(config: Config, world_size: int) -> bool:
    """Whether a run's weights are bfloat16, with float32 masters in the optimizer.

    - torch's AdamW, of runs without the guard, has no masters.
    - Sums of micro-batches and of processes would be bfloat16, as their gradients are.
    """
    alone = world_size == 1 and config.grad_accumulation == 1
    return config.precision == "bf16" and config.guard.enabled and alone


def narrow_(model: nn.Module) -> None:
    """Round the weights to bfloat16 that autocast would round in every forward pass.

    What the model computes stays the same, bit by bit.
    """
    for module in model.modules():
        # The depthwise convolution reads its few weights as they are.
        rounded = isinstance(module, nn.Linear | nn.Conv1d | nn.MultiheadAttention)
        if rounded and not isinstance(module, GatedDepthwiseConv1d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()


def has_masters(optimizer: torch.optim.Optimizer | None) -> TypeGuard[AdamW]:
    """Whether the optimizer has float32 masters of the model's weights."""
    return isinstance(optimizer, AdamW) and optimizer.master_weights


def float32_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The model's state dict, with the masters in place of the weights that have one."""
    return optimizer.master_state_dict(model) if has_masters(optimizer) else model.state_dict()


def load_float32_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]
) -> None:
    """Load what :func:`float32_weights` gave, also for a run of another precision."""
    if has_masters(optimizer):
        optimizer.load_master_state_dict(model, weights)
    else:
        model.load_state_dict(weights)
