"""Huge pages for large tensors on the CPU.

A pass over several arrays needs an address translation for each page. With pages of 2 MiB instead
of 4 KiB these take no time, and the hardware's prefetch need not stop as often.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on most ARM systems


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros(numel)``, on the CPU in huge pages where the system has them.

    Linux calls them transparent huge pages. Its setting ``madvise`` (the usual default) and
    ``always`` allow them, ``never`` does not. Elsewhere the pages are the usual ones.
    """
    tensor = torch.empty(numel, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= 2 * _HUGE_PAGE:
        _advise(tensor)
    return tensor.zero_()


def _advise(tensor: Tensor) -> None:
    """Ask for huge pages before the first write, which allocates the pages."""
    if (madvise := _madvise()) is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # A refusal changes nothing but the speed: kernels can be built without huge pages.
        madvise(start, end - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``; None where there are no transparent huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
