"""ClampedMultiheadAttention whose parameters are not all of one dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .cases import draw, twins

DTYPES = (torch.float16, torch.float32)


@pytest.mark.parametrize("kind", ["self", "query is key", "key is value", "all differ", "widths"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("scripted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_projections_bias_may_be_of_another_dtype_than_the_weights(
    kind, batch_first, scripted, dtype
):
    """As after ``model.to(torch.bfloat16)`` that left the biases alone.

    torch's module takes such a bias with batch_first only.
    """
    widths = {"kdim": 5, "vdim": 6} if kind == "widths" else {}
    theirs, ours = twins(24, 3, batch_first=batch_first, **widths)
    bias = theirs.in_proj_bias.detach().to(dtype)
    theirs.in_proj_bias = nn.Parameter(bias.double())
    ours.in_proj_bias = nn.Parameter(bias)
    a, b, c = (draw(2, 7, n, seed=n) for n in (24, ours.kdim, ours.vdim))
    b, c = (b, c) if widths else (b + 1, c + 2)
    inputs = {"self": (a, a, a), "query is key": (a, a, b), "key is value": (a, b, b)}.get(
        kind, (a, b, c)
    )
    run = torch.jit.script(ours) if scripted else ours
    expected, got = theirs(*inputs)[0], run(*inputs)[0]
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), theirs.in_proj_bias)
    (ours_gradient,) = torch.autograd.grad(got.sum(), ours.in_proj_bias)
    assert ours_gradient.dtype == dtype
    torch.testing.assert_close(ours_gradient, gradient.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_module_takes_such_a_bias(dtype):
    # What the test above asks of ours.
    theirs, _ = twins(24, 3, batch_first=True)
    theirs.in_proj_bias = nn.Parameter(theirs.in_proj_bias.detach().to(dtype))
    x = draw(2, 7, 24, seed=0)
    assert theirs(x, x, x)[0].dtype == torch.float64
