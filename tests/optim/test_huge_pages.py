"""The pages of the packed state."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard.optim import huge_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc/self/smaps")


def advised(address):
    """Whether the mapping of an address has the flag that MADV_HUGEPAGE sets."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", smaps)[1:]:
        begin, end = (int(bound, 16) for bound in block.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return "hg" in re.search(r"^VmFlags:(.*)$", block, re.MULTILINE)[1].split()
    raise AssertionError(f"no mapping has the address {address:#x}")


@linux
def test_large_packed_state_asks_for_huge_pages():
    p = torch.nn.Parameter(torch.ones(3_000_000))
    p.grad = torch.ones_like(p)
    optimizer = fastguard.AdamW([p])
    optimizer.step()
    middle = 4 * p.numel() // 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert advised(optimizer.state[p][name].data_ptr() + middle), name
    with mmap.mmap(-1, 4 << 20) as fresh:
        byte = ctypes.c_char.from_buffer(fresh)
        assert not advised(ctypes.addressof(byte))
        del byte


@linux
@pytest.mark.parametrize("numel", [0, 1, (1 << 20) - 1])
def test_small_tensors_keep_their_pages(numel, monkeypatch):
    def refused(tensor):
        raise AssertionError(f"{tensor.nbytes} bytes")

    monkeypatch.setattr(huge_pages, "_advise", refused)
    assert huge_pages.zeros(numel, torch.float32, torch.device("cpu")).shape == (numel,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_over_memory_that_was_used_before(dtype):
    for _ in range(3):
        tensor = huge_pages.zeros(1_500_001, dtype, torch.device("cpu"))
        assert tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(7.0)


def test_zeros_without_madvise(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert not huge_pages.zeros(1_500_000, torch.float32, torch.device("cpu")).any()
