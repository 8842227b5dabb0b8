"""Memory that a training step frees is kept for the next one."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST_INT = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory in this process, up to 2 GiB.

    By default it returns memory above a threshold to the system. The gradients are freed in every
    step and allocated again in the next; each of their pages then costs a page fault and is filled
    with zeros by the kernel.

    Returns:
        Whether malloc has taken the setting. It has not where the C library is not glibc, and
        where the environment has settings of its own (MALLOC_TRIM_THRESHOLD_,
        MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if any(name in os.environ for name in names):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
    return bool(kept and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
