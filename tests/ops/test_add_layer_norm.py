"""add_layer_norm against its reference, which is torch's layer_norm of a sum."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastguard.ops.add_layer_norm import (
    add_layer_norm,
    add_layer_norm_backward_ref,
    add_layer_norm_ref,
)
from tests.drawn import DTYPES
from tests.native import needs_kernel
from tests.ops.frames_cases import (
    assert_near,
    check_against_reference,
    frames,
    same_bits_for_any_number_of_threads,
    with_gradients,
)

OPS = torch.ops.fastguard
EPS = 0.1


def drawn_leaves(drawn, with_branch):
    """x (without NaN), the branch, weight and bias, and the scale."""
    x = drawn.x.nan_to_num(0.5, 0.5, 0.5)
    # Sums that 16 bits hold exactly: the reference then normalises the same numbers.
    x, branch = x.mul(4).round(), drawn.like(*x.shape).mul(4).round()
    channels = x.size(2)
    scale = (drawn.of_channel(x.size(0), channels) > 0).to(drawn.of_channel(1).dtype)
    vectors = [drawn.of_channel(channels), drawn.of_channel(channels)]
    return [x, *([branch] if with_branch else []), *vectors], scale


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(frames(), st.booleans())
def test_sum_and_norm_against_the_reference(drawn, scaled):
    leaves, scale = drawn_leaves(drawn, with_branch=True)
    assume(leaves[0].numel() > 0)

    def of(function):
        def both(x, branch, weight, bias):
            known = scale.to(weight.dtype) if scaled else None
            return function(x, branch, known, weight, bias, 0.5, EPS)

        return both

    upstream = [drawn.like(*drawn.x.shape) for _ in range(2)]
    check_against_reference(of(add_layer_norm), of(add_layer_norm_ref), leaves, upstream, ulps=200)


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(frames())
def test_norm_without_a_branch_against_the_reference(drawn):
    leaves, _ = drawn_leaves(drawn, with_branch=False)
    assume(leaves[0].numel() > 0)

    def of(function):
        return lambda x, weight, bias: function(x, None, None, weight, bias, 1.0, EPS)[1:]

    upstream = [drawn.like(*drawn.x.shape)]
    check_against_reference(of(add_layer_norm), of(add_layer_norm_ref), leaves, upstream, ulps=200)
    total, _ = add_layer_norm(leaves[0], None, None, *leaves[1:], 1.0, EPS)
    assert total is leaves[0]


@needs_kernel
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("has_branch", [True, False])
def test_backward_against_its_formula(has_branch, scaled):
    grads = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    total, weight = torch.randn(3, 40, 33).double(), torch.randn(33).double()
    scale = torch.randn(3, 33).double() if scaled else None
    mean, rstd = total.mean(2).flatten(), torch.rsqrt(total.var(2, correction=0) + EPS).flatten()
    for grad_sum in (grads[0], None):
        args = (grad_sum, grads[1], total, scale, weight, mean, rstd, 0.5, has_branch)
        for found, expected in zip(
            OPS.add_layer_norm_backward(*args), add_layer_norm_backward_ref(*args), strict=True
        ):
            assert_near(found, expected, ulps=50)


@needs_kernel
def test_a_gradient_of_the_sum_alone():
    x, branch = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    weight, bias = torch.ones(5).double(), torch.zeros(5).double()

    def total(function):
        return lambda x, branch: [function(x, branch, None, weight, bias, 0.5, EPS)[0]]

    upstream = [torch.randn(2, 9, 5).double()]
    for found, expected in zip(
        with_gradients(total(add_layer_norm), [x, branch], upstream),
        with_gradients(total(add_layer_norm_ref), [x, branch], upstream),
        strict=True,
    ):
        assert_near(found, expected)


@needs_kernel
def test_nan_reaches_its_row():
    x, branch, vector = torch.randn(2, 30, 40), torch.randn(2, 30, 40), torch.ones(40)
    branch[1, 7, 39] = math.nan
    scale = torch.zeros(2, 40)  # a dropped NaN is still one
    total, normed = add_layer_norm(x, branch, scale, vector, vector, 1.0, EPS)
    expected = torch.zeros(2, 30, dtype=torch.bool)
    expected[1, 7] = True
    assert torch.equal(normed.isnan().all(2), expected)
    assert torch.equal(normed.isnan().any(2), expected)
    assert total.isnan().sum() == 1


def test_dtypes_that_differ_are_those_of_torch():
    vector = torch.ones(4)
    x, branch = torch.randn(1, 3, 4), torch.randn(1, 3, 4).bfloat16()
    for a, b in ((x, branch), (branch, x)):
        total, normed = add_layer_norm(a, b, None, vector, vector, 1.0, EPS)
        assert total.dtype == normed.dtype == torch.float32
        torch.testing.assert_close(total, a + b)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm_is_the_same_for_any_number_of_threads(dtype):
    x, branch, *grads = torch.randn(4, 3, 150, 130).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(2, 130, dtype=wide)
    scale = torch.randn(3, 130, dtype=wide)

    def results():
        total, normed, mean, rstd = OPS.add_layer_norm(x, branch, scale, weight, bias, 0.5, EPS)
        args = (*grads, total, scale, weight, mean, rstd, 0.5, True)
        return [total, normed, mean, rstd, *OPS.add_layer_norm_backward(*args)]

    assert same_bits_for_any_number_of_threads(results)


@needs_kernel
@pytest.mark.parametrize("has_branch", [True, False])
def test_opcheck(has_branch):
    x, branch = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))
    scale = torch.rand(2, 3)
    args = (x, branch if has_branch else None, scale, weight, bias, 0.5, EPS)
    torch.library.opcheck(OPS.add_layer_norm.default, args)
    frames = [torch.randn(2, 5, 3) for _ in range(3)]
    args = (*frames, scale, weight.detach(), torch.rand(10), torch.rand(10), 0.5, has_branch)
    torch.library.opcheck(OPS.add_layer_norm_backward.default, args)


@needs_kernel
def test_wrong_arguments_are_named():
    x, vector = torch.randn(2, 5, 3), torch.ones(3)

    def call(x=x, branch=None, scale=None, weight=vector, bias=vector):
        return OPS.add_layer_norm(x, branch, scale, weight, bias, 0.5, EPS)

    with pytest.raises(RuntimeError, match=r"x must be \(B, T, C\), C at least 1; got 2"):
        call(x=x[0])
    with pytest.raises(RuntimeError, match=r"branch must have shape \(2, 5, 3\)"):
        call(branch=x.bfloat16())
    with pytest.raises(RuntimeError, match=r"scale must have shape \(2, 3\)"):
        call(scale=torch.ones(3, 2))
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"{name} must have shape \(3\)"):
            call(**{name: torch.ones(4)})
