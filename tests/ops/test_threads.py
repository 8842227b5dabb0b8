"""Which lists an operator gives to all threads, and that its result does not depend on them."""

import subprocess
import sys

import pytest
import torch

from fastguard import ops
from tests.drawn import DTYPES
from tests.native import needs_kernel
from tests.tensors import assert_same_bits

SIZES = (400_001, 7, 65_537)  # enough work for a parallel region


def gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for dtype in DTYPES for n in SIZES]


def scaled():
    grads = gradients()
    ops.scale_(grads, torch.tensor(0.7, dtype=torch.float64))
    return grads


def accumulated():
    grads = gradients()
    sums = [
        torch.ones_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in grads
    ]
    window = torch.zeros(3, dtype=torch.float64)
    ops.accumulate_(sums, grads, torch.tensor(0), window, 1.0)
    return sums


@needs_kernel
@pytest.mark.parametrize("function", [scaled, accumulated])
def test_the_result_does_not_depend_on_threads(function):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


STARTED = """
import os, torch
from fastguard import ops
def tasks():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
few, many = [torch.ones(64)] * 2000, [torch.ones(100_000)] * 3
torch.set_num_threads(8)
first = tasks()
ops.grad_norm(few)
small = tasks()
ops.grad_norm(many)
print(small - first, tasks() - small)
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_threads_are_started_by_the_work():
    """None beside the caller for 128000 elements: a busy machine would make the step wait."""
    found = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True)
    assert found.stdout.split() == ["0", "7"], found.stderr
