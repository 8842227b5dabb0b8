"""Summaries of tensors: counts of NaN and Inf, largest magnitude and norm of the finite values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """The summary of the floating-point elements of one or more tensors."""

    count: int
    nans: int
    infs: int
    #: Largest magnitude of the finite elements, 0 if there are none.
    largest: float
    #: L2 norm of the finite elements, summed in float64.
    norm: float
    #: The dtype of the first tensor.
    dtype: torch.dtype

    @property
    def finite(self) -> bool:
        return not (self.nans or self.infs)

    @property
    def rms(self) -> float:
        return self.norm / math.sqrt(max(self.count - self.nans - self.infs, 1))

    @property
    def nonfinite(self) -> str:
        """ "3 NaN, 1 Inf of 64 values"."""
        counts = ((self.nans, "NaN"), (self.infs, "Inf"))
        return f"{', '.join(f'{n} {kind}' for n, kind in counts if n)} of {self.count} values"


def summarize(tensors: Iterable[Tensor]) -> Summary | None:
    """The summary of all floating-point tensors together; None if there is none."""
    total = None
    for tensor in tensors:
        if readable(tensor):
            total = merge(total, _summary(tensor))
    return total


def merge(one: Summary | None, other: Summary | None) -> Summary | None:
    """The summary of both sets of tensors together."""
    if one is None or other is None:
        return one or other
    return Summary(
        one.count + other.count,
        one.nans + other.nans,
        one.infs + other.infs,
        max(one.largest, other.largest),
        math.hypot(one.norm, other.norm),
        one.dtype,
    )


@torch.no_grad()
def _summary(tensor: Tensor) -> Summary:
    values = tensor.detach().flatten()
    if values.element_size() < 2:  # torch has few operations for float8
        values = values.float()
    finite = values.isfinite()
    nans = infs = 0
    if not finite.all():
        nans = int(values.isnan().sum())
        infs = values.numel() - int(finite.sum()) - nans
        values = values[finite]
    if values.numel() == 0:
        return Summary(tensor.numel(), nans, infs, 0.0, 0.0, tensor.dtype)
    wide = torch.complex128 if values.is_complex() else torch.float64
    largest = values.abs().max().item()
    norm = torch.linalg.vector_norm(values, dtype=wide).item()
    if not 1e-150 < norm < math.inf and largest > 0:  # the squares left the range of float64
        norm = largest * torch.linalg.vector_norm(values.to(wide) / largest).item()
    return Summary(tensor.numel(), nans, infs, largest, norm, tensor.dtype)


def readable(value: object) -> bool:
    """Whether `value` is a dense floating-point or complex tensor whose values can be read."""
    return (
        isinstance(value, Tensor)
        and (value.is_floating_point() or value.is_complex())
        and value.layout == torch.strided
        and not value.is_nested
        and not value.is_meta
    )


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in arguments or results: in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def with_tensors(value, change: Callable[[Tensor], Tensor]):
    """`value` with `change` applied to each tensor in plain tuples, lists and dicts.

    Other containers, such as a named tuple, stay as they are: their constructors may check their
    arguments.
    """
    if type(value) is Tensor:
        return change(value)
    if type(value) is dict:
        return {key: with_tensors(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_tensors(item, change) for item in value)
    return value
