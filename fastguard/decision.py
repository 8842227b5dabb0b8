"""What a decision is made of: the statistics, the loss, and the factor that undoes a scale."""

import math

import torch
from torch import Tensor

from . import ops
from .clip import is_dtensor

WINDOW = 128  # accepted norms whose median arms skip_norm; llm.c's and OLMo-core's window


def fresh_statistics(device: torch.device) -> ops.Statistics:
    return ops.Statistics(
        torch.zeros(3, dtype=torch.float64, device=device),
        torch.zeros(WINDOW, dtype=torch.float64, device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
    )


def scalar(loss: Tensor | float | None, device: torch.device) -> Tensor | None:
    if loss is None:
        return None
    if is_dtensor(loss):
        loss = loss.full_tensor()
    if not isinstance(loss, Tensor):
        try:
            return torch.full((), float(loss), dtype=torch.float64, device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss must be one real number, got {loss!r}") from error
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"loss must be one real number, got a {loss.dtype} tensor of shape {tuple(loss.shape)}"
        )
    return loss.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def unscaling(scale: Tensor | None, weight: Tensor | float, device: torch.device) -> Tensor | None:
    """The factor that undoes the GradScaler's scale and makes a sum a mean; None for 1."""
    if scale is None and not isinstance(weight, Tensor):
        if weight == 1.0:
            return None
        return torch.full((), 1 / weight, dtype=torch.float64, device=device)
    return (weight if scale is None else scale * weight).reciprocal()


def discarded(measured, unscale, loss) -> ops.GuardDecision:
    """The decision about a batch that a rollback passes over."""
    one = torch.ones_like(measured.total_norm)
    verdict = torch.full_like(one, int(ops.Verdict.SKIP_ROLLBACK), dtype=torch.int64)
    norm = measured.total_norm if unscale is None else measured.total_norm * unscale
    record = [verdict.double(), one, norm, one * math.inf, one * math.nan if loss is None else loss]
    return ops.GuardDecision(one, verdict, torch.stack(record))
