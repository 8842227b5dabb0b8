"""How the optimizer's state lies in memory: the moments of all parameters of a call in one tensor.

Twin: csrc/packed.h.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

#: Elements; 64 bytes of float32. Twin: packed_alignment in csrc/adamw_options.h.
PACKED_ALIGNMENT = 16


def packed_offsets(numels: Iterable[int]) -> list[int]:
    """Where the moments of each parameter start in packed state, and at the end its whole size.

    Args:
        numels: the number of elements of each parameter.

    Returns:
        One offset for each parameter and one for the end, in elements.
    """
    rounded = (-(-numel // PACKED_ALIGNMENT) * PACKED_ALIGNMENT for numel in numels)
    return list(itertools.accumulate(rounded, initial=0))


def packed_strides(param: Tensor) -> tuple[int, ...]:
    """The strides of a parameter's moments: its own, or row-major ones where it has gaps."""
    if not param.is_contiguous():
        inner = 1
        for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
            if size == 1:
                continue
            if stride != inner:
                return torch.empty(param.shape, device="meta").stride()
            inner *= size
    return param.stride()


def packed_view(pack: Tensor, param: Tensor, offset: int) -> Tensor:
    """The part of packed moments that begins at ``offset``, with the parameter's shape."""
    part = pack.narrow(0, offset, param.numel())
    return part.as_strided(param.shape, packed_strides(param))
