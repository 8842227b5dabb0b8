"""Gradient clipping with torch's signatures, which decides before it writes."""

import math
import operator
import types
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._tensors import (
    by_device,
    grad_of,
    is_dtensor,
    local_part,
    readable,
    scale_,
    values_of,
)
from .thresholds import check_threshold

_DTYPES = frozenset(ops.FLOATING_DTYPES)
_REAL = frozenset(ops.DTYPES)
_dtype_of = operator.attrgetter("dtype")
_DOUBLE = {torch.float64, torch.complex128}


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    nonfinite: str = "keep",
) -> Tensor:
    """Clip the norm of the gradients in place; a drop-in for ``torch.nn.utils.clip_grad_norm_``.

    The coefficient is torch's, ``max_norm / (total_norm + 1e-6)``. The differences are:

    - A non-finite norm leaves every gradient unchanged. Torch overwrites the finite ones with NaN
      and zeros, and so destroys the evidence of what went wrong.
    - Finite float32, bfloat16 and float16 gradients are clipped however large they are. The norm
      is at least float32. Torch zeroes fp16 gradients with a norm above 65504.
    - Nothing is written when the coefficient is 1. (Without a kernel for the device, the gradients
      are multiplied by 1: reading the coefficient would need a host-device sync.)
    - An expanded gradient, whose elements share memory, is refused even if nothing needs clipping.
    - A gradient listed twice counts once.
    - DTensors may be mixed with tensors and come from several meshes. The norm is that of the whole
      gradients, so every rank of their meshes decides the same. A plain tensor is taken to be the
      same on every rank; a DTensor counts only on the ranks of its mesh.

    Equivalent to :func:`get_total_norm` followed by :func:`clip_grads_with_norm_`, bit for bit
    where the norm is below 3.4e38; above, it is Inf in float32 and only this function still clips.

    Args:
        parameters: a tensor or an iterable of tensors; those without ``grad`` are passed over.
            Gradients may be sparse or complex, and on several devices.
        max_norm: largest norm let through, >= 0.
        norm_type: order of the norm, as torch takes it: also ``inf``, ``-inf``, negative and 0.
        error_if_nonfinite: raise on a NaN or Inf norm, with every gradient untouched.
        foreach: accepted for torch's sake, without effect.
        nonfinite: what a NaN or Inf norm does to the gradients: ``"keep"`` leaves them, ``"torch"``
            multiplies them as torch does (NaN: all become NaN; Inf: 0, and NaN where one was Inf).

    Returns:
        The total norm before clipping, shape (), on the first gradient's device; float64 if a
        gradient is, else float32. A norm above 3.4e38 is Inf in float32; the gradients are clipped
        by its true value, and it is no error. The result is a replicated DTensor if all gradients
        are DTensors of one mesh, else a plain tensor.

    Raises:
        ValueError: ``max_norm`` is negative or NaN, or ``nonfinite`` is unknown.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; or a gradient is of
            an integer type.
    """
    max_norm = check_threshold("max_norm", max_norm)
    _check_nonfinite(nonfinite)
    parameters = _listed(parameters)
    if norm_type == 2.0 and nonfinite == "keep" and not error_if_nonfinite:
        clipped = _clip_at_once_(parameters, max_norm)
        if clipped is not None:
            return clipped
    grads = _gradients(parameters)
    if not grads.tensors:
        return torch.tensor(0.0)
    total_norm = _total_norm(grads, float(norm_type), error_if_nonfinite)
    rounded = _rounded(total_norm, grads.dtypes)
    coming_back = rounded.double()
    _clip_(grads, max_norm, coming_back.where(coming_back.isfinite(), total_norm), nonfinite)
    return _returned(rounded, grads)


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors together, as ``torch.nn.utils.get_total_norm`` computes it.

    Arguments, result and errors are those of :func:`clip_grad_norm_`, whose norm this is;
    ``tensors`` are the gradients themselves.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    known = _looked_over(tensors, tensors)
    if not tensors:
        return torch.tensor(0.0)
    total_norm = _total_norm(known, float(norm_type), error_if_nonfinite)
    return _returned(_rounded(total_norm, known.dtypes), known)


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
    *,
    nonfinite: str = "keep",
) -> None:
    """Scale the gradients in place by ``max_norm / (total_norm + 1e-6)`` where that is below 1.

    Equivalent to ``torch.nn.utils.clip_grads_with_norm_``, except that a non-finite ``total_norm``
    leaves every gradient unchanged. See :func:`clip_grad_norm_` for the other arguments.

    Args:
        total_norm: >= 0; a number, or a tensor of one element, of any dtype and device, or DTensor.

    Raises:
        ValueError: a negative or NaN ``max_norm``, an unknown ``nonfinite``, a ``total_norm`` of
            several elements or negative (seen only on the CPU; a GPU is not waited for).
        RuntimeError: a gradient is of an integer type.
    """
    max_norm = check_threshold("max_norm", max_norm)
    _check_nonfinite(nonfinite)
    total_norm = _as_scalar(total_norm)
    grads = _gradients([parameters] if isinstance(parameters, Tensor) else list(parameters))
    if grads.tensors:
        _clip_(grads, max_norm, total_norm, nonfinite)


def _clip_at_once_(parameters: list[Tensor], max_norm: float) -> Tensor | None:
    """Clip by one operator; returns the norm, or None where the operator does not take them all."""
    grads = list(map(grad_of, parameters))
    if types.NoneType in map(type, grads):
        grads = [grad for grad in grads if grad is not None]
    dtypes = set(map(_dtype_of, grads))
    if not grads or not dtypes <= _REAL or len(set(map(id, grads))) < len(grads):
        return None
    try:
        # A look at the layout, device and type of each takes longer than this call.
        measured, _ = ops.clip_(grads, max_norm, math.inf, dtypes.isdisjoint(_DOUBLE))
    except RuntimeError:  # the operator takes no sparse or distributed tensors, and one device
        if _looked_over(grads, grads).plain:
            raise  # the error has another cause
        return None
    return _rounded(measured.total_norm, dtypes)


# --- arguments ----------------------------------------------------------------------------------


def _check_nonfinite(nonfinite: str) -> None:
    if nonfinite not in ("keep", "torch"):
        raise ValueError(
            f"nonfinite must be 'keep' (leave the gradients) or 'torch', got {nonfinite!r}"
        )


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    listed = list(parameters)
    if isinstance(parameters, types.GeneratorType) and not listed:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return listed


class _Gradients(NamedTuple):
    """Gradients and their properties, read once: to read one of 1000 tensors takes half as long
    as their norm."""

    tensors: list[Tensor]
    dtypes: set[torch.dtype]
    #: Whether one call of a kernel takes all of them without conversion.
    plain: bool


def _gradients(parameters: list[Tensor]) -> _Gradients:
    grads = [grad for p in parameters if (grad := p.grad) is not None]
    return _looked_over(grads, (p.grad for p in parameters))


def _looked_over(tensors: list[Tensor], given: Iterable[Tensor | None]) -> _Gradients:
    """The gradients with their properties; each one once, because two parameters may share one.

    Args:
        given: the same tensors by the caller's indices, for an error message.
    """
    if len(set(map(id, tensors))) < len(tensors):
        tensors = list({id(t): t for t in tensors}.values())
    dtypes = {t.dtype for t in tensors}
    if not dtypes <= _DTYPES:
        i, bad = next(
            (i, t) for i, t in enumerate(given) if t is not None and t.dtype in dtypes - _DTYPES
        )
        raise RuntimeError(
            f"gradient {i}, of shape {tuple(bad.shape)}, has dtype {bad.dtype}, which cannot be "
            "clipped; float32, float64, bfloat16, float16 and complex ones can. Leave its tensor "
            "out of the list or set its grad to None"
        )
    plain = (
        dtypes <= _REAL
        and not any(map(is_dtensor, set(map(type, tensors))))
        and {t.layout for t in tensors} == {torch.strided}
        and len({t.device for t in tensors}) == 1
    )
    return _Gradients(tensors, dtypes, plain)


def _as_scalar(total_norm: Tensor | float) -> Tensor:
    if is_dtensor(total_norm):
        total_norm = total_norm.full_tensor()
    total_norm = torch.as_tensor(total_norm, dtype=torch.float64)
    if total_norm.numel() != 1:
        raise ValueError(
            f"total_norm must be one number, got a tensor of shape {tuple(total_norm.shape)}"
        )
    if total_norm.device.type == "cpu" and total_norm < 0:  # torch would flip signs
        raise ValueError(f"total_norm must not be negative, got {total_norm.item()}")
    return total_norm.reshape(())


# --- norm ---------------------------------------------------------------------------------------


def _total_norm(grads: _Gradients, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The norm, float64, shape (), on the device of the first tensor, equal on every rank."""
    if grads.plain and norm_type == 2.0:
        total_norm = ops.grad_norm(grads.tensors).total_norm
    else:
        total_norm = _any_norm(grads.tensors, norm_type)
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            f"so it cannot be clipped. It is {total_norm.item()}; the gradients are unchanged. "
            "Skip this step (fastguard.GradGuard does so, and names the parameters), or set "
            "`error_if_nonfinite=False` to go on without this error"
        )
    return total_norm


def _any_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    device = tensors[0].device
    if norm_type < 0:  # an empty tensor has no smallest element
        tensors = [t for t in tensors if (t._nnz() if t.is_sparse else t.numel())]
    kinds = {kind for kind in set(map(type, tensors)) if is_dtensor(kind)}
    norms = _dtensor_norms([t for t in tensors if type(t) in kinds], norm_type)
    norms += _norms([t for t in tensors if type(t) not in kinds], norm_type)
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.cat([n.to(device) for n in norms])
    if len(norms) == 1 and norm_type != 0:
        return norms[0]
    return _vector_norm(norms, norm_type)


def _norms(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    """One float64 vector of norms for each device. Their norm is that of all tensors.

    A vector has one number per tensor; with order 2 it has one number for the device. Order 0
    counts the tensors with a non-zero element, as in torch.
    """
    if not tensors:
        return []
    if norm_type == 2.0:
        groups = by_device(readable(tensors))
        return [ops.grad_norm(group).total_norm.reshape(1) for group in groups]
    neutral = math.inf if norm_type < 0 else 0.0
    values = tensors if readable(tensors) is tensors else [_magnitudes(t) for t in tensors]
    values = [v if v.numel() else v.new_full((1,), neutral) for v in values]
    if 6 < abs(norm_type) < math.inf:
        norms = [[_vector_norm(v, norm_type) for v in group] for group in by_device(values)]
    else:
        norms = [
            torch._foreach_norm(group, norm_type, dtype=torch.float64)
            for group in by_device(values)
        ]
    return [torch.stack(list(group)) for group in norms]


def _vector_norm(values: Tensor, norm_type: float) -> Tensor:
    """The norm of a vector in float64, without overflow or underflow.

    Up to order 6 the powers of float32 values fit into float64. For higher orders the values are
    first divided by the dominating one.
    """
    values = values.to(torch.float64)
    if not 6 < abs(norm_type) < math.inf:
        return torch.linalg.vector_norm(values, norm_type)
    unit = torch.linalg.vector_norm(values, math.copysign(math.inf, norm_type))
    unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
    return unit * torch.linalg.vector_norm(values / unit, norm_type)


def _magnitudes(tensor: Tensor) -> Tensor:
    """The elements for norms of other orders than 2. A complex element has its absolute value."""
    values = values_of(tensor)
    return values.to(torch.complex128).abs() if values.is_complex() else values


# --- DTensor (torch.distributed.tensor is imported only where there is one) ---------------------


def _dtensor_norms(dtensors: list[Tensor], norm_type: float) -> list[Tensor]:
    """:func:`_norms` over all ranks, with one reduction per mesh and set of sharded dimensions.

    The collectives and their order depend on meshes and placements alone. They must not depend on a
    value, a local shape or a verdict: a rank that does not take part makes the others wait for
    ever.
    """
    groups: dict[tuple, list[Tensor]] = {}
    for dtensor in dtensors:
        if dtensor.device_mesh.get_coordinate() is None:
            continue  # this rank is not in the mesh and cannot take part in its collectives
        dtensor = _summed_up(dtensor)
        sharded = tuple(not placement.is_replicate() for placement in dtensor.placements)
        groups.setdefault((dtensor.device_mesh, sharded), []).append(local_part(dtensor))
    norms = []
    for (mesh, sharded), shards in groups.items():
        local = torch.cat([n.to(mesh.device_type) for n in _norms(shards, norm_type)])
        norms.append(_over_ranks(local, mesh, sharded, norm_type))
    return norms


def _over_ranks(norms: Tensor, mesh, sharded: tuple[bool, ...], norm_type: float) -> Tensor:
    """The norms of whole tensors from those of local shards. Replicas count once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not any(sharded):
        return norms
    if norm_type == 2.0:
        placements = [Partial("sum") if s else Replicate() for s in sharded]
        squares = DTensor.from_local(norms.square().sum(), mesh, placements)
        return squares.full_tensor().sqrt().reshape(1)
    # Other orders gather the norms of all ranks. A sum of powers may overflow, and a maximum over
    # ranks may lose a NaN.
    if norm_type != 0:
        norms = _vector_norm(norms, norm_type).reshape(1)
    placements = [Shard(0) if s else Replicate() for s in sharded]
    ranks = DTensor.from_local(norms.unsqueeze(0), mesh, placements).full_tensor()
    return ranks.amax(0) if norm_type == 0 else ranks.flatten()


def _summed_up(dtensor: Tensor) -> Tensor:
    """The DTensor without Partial placements: the norm of a sum is not the sum of norms."""
    from torch.distributed.tensor import Replicate

    if not any(placement.is_partial() for placement in dtensor.placements):
        return dtensor
    placements = [Replicate() if p.is_partial() else p for p in dtensor.placements]
    return dtensor.redistribute(placements=placements)


def _rounded(total_norm: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    return total_norm.float() if dtypes.isdisjoint(_DOUBLE) else total_norm


def _returned(total_norm: Tensor, grads: _Gradients) -> Tensor:
    """The norm as a replicated DTensor if all gradients are DTensors of one mesh."""
    if grads.plain or not all(map(is_dtensor, set(map(type, grads.tensors)))):
        return total_norm
    from torch.distributed.tensor import DTensor, Replicate

    mesh, *more = {t.device_mesh for t in grads.tensors}
    return total_norm if more else DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim)


# --- scaling ------------------------------------------------------------------------------------


def _clip_(grads: _Gradients, max_norm: float, total_norm: Tensor, nonfinite: str) -> None:
    if nonfinite == "torch":
        clip_coef = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    else:
        clip_coef = ops.decide(total_norm, max_norm, skip_norm=math.inf).clip_coef
    if clip_coef.device.type != "cpu" or clip_coef != 1:  # on the CPU the comparison is no sync
        if grads.plain:
            ops.scale_(grads.tensors, clip_coef.to(grads.tensors[0].device))
        else:
            scale_(grads.tensors, clip_coef)
