"""Gradient clipping with torch's signature, which decides before it writes."""

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import ops

_SMALLEST_FACTOR = torch.finfo(torch.float32).tiny


def check_threshold(name: str, value: float) -> float:
    """``value`` as a float; ValueError if it is negative or NaN (torch flips signs, writes NaN)."""
    value = float(value)
    if not value >= 0:
        raise ValueError(f"{name} must be a number >= 0 (inf turns it off), got {value}")
    return value


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of the gradients in place; a drop-in for ``torch.nn.utils.clip_grad_norm_``.

    The same coefficient, ``max_norm / (total_norm + 1e-6)``, and these differences:

    - a non-finite norm leaves every gradient as it is (torch writes NaN and zeros over the
      finite ones, and with them over the trace of what went wrong);
    - for the 2-norm, finite float32, bfloat16 and float16 gradients never overflow it, and it is
      at least float32 (torch zeroes fp16 gradients with a norm above 65504);
    - nothing is written when the coefficient is 1 (gradients on the CPU; elsewhere that would need
      the host to wait, so they are multiplied by 1);
    - a parameter listed twice counts once.

    Args:
        parameters: a tensor or an iterable of tensors; those without ``grad`` are passed over.
        max_norm: largest norm let through, >= 0.
        norm_type: order of the norm, ``inf`` included; orders other than 2 use torch's kernels.
        error_if_nonfinite: raise on a NaN or Inf norm, with every gradient untouched.
        foreach: for the orders that torch's kernels compute; without effect for the 2-norm.

    Returns:
        The total norm before clipping, shape (), on the first gradient's device; float32, or
        float64 where a gradient is.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
    """
    max_norm = check_threshold("max_norm", max_norm)
    grads = gradients_of(parameters)
    if not grads:
        return torch.tensor(0.0)
    total_norm = _total_norm(grads, float(norm_type), foreach)
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is "
            f"{total_norm.item()}, so it cannot be clipped. The gradients are unchanged; with "
            "`error_if_nonfinite=False` they would be left so without this error")
    scale_(grads, ops.decide(total_norm, max_norm, skip_norm=math.inf).clip_coef)
    double = any(grad.dtype == torch.float64 for grad in grads)
    return total_norm if double else total_norm.to(torch.float32)


def gradients_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients that exist, each parameter once."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    unique = dict.fromkeys(parameters)
    if isinstance(parameters, types.GeneratorType) and not unique:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.",
                      stacklevel=3)
    return [p.grad for p in unique if p.grad is not None]


def _total_norm(grads: Sequence[Tensor], norm_type: float, foreach: bool | None) -> Tensor:
    """float64, shape (), on the first gradient's device."""
    if norm_type != 2.0 or not all(map(_is_plain, grads)):
        return torch.nn.utils.get_total_norm(grads, norm_type, foreach=foreach).to(torch.float64)
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    norms = [ops.grad_norm(group).total_norm.to(grads[0].device) for group in by_device.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _is_plain(grad: Tensor) -> bool:
    """Strided and not a subclass: sparse gradients and DTensors go to torch's own reductions."""
    return grad.layout == torch.strided and type(grad) is Tensor


def scale_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """Multiply the gradients by ``clip_coef``, float64 of shape ()."""
    if clip_coef.device.type != "cpu":
        for grad in grads:
            grad.mul_(clip_coef.to(grad.device))
        return
    if clip_coef == 1:
        return
    # Gradients of 1e38 need a factor that fp32 can only hold as a subnormal, with few bits left.
    factors = [clip_coef] if clip_coef >= _SMALLEST_FACTOR else [clip_coef.sqrt()] * 2
    for factor in factors:
        # A tensor, not a Python float: that one would be rounded to the gradients' dtype first.
        torch._foreach_mul_(grads, factor)
