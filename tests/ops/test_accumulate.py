"""accumulate_: sums of the good micro-batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from tests.drawn import DTYPES, gradients
from tests.native import needs_kernel
from tests.ops.cases import owned
from tests.ops.decide_cases import APPLY, SKIP, double
from tests.simt.kernels.devices import on_devices

ACCUMULATE = [ops.accumulate_, ops.accumulate_ref_, *on_devices("accumulate_")]


def wide(tensor):
    """What the sum of such gradients is."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


@settings(max_examples=60, deadline=None)
@given(gradients(magnitudes=False, nonfinite=False), st.lists(st.booleans(), max_size=5))
@pytest.mark.parametrize("function", ACCUMULATE)
def test_accumulate_is_the_sum_of_the_good_ones(function, grads, good):
    """In float32: bit for bit what it would be had the bad ones never been."""
    grads = owned(grads)
    sums = [torch.zeros_like(wide(g)) for g in grads]
    expected = [torch.zeros_like(s) for s in sums]
    window = torch.zeros(3, dtype=torch.float64)
    for i, is_good in enumerate(good):
        micro = [g * (i + 1) if is_good else g * math.nan for g in grads]
        function(sums, micro, APPLY if is_good else SKIP, window, 0.5)
        if is_good:
            expected = [a + wide(b) for a, b in zip(expected, micro, strict=True)]
    assert window.tolist() == [len(good), sum(good), 0.5 * sum(good)]
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right, rtol=0, atol=0)


@pytest.mark.parametrize("function", ACCUMULATE)
def test_a_micro_batch_counts_that_has_nothing_to_add(function):
    window = torch.zeros(3, dtype=torch.float64)
    for verdict in (APPLY, SKIP, APPLY):
        function([], [], verdict, window, 2.0)
    assert window.tolist() == [3, 2, 4]


@pytest.mark.parametrize("function", ACCUMULATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_many_chunks_of_another_layout(function, dtype):
    grads = torch.randn(200, 300).to(dtype).t()
    sums = wide(torch.randn(300, 200).to(dtype))
    expected = sums + wide(grads)
    window = double([1.0, 1.0, 1.0])
    function([sums], [grads], APPLY, window, 1.0)
    assert torch.equal(sums, expected)


@needs_kernel
def test_accumulate_refuses_before_it_counts():
    window = torch.zeros(3, dtype=torch.float64)
    for sums, grads, message in (
        ([torch.ones(2)], [], "as many gradients as sums"),
        ([torch.ones(2)], [torch.ones(3)], "sum 0 must have its gradient's shape"),
        ([torch.ones(2).half()], [torch.ones(2).half()], "float64 gradient, float32 for any other"),
        ([torch.ones(2)], [torch.ones(2).double()], "be float64 for a float64 gradient"),
        ([torch.ones(1).expand(4)], [torch.ones(4)], "sum|single memory location"),
        ([torch.ones(2).int()], [torch.ones(2).int()], "tensor 0 has dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.accumulate_(sums, grads, APPLY, window, 1.0)
    assert window.tolist() == [0, 0, 0]
