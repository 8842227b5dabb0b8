"""scale_: every dtype and layout, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from tests.drawn import gradients
from tests.native import needs_kernel
from tests.ops.cases import owned, scaled
from tests.simt.kernels.devices import on_devices

SCALE = [ops.scale_, ops.scale_ref_, *on_devices("scale_")]


@settings(max_examples=100, deadline=None)
@given(gradients(), st.one_of(st.floats(1e-300, 1.0), st.sampled_from([0.0, 1.0, 1e-43])))
@pytest.mark.parametrize("function", SCALE)
def test_scale_(function, grads, coef):
    grads = owned(grads)
    expected = scaled(grads, coef)
    function(grads, torch.tensor(coef, dtype=torch.float64))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", SCALE)
def test_scale_with_a_coefficient_for_each(function):
    grads = [torch.full((40_000,), 2.0), torch.ones(0), torch.ones(3, dtype=torch.bfloat16)]
    function(grads, torch.tensor([0.5, 0.1, 1.0], dtype=torch.float64))
    assert grads[0].unique().tolist() == [1.0]
    assert grads[2].unique().tolist() == [1.0]


@pytest.mark.parametrize("function", SCALE)
def test_scale_of_every_half(function):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for coef in (0.7, 1e-3, 1.9):
            grads = [bits.view(dtype).clone(), bits.view(dtype)[:7].clone()]
            expected = scaled(grads, coef)
            function(grads, torch.tensor(coef, dtype=torch.float64))
            for grad, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


def test_scale_bumps_the_version_that_autograd_checks():
    leaf = torch.ones(3, requires_grad=True)
    product = leaf * 2
    result = product.exp()  # keeps its own output for backward
    with torch.no_grad():
        ops.scale_([result], torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("function", [ops.scale_, ops.scale_ref_])
def test_scale_refuses_what_it_can_not_write(function):
    with pytest.raises(RuntimeError, match="clip_coef must be a float64 tensor"):
        function([torch.ones(2)], torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="clip_coef must be a float64 tensor"):
        function([torch.ones(2)], torch.ones(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="single memory location"):
        function([torch.ones(1).expand(4)], torch.tensor(0.5, dtype=torch.float64))


@needs_kernel
@pytest.mark.parametrize("coef", [1.0, 0.25])
def test_opcheck_scale_(coef):
    grads = [
        torch.ones(3),
        torch.zeros(0),
        torch.randn(2, 3).t(),
        torch.ones((), dtype=torch.bfloat16),
    ]
    torch.library.opcheck(
        torch.ops.fastguard.scale_.default, (grads, torch.tensor(coef, dtype=torch.float64))
    )
