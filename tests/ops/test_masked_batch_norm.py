"""masked_batch_norm against its reference, which tests/speech/models compares with loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.ops.masked_batch_norm import (
    masked_batch_norm,
    masked_batch_norm_backward_ref,
    masked_batch_norm_ref,
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
EPS = 1e-3


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(frames(), st.booleans(), st.booleans())
def test_batch_norm_against_the_reference(drawn, training, silu):
    channels = drawn.x.size(2)
    mean, var = drawn.of_channel(channels), drawn.of_channel(channels).abs() + 0.5

    def output_of(function):
        def output(x, weight, bias):
            known = (t.to(weight.dtype) for t in (mean, var))
            args = (x, drawn.padding_mask, weight, bias, *known, EPS, training, silu)
            return [function(*args).output]

        return output

    leaves = [drawn.x, drawn.of_channel(channels), drawn.of_channel(channels)]
    # Of two frames the gradient is a difference of nearly equal numbers.
    check_against_reference(
        output_of(masked_batch_norm),
        output_of(masked_batch_norm_ref),
        leaves,
        [drawn.like(*drawn.x.shape)],
        ulps=400,
    )


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(frames(), st.booleans())
def test_statistics_are_those_of_the_valid_frames(drawn, training):
    channels = drawn.x.size(2)
    ones, zeros = drawn.of_channel(channels) * 0 + 1, drawn.of_channel(channels) * 0
    known = drawn.of_channel(channels), drawn.of_channel(channels).abs()
    args = (drawn.padding_mask, ones, zeros, *known, EPS, training, False)
    _, mean, var = masked_batch_norm(drawn.x, *args)
    valid = drawn.x[~drawn.padding_mask].double()
    if not training or len(valid) < 2:
        assert torch.equal(mean, known[0]) and torch.equal(var, known[1])
    else:
        assert_near(mean, valid.mean(0))
        assert_near(var, valid.var(0, correction=0))


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_backward_against_the_reference(training, silu):
    """The operator itself, with statistics that are those of its frames."""
    x = torch.randn(2, 40, 33, dtype=torch.float64)
    mask = torch.arange(40) >= torch.tensor([[40], [23]])
    weight, bias, grad = torch.randn(33), torch.randn(33), torch.randn(2, 40, 33)
    weight, bias, grad = weight.double(), bias.double(), grad.double()
    options = (EPS, training, silu)
    _, mean, var = OPS.masked_batch_norm(x, mask, weight, bias, bias, weight.abs(), *options)
    args = (grad, x, mask, weight, bias, mean, var, *options)
    for found, expected in zip(
        OPS.masked_batch_norm_backward(*args), masked_batch_norm_backward_ref(*args), strict=True
    ):
        assert_near(found, expected, ulps=50)


@needs_kernel
def test_nan_of_a_valid_frame_reaches_its_channel():
    x, mask = torch.randn(2, 50, 40), torch.arange(50) >= torch.tensor([[50], [30]])
    x[1, 20, 35] = math.nan
    x[1, 30, 2] = math.nan  # padding
    vector = torch.ones(40)
    output, mean, var = masked_batch_norm(x, mask, *[vector] * 4, EPS, True, True)
    wrong = (torch.arange(40) == 35).tolist()
    assert mean.isnan().tolist() == var.isnan().tolist() == wrong
    assert output[~mask].isnan().any(0).tolist() == wrong
    assert not output[mask].isnan()[:, [*range(35), *range(36, 40)]].any()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_is_the_same_for_any_number_of_threads(dtype):
    x, grad = torch.randn(2, 3, 200, 130).to(dtype)
    mask = torch.arange(200) >= torch.tensor([[200], [150], [1]])
    wide = torch.promote_types(dtype, torch.float32)
    vectors = [torch.rand(130, dtype=wide) for _ in range(4)]

    def results():
        output, mean, var = OPS.masked_batch_norm(x, mask, *vectors, EPS, True, True)
        args = (grad, x, mask, *vectors[:2], mean, var, EPS, True, True)
        return [output, mean, var, *OPS.masked_batch_norm_backward(*args)]

    assert same_bits_for_any_number_of_threads(results)


@needs_kernel
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    x, mask = torch.randn(2, 5, 3, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
    weight, bias = (torch.rand(3, requires_grad=True) for _ in range(2))
    args = (x, mask, weight, bias, torch.rand(3), torch.rand(3), EPS, training, True)
    torch.library.opcheck(OPS.masked_batch_norm.default, args)
    args = (torch.randn(2, 5, 3), *(t.detach() for t in args[:-3]), EPS, training, True)
    torch.library.opcheck(OPS.masked_batch_norm_backward.default, args)


@needs_kernel
def test_wrong_arguments_are_named():
    x, mask, vector = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool), torch.ones(3)

    def call(x=x, mask=mask, weight=vector, bias=vector, mean=vector, var=vector):
        return OPS.masked_batch_norm(x, mask, weight, bias, mean, var, EPS, True, True)

    with pytest.raises(RuntimeError, match=r"x must be \(B, T, C\); got 2 dimensions"):
        call(x=x[0])
    with pytest.raises(RuntimeError, match=r"padding_mask must have shape \(2, 5\)"):
        call(mask=mask.int())
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"{name} must have shape \(3\)"):
            call(**{name: torch.ones(4)})
    for name in ("mean", "var"):
        with pytest.raises(RuntimeError, match=rf"running_{name} must have shape \(3\)"):
            call(**{name: vector.double()})
