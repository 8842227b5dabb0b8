"""Gradient clipping with torch's signature, which decides before it writes."""

import math
import types
import warnings
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from . import ops


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
    groups, foreign = _group(grads)
    total_norm = _total_norm(groups, foreign, float(norm_type), foreach)
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is "
            f"{total_norm.item()}, so it cannot be clipped. The gradients are unchanged; with "
            "`error_if_nonfinite=False` they would be left so without this error"
        )
    clip_coef = ops.decide(total_norm, max_norm, skip_norm=math.inf).clip_coef
    if clip_coef.device.type != "cpu" or clip_coef != 1:  # on the CPU a look costs nothing
        for device, group in groups.items():
            ops.scale_(group, clip_coef.to(device))
        for grad in foreign:
            grad.mul_(clip_coef.to(grad.device))
    return total_norm if torch.float64 in {g.dtype for g in grads} else total_norm.float()


def gradients_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients that exist, each parameter once."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    unique = {id(p): p for p in parameters}
    if isinstance(parameters, types.GeneratorType) and not unique:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
        )
    return [grad for p in unique.values() if (grad := p.grad) is not None]


def _total_norm(
    groups: dict[torch.device, list[Tensor]],
    foreign: list[Tensor],
    norm_type: float,
    foreach: bool | None,
) -> Tensor:
    """float64, shape (), on the first group's device."""
    # Of a sparse gradient the values count, duplicates added up.
    foreign = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in foreign]
    if norm_type != 2.0 or any(type(grad) is not Tensor for grad in foreign):
        everything = [*chain(*groups.values()), *foreign]
        return torch.nn.utils.get_total_norm(everything, norm_type, foreach=foreach).double()
    lists = [*groups.values(), *([grad] for grad in foreign)]
    norms = [ops.grad_norm(grads).total_norm for grads in lists]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _group(grads: list[Tensor]) -> tuple[dict[torch.device, list[Tensor]], list[Tensor]]:
    """Strided gradients by device; and the foreign: sparse ones, and subclasses such as DTensor,
    whose reductions are torch's own."""
    if (
        len({g.device for g in grads}) == 1
        and {g.layout for g in grads} == {torch.strided}
        and set(map(type, grads)) == {Tensor}
    ):
        return {grads[0].device: grads}, []
    groups: dict[torch.device, list[Tensor]] = {}
    foreign = []
    for grad in grads:
        if grad.layout == torch.strided and type(grad) is Tensor:
            groups.setdefault(grad.device, []).append(grad)
        else:
            foreign.append(grad)
    return groups, foreign
