"""The grid of cases: tensors of all dtypes, sizes, layouts, magnitudes, equal on all machines."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.ops import DTYPES

#: Fills the memory around every tensor. A read outside the tensor gives a wrong sum, and
#: `untouched_around` finds a write.
SENTINEL = 77.0
_MARGIN = 64  # elements; a multiple of 128 bytes for all dtypes: only "offset" is misaligned

LAYOUTS = {
    "offset": [(1,), (64,), (65,), (8193,), (40_000,)],
    "transposed": [(5, 13), (3, 2731), (200, 200)],
    "channels-last": [(2, 3, 4, 5), (4, 16, 33, 9)],
    "strided": [(65,), (3, 2731)],
    "expanded": [(3, 65), (4, 8193)],
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The extent of the checks."""

    sizes: tuple[int, ...] = (0, 1, 63, 64, 65, 8191, 8192, 8193, 40_000, 1 << 20)
    #: The number of tensors in the long lists.
    many: int = 300
    #: The number of lists with random properties.
    rounds: int = 8
    #: How many times the same input must give the same bits.
    repeats: int = 20


QUICK = Grid(sizes=(0, 1, 65, 8193, 40_000), many=100, rounds=2)


class Spec(NamedTuple):
    """One tensor of a case."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    #: A word that :func:`magnitude` knows.
    magnitude: str = "1"
    #: The number of elements, at random places, that are NaN, Inf or -Inf.
    bad: int = 0

    def __str__(self) -> str:
        text = f"{self.dtype} {[*self.shape]}".removeprefix("torch.")
        text += "" if self.layout == "contiguous" else f" {self.layout}"
        text += "" if self.magnitude == "1" else f", {self.magnitude} magnitude"
        return text + (f", {self.bad} NaN or Inf" if self.bad else "")


class Placed(NamedTuple):
    """A tensor, and the larger tensor that it is a view of."""

    tensor: Tensor
    whole: Tensor

    def around(self) -> Tensor:
        """`whole` with the elements of `tensor` replaced by SENTINEL."""
        copy, view = self.whole.clone(), self.tensor
        copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(SENTINEL)
        return copy


def lists(
    grid: Grid, extremes: bool = True, expanded: bool = True
) -> Iterator[tuple[str, list[Spec]]]:
    """Named lists of tensors. Without ``extremes`` all elements are ordinary numbers."""
    for dtype in DTYPES:
        for size in grid.sizes:
            yield _alone(Spec((size,), dtype))
        for layout, shapes in LAYOUTS.items():
            if expanded or layout != "expanded":
                for shape in shapes:
                    yield _alone(Spec(shape, dtype, layout))
        if extremes:
            for magnitude in ("largest", "smallest", "denormal"):
                for size in (65, 40_000):
                    yield _alone(Spec((size,), dtype, magnitude=magnitude))
            for size in (1, 63, 8193, 40_000):
                yield _alone(Spec((size,), dtype, bad=1 + size // 1000))
    for seed in range(grid.rounds):
        for count in (7, grid.many):
            specs = _mixed(count, grid, seed, extremes, expanded)
            yield f"{count} tensors of everything, seed {seed}", specs
    yield "no tensors", []


def _alone(spec: Spec) -> tuple[str, list[Spec]]:
    return str(spec), [spec]


def _mixed(count: int, grid: Grid, seed: int, extremes: bool, expanded: bool) -> list[Spec]:
    generator = torch.Generator().manual_seed(seed)

    def one_of(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    layouts = [layout for layout in LAYOUTS if expanded or layout != "expanded"]
    specs = []
    for _ in range(count):
        layout = one_of(["contiguous", "contiguous", *layouts])
        # Three of four tensors are small, as in a network.
        sizes = grid.sizes if one_of(range(4)) == 0 else [s for s in grid.sizes if s < 1000]
        shape = one_of(LAYOUTS[layout]) if layout in LAYOUTS else (one_of(sizes),)
        magnitude = one_of(["1"] * 5 + ["largest", "smallest", "denormal"]) if extremes else "1"
        bad = int(extremes and one_of(range(40)) == 0 and math.prod(shape) > 0)
        specs.append(Spec(shape, one_of(DTYPES), layout, magnitude, bad))
    return specs


def magnitude(word: str, dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    # By contract the squares of float64 values may overflow, so these stay within 1e150.
    largest = min(limits.max, 1e150)
    smallest = max(limits.smallest_normal, 1e-150)
    return {
        "1": 1.0,
        "largest": largest / 8,
        "smallest": smallest,
        "denormal": limits.smallest_normal / 8 if dtype != torch.float64 else smallest,
    }[word]


def draw(spec: Spec, generator: torch.Generator) -> Tensor:
    """Values on the CPU. Equal generators give equal values."""
    values = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
    limit = min(torch.finfo(spec.dtype).max, 1e150)
    values = (values * magnitude(spec.magnitude, spec.dtype)).clamp(-limit, limit).to(spec.dtype)
    for i in range(spec.bad):
        place = int(torch.randint(values.numel(), (), generator=generator))
        values.view(-1)[place] = (math.nan, math.inf, -math.inf)[i % 3]
    return values


def place(values: Tensor, layout: str, device: torch.device) -> Placed:
    """The values on the device, in a layout that gradients may have, with SENTINEL around them."""
    strides = _strides(values.shape, layout)
    offset = _MARGIN + (layout == "offset")
    span = sum(stride * (size - 1) for stride, size in zip(strides, values.shape, strict=True)) + 1
    size = max(span, 0) + 2 * _MARGIN + 1
    whole = torch.full((size,), SENTINEL, dtype=values.dtype, device=device)
    tensor = whole.as_strided(values.shape, strides, offset)
    if layout == "expanded":
        tensor[0].copy_(values[0])
    else:
        tensor.copy_(values)
    return Placed(tensor, whole)


def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    row_major = torch.empty(shape, device="meta").stride()
    if layout == "transposed":
        return torch.empty(shape[::-1], device="meta").stride()[::-1]
    if layout == "channels-last":
        _, c, h, w = shape
        return h * w * c, 1, w * c, c
    if layout == "strided":
        return tuple(3 * stride for stride in row_major)
    if layout == "expanded":
        return 0, *row_major[1:]
    return row_major


def placed(specs: list[Spec], seed: int, device: torch.device) -> list[Placed]:
    generator = torch.Generator().manual_seed(seed)
    return [place(draw(spec, generator), spec.layout, device) for spec in specs]


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous copies of the tensors on the CPU."""
    return [
        tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors
    ]
