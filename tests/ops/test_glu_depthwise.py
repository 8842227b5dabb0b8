"""glu_depthwise against its reference, and a filter against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.ops import glu_depthwise as module
from fastguard.ops.glu_depthwise import (
    glu_depthwise,
    glu_depthwise_backward_ref,
    glu_depthwise_ref,
)
from tests.drawn import DTYPES
from tests.native import needs_kernel
from tests.ops.frames_cases import (
    assert_near,
    check_against_reference,
    frames,
    same_bits_for_any_number_of_threads,
)

OPS = torch.ops.fastguard


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(frames(factor=2, most_frames=140), st.sampled_from([1, 3, 9, 31, module.MOST_TAPS]))
def test_glu_depthwise_against_the_reference(drawn, taps):
    x, mask, _ = drawn
    channels = x.size(2) // 2
    if x.numel() == 0:
        assert glu_depthwise(x, mask, drawn.of_channel(channels, 1, taps)).numel() == 0
        return
    check_against_reference(
        lambda x, weight: [glu_depthwise(x, mask, weight)],
        lambda x, weight: [glu_depthwise_ref(x, mask, weight)],
        [x, drawn.of_channel(channels, 1, taps)],
        [drawn.like(*x.shape[:2], channels)],
        ulps=40,
    )


def test_reference_is_the_definition():
    x, weight = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(2, 1, 3).double()
    mask = torch.tensor([[False] * 5 + [True]])
    gated = F.glu(x[0])
    gated[5] = 0
    for t in range(6):
        for c in range(2):
            reach = [(k, t + k - 1) for k in range(3) if 0 <= t + k - 1 < 6]
            expected = sum(weight[c, 0, k] * gated[i, c] for k, i in reach)
            found = glu_depthwise_ref(x, mask, weight)[0, t, c]
            torch.testing.assert_close(found, expected)


def test_long_filters_and_other_dtypes_of_the_weight():
    x, mask = torch.randn(2, 30, 6), torch.zeros(2, 30, dtype=torch.bool)
    for taps, dtype in ((module.MOST_TAPS + 2, torch.float32), (9, torch.bfloat16)):
        weight = torch.randn(3, 1, taps).to(dtype).requires_grad_()
        output = glu_depthwise(x, mask, weight)
        torch.testing.assert_close(
            output, glu_depthwise_ref(x, mask, weight.float()), rtol=1e-4, atol=1e-4
        )
        assert torch.autograd.grad(output.sum(), weight)[0].dtype == dtype


@needs_kernel
def test_backward_against_the_reference():
    x, grad = torch.randn(3, 90, 140).double(), torch.randn(3, 90, 70).double()
    mask = torch.arange(90) >= torch.tensor([[90], [64], [0]])
    args = (grad, x, mask, torch.randn(70, 9).double())
    for found, expected in zip(
        OPS.glu_depthwise_backward(*args), glu_depthwise_backward_ref(*args), strict=True
    ):
        assert_near(found, expected, ulps=40)


@needs_kernel
def test_nan_reaches_what_its_filter_reaches():
    x, mask = torch.randn(1, 100, 80), torch.arange(100)[None] >= 90
    x[0, 60, 35] = x[0, 95, 3] = math.nan  # the second is padding
    output = glu_depthwise(x, mask, torch.randn(40, 1, 9))
    expected = torch.zeros(1, 100, 40, dtype=torch.bool)
    expected[0, 56:65, 35] = True
    assert torch.equal(output.isnan(), expected)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_glu_depthwise_is_the_same_for_any_number_of_threads(dtype):
    x, grad = torch.randn(2, 150, 200).to(dtype), torch.randn(2, 150, 100).to(dtype)
    mask = torch.arange(150) >= torch.tensor([[150], [70]])
    weight = torch.randn(100, 9).to(torch.promote_types(dtype, torch.float32))
    assert same_bits_for_any_number_of_threads(
        lambda: [
            OPS.glu_depthwise(x, mask, weight),
            *OPS.glu_depthwise_backward(grad, x, mask, weight),
        ]
    )


@needs_kernel
def test_opcheck():
    x, mask = torch.randn(2, 5, 6, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
    weight = torch.randn(3, 3, requires_grad=True)
    torch.library.opcheck(OPS.glu_depthwise.default, (x, mask, weight))
    args = (torch.randn(2, 5, 3), x.detach(), mask, weight.detach())
    torch.library.opcheck(OPS.glu_depthwise_backward.default, args)


@needs_kernel
def test_wrong_arguments_are_named():
    x, mask, weight = torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"x must be \(B, T, 2 C\); got 3 .* the last of 5"):
        OPS.glu_depthwise(x[:, :, :5], mask, weight)
    with pytest.raises(RuntimeError, match=r"K odd and at most 65; got 2 .* the last of 4"):
        OPS.glu_depthwise(x, mask, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match=r"weight must have shape \(3, 3\)"):
        OPS.glu_depthwise(x, mask, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match=r"grad_output must have shape \(2, 5, 3\)"):
        OPS.glu_depthwise_backward(x, x, mask, weight)
