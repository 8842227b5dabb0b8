"""silu and its gradient against torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops.silu import silu, silu_backward_ref, silu_ref
from tests.drawn import DTYPES, gradients
from tests.native import needs_kernel
from tests.ops.frames_cases import assert_near, same_bits_for_any_number_of_threads

OPS = torch.ops.fastguard


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(gradients(magnitudes=False), st.data())
def test_silu_against_the_reference(tensors, data):
    for x in tensors:
        x = x * data.draw(st.sampled_from([1.0, 30.0, 1e-3]))
        assert_near(silu(x), silu_ref(x.double()), ulps=4, of_largest=False)
        grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
        expected = silu_backward_ref(grad.double(), x.double())
        # x (1 - sigmoid(x)) multiplies the rounding of the sigmoid by x.
        assert_near(OPS.silu_backward(grad, x), expected, ulps=100, of_largest=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(dtype):
    x = torch.tensor([math.nan, math.inf, -1e4, 1e4, -0.0, 0.0, -200.0], dtype=dtype)
    assert_near(silu(x), silu_ref(x))
    assert silu(x).isnan().tolist() == [True] + 6 * [False]


def test_gradient_is_recorded_and_second_derivatives_are_refused():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu, x)
    (grad,) = torch.autograd.grad(silu(x).sum(), x, create_graph=True)
    if ops.cpu_info():
        with pytest.raises(NotImplementedError, match="create_graph=False"):
            grad.sum().backward()


@needs_kernel
def test_transforms_see_the_reference():
    x = torch.randn(4, 6)
    expected = torch.func.vmap(torch.func.grad(lambda row: silu_ref(row).sum()))(x)
    found = torch.func.vmap(torch.func.grad(lambda row: silu(row).sum()))(x)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(silu, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_the_same_for_any_number_of_threads(dtype):
    x, grad = torch.randn(2, 50_001).to(dtype)
    assert same_bits_for_any_number_of_threads(lambda: [OPS.silu(x), OPS.silu_backward(grad, x)])


@needs_kernel
def test_opcheck():
    x = torch.randn(3, 7, requires_grad=True)
    torch.library.opcheck(OPS.silu.default, (x,))
    torch.library.opcheck(OPS.silu_backward.default, (torch.randn(3, 7), torch.randn(3, 7)))


@needs_kernel
def test_wrong_arguments_are_named():
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 and float16"):
        OPS.silu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="x's shape and dtype"):
        OPS.silu_backward(torch.ones(3), torch.ones(4))
