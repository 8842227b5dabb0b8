"""Gradient clipping with torch's signature, which decides before it writes."""

import math
import types
import warnings
from collections.abc import Iterable

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
    - for the 2-norm, finite float32, bfloat16 and float16 gradients are clipped however large they
      are, and the norm is at least float32 (torch zeroes fp16 gradients with a norm over 65504);
    - nothing is written when the coefficient is 1 (gradients on the CPU; elsewhere that would need
      the host to wait, so they are multiplied by 1);
    - a gradient listed twice counts once.

    DTensors are left to torch's reductions, and to its scaling once the norm is known to be finite.

    Args:
        parameters: a tensor or an iterable of tensors; those without ``grad`` are passed over.
            Gradients may be sparse or complex, and on several devices.
        max_norm: largest norm let through, >= 0.
        norm_type: order of the norm, ``inf`` included; orders other than 2 use torch's kernels.
        error_if_nonfinite: raise on a NaN or Inf norm, with every gradient untouched.
        foreach: for the orders that torch's kernels compute; without effect for the 2-norm.

    Returns:
        The total norm before clipping, shape (), on the first gradient's device; float32, or
        float64 where a gradient is. (A norm above 3.4e38 is Inf in float32; it is clipped by its
        true value, and is no error.)

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
    """
    max_norm = check_threshold("max_norm", max_norm)
    norm_type = float(norm_type)
    parameters = [parameters] if isinstance(parameters, Tensor) else _listed(parameters)
    # By gradient, not by parameter: two parameters may share one.
    grads = list({id(p.grad): p.grad for p in parameters if p.grad is not None}.values())
    if not grads:
        return torch.tensor(0.0)
    if any(kind is not Tensor for kind in set(map(type, grads))):
        return _clip_subclasses_(
            parameters, grads, max_norm, norm_type, error_if_nonfinite, foreach
        )
    values = readable(grads)
    if norm_type == 2.0:
        norms = [ops.grad_norm(group).total_norm for group in by_device(values)]
        total_norm = norms[0]
        if len(norms) > 1:
            total_norm = torch.linalg.vector_norm(
                torch.stack([n.to(norms[0].device) for n in norms])
            )
    else:
        total_norm = torch.nn.utils.get_total_norm(values, norm_type, foreach=foreach).double()
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(_nonfinite_message(total_norm, norm_type))
    clip_coef = ops.decide(total_norm, max_norm, skip_norm=math.inf).clip_coef
    if clip_coef.device.type != "cpu" or clip_coef != 1:  # on the CPU a look costs nothing
        scale_(grads, clip_coef)
    double = {torch.float64, torch.complex128} & {grad.dtype for grad in grads}
    return total_norm if double else total_norm.float()


def _listed(parameters: Iterable[Tensor]) -> list[Tensor]:
    listed = list(parameters)
    if isinstance(parameters, types.GeneratorType) and not listed:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return listed


def readable(grads: list[Tensor]) -> list[Tensor]:
    """What the norm of each gradient is of: strided and real.

    Of a sparse gradient the values, duplicates added up; of a complex one both parts.
    """
    if {g.layout for g in grads} == {torch.strided} and {g.dtype for g in grads} <= set(ops.DTYPES):
        return grads
    values = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in grads]
    return [torch.view_as_real(v) if v.is_complex() else v for v in values]


def by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device, in the order in which the devices come."""
    if len({t.device for t in tensors}) == 1:
        return [tensors]
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return list(groups.values())


def scale_(grads: list[Tensor], clip_coef: Tensor) -> None:
    """:func:`fastguard.ops.scale_` for gradients of any layout, dtype and device."""
    for group in by_device(grads):
        coef = clip_coef.to(group[0].device)
        ops.scale_(readable([g for g in group if g.layout == torch.strided]), coef)
        for grad in group:
            if grad.layout != torch.strided:
                grad.mul_(coef)


def _clip_subclasses_(parameters, grads, max_norm, norm_type, error_if_nonfinite, foreach):
    total_norm = torch.nn.utils.get_total_norm(grads, norm_type, foreach=foreach)
    value = total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm
    if value.isfinite():
        parameters = [p for p in parameters if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    elif error_if_nonfinite:
        raise RuntimeError(_nonfinite_message(value, norm_type))
    return total_norm


def _nonfinite_message(total_norm: Tensor, norm_type: float) -> str:
    return (
        f"The total norm of order {norm_type} for gradients from `parameters` is "
        f"{total_norm.item()}, so it cannot be clipped. The gradients are unchanged; with "
        "`error_if_nonfinite=False` they would be left so without this error"
    )
