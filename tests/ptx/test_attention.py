"""The PTX of attention's kernels, within the bounds that the executor's tests have."""

import itertools

import pytest
from hypothesis import given, settings

from tests.simt.attention_cases import BF16, F16, F32, NAN, PRECISION, both, gradient, inputs
from tests.simt.test_attention_kernels import MASKS, assert_backward, assert_forward, problems
from tests.simt.test_kernels import bits, same

from .attention import PtxAttention
from .machine import Order

pytestmark = pytest.mark.usefixtures("programs")


def check(arguments, order=None):
    found, grads = both(PtxAttention(order), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)
    return found, grads


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width(dtype, width):
    options = {"heads": 2, "kv_heads": 1, "dropout_p": 0.2, "softcap": 3.0, "is_causal": True}
    sizes = {"head_dim": width, "value_dim": width, "queries": 70, "keys": 40}
    check(inputs(dtype, return_unrounded=width in (32, 128), **sizes, **options))


@pytest.mark.parametrize(
    "mask, dtype", list(zip(MASKS, itertools.cycle([BF16, F16, F32]), strict=False))
)
def test_every_mask(mask, dtype):
    options = {"batch": 2, "padding": "some", "mask": mask, "clamp": 0.3}
    check(inputs(dtype, head_dim=16, value_dim=24, queries=50, keys=70, **options))


def test_the_last_rows_of_several_tiles():
    """Three tiles of keys and two of queries, in heads that lie side by side."""
    check(inputs(F16, heads=2, kv_heads=2, queries=131, keys=75, padding="of the first tiles"))


@pytest.mark.parametrize("dtype", PRECISION)
def test_the_order_of_the_blocks_changes_no_bit(dtype):
    arguments = inputs(dtype, heads=2, queries=70, keys=40, is_causal=True, dropout_p=0.1)
    expected = bits(itertools.chain(*both(PtxAttention(), arguments)))
    found = both(PtxAttention(Order("mixed", 1)), arguments)
    assert same(bits(itertools.chain(*found)), expected)


def test_a_padded_key_that_is_nan_reaches_nothing():
    arguments = inputs(BF16, padding="some", queries=40, keys=70)
    query, key, value, mask, *rest = arguments
    hidden = mask[:, None, :, None]
    poisoned = (query, key.masked_fill(hidden, NAN), value.masked_fill(hidden, NAN), mask, *rest)
    expected = bits(itertools.chain(*both(PtxAttention(), arguments)))
    assert same(bits(itertools.chain(*both(PtxAttention(), poisoned))), expected)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(problems())
def test_drawn_problems(problem):
    check(inputs(**problem), Order("mixed", problem["seed"]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_every_dtype(mask, dtype):
    options = {"batch": 2, "padding": "some", "mask": mask}
    check(inputs(dtype, head_dim=16, value_dim=16, queries=110, keys=100, **options))
