"""The layout of the optimizer's state: one tensor holds the moments of all parameters of a call.

Twin: csrc/packed.h.
"""

import itertools
from collections.abc import Iterable, Sequence

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


def sharing_memory(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors of one device that share memory; None if none are found.

    The function finds a tensor that begins inside a dense tensor or where another tensor begins. It
    does not compare tensors with gaps further: the elements of one may lie between those of the
    other, which is no fault. It takes O(N log N) time. Call it when a list is built, not in each
    step.
    """
    starts = []
    for place, tensor in enumerate(tensors):
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel() > 0:
            dense = tensor.is_contiguous() or tensor.stride() == packed_strides(tensor)
            start = tensor.data_ptr()  # 0 if the storage was freed, for example by FSDP
            starts += [(start, start + dense * tensor.nbytes, place)] if start else []
    (begun, ended), last = (-1, -1), -1
    for start, end, place in sorted(starts):
        if start == begun or start < ended:
            return last, place
        begun, ended, last = start, end, place
    return None
