"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from fastguard.speech.training import memory

# mallinfo2 is newer than mallopt.
HAS_MALLINFO2 = platform.libc_ver()[0] == "glibc" and platform.libc_ver()[1] >= "2.33"
needs_glibc = pytest.mark.skipif(not HAS_MALLINFO2, reason="only glibc >= 2.33 tells what is free")

# Without torch, which frees blocks of any size when it is imported: that moves the thresholds.
SCRIPT = """
import ctypes, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
kept = keep_freed_memory() if sys.argv[2] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
for block in [libc.malloc(2_000_000) for _ in range(20)]:
    libc.free(block)
print(kept, libc.mallinfo2().fordblks)
"""


def freed_bytes(asked, **environment):
    """What the function returned, and the bytes that malloc holds after 40 MB were freed."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, memory.__file__, asked],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    kept, size = run.stdout.split()
    return kept, int(size)


@needs_glibc
def test_freed_memory_is_kept():
    kept, size = freed_bytes("keep")
    assert kept == "True"
    assert size >= 40_000_000
    assert freed_bytes("no")[1] < 10_000_000


@needs_glibc
def test_settings_of_the_environment_are_kept():
    kept, size = freed_bytes("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert size < 10_000_000
