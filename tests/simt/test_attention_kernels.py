"""Attention's CUDA kernels on the executor, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.ops.attention import attention_backward_ref, attention_ref
from tests.simt.attention_cases import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    PRECISION,
    SCHEDULES,
    both,
    gradient,
    inputs,
)

from .kernels.attention import AttentionDevice
from .test_kernels import bits, same

pytestmark = pytest.mark.usefixtures("attention_compiler")

MASKS = ["shown", "of all heads", "added", "of keys"]

MASKS += ["added, operands' dtype", "of keys, operands' dtype"]

MASKS += ["from the query on", "from the query on, added"]


def problems():
    width = st.sampled_from([1, 8, 20, 32, 64, 72, 96, 100, 128])
    length = st.integers(1, 140)
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([BF16, F16, F32]),
            "batch": st.integers(1, 2),
            "heads": st.sampled_from([2, 4]),
            "kv_heads": st.integers(1, 2),
            "queries": length,
            "keys": length,
            "head_dim": width,
            "value_dim": width,
            "padding": st.sampled_from(
                [None, "some", "all of the first", "after a length", "of the first tiles"]
            ),
            "mask": st.sampled_from([None, *MASKS]),
            "is_causal": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.3]),
            "softcap": st.sampled_from([0.0, 1.5]),
            "clamp": st.sampled_from([INF, 0.3]),
            "return_stats": st.booleans(),
            "return_unrounded": st.booleans(),
            "layout": st.sampled_from(["heads inside", "heads outside", "misaligned"]),
            "seed": st.integers(0, 1000),
        }
    )


def exact(arguments):
    """The same in float64."""
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def weights(arguments, dropped):
    """(B, H, T, S), as the values meet them or before dropout."""
    query, key, _, padding, mask, seed, causal, dropout_p, scale, softcap, *_ = arguments
    eye = torch.eye(key.size(2), dtype=F64).expand(*key.shape[:3], key.size(2))
    options = (padding, mask, seed, causal, dropout_p if dropped else 0.0, scale, softcap, INF)
    return attention_ref(query, key, eye, *options, False).output


def grouped(x, heads):
    return x.repeat_interleave(heads // x.size(1), dim=1)


def summed(x, kv_heads):
    return x.unflatten(1, (kv_heads, -1)).sum(2)


def assert_within(found, wanted, bound, least=1e-6):
    assert found.dtype in PRECISION
    same_kind = torch.where(wanted.isfinite(), 0.0, wanted)
    torch.testing.assert_close(
        torch.where(found.isfinite(), 0.0, found.double()), same_kind, equal_nan=True
    )
    excess = torch.where(wanted.isfinite(), (found.double() - wanted).abs() - bound - least, 0.0)
    assert excess.max() <= 0


def assert_forward(arguments, found):
    given = exact(arguments)
    wanted = attention_ref(*given)
    absolute = [*given]
    absolute[2], absolute[10] = given[2].abs(), INF
    terms = attention_ref(*absolute).output
    precision = PRECISION[arguments[0].dtype][0]
    assert_within(found.output, wanted.output, precision * terms)
    assert_within(found.logsumexp, wanted.logsumexp, 4e-6 * (1 + wanted.logsumexp.abs()))
    *_, return_stats, return_unrounded = arguments
    if return_unrounded:
        assert found.unrounded.dtype == F32
        torch.testing.assert_close(
            found.unrounded.to(found.output.dtype), found.output, rtol=0, atol=0, equal_nan=True
        )
    if return_stats:
        assert_within(found.stats[0], wanted.stats[0], 4e-6 * (1 + wanted.stats[0].abs()))
        assert_within(found.stats[1], wanted.stats[1], 2e-5)


def assert_backward(arguments, grad_output, output, found):
    """What passes the clamp is taken from the output that the kernel gave."""
    given = exact(arguments)[:-2]
    query, key, value, *_ = given
    scale, clamp, heads = given[8], given[10], query.size(1)
    bound = torch.tensor(clamp).to(output.dtype)
    passed = torch.where(output.abs() < bound, grad_output, 0).double()
    given[10] = INF
    wanted = attention_backward_ref(passed, query, key, value, None, None, *given[3:])

    met, plain = weights(given, True), weights(given, False)
    passed, all_keys, all_values = passed.abs(), grouped(key, heads), grouped(value, heads)
    dropped = torch.where(plain > 0, met / plain, 0.0)
    products = passed @ all_values.abs().transpose(2, 3) * dropped
    products += (passed * (met @ all_values.abs())).sum(-1, keepdim=True)
    slopes = plain * products * scale
    terms = (
        slopes @ all_keys.abs(),
        summed(slopes.transpose(2, 3) @ query.abs(), key.size(1)),
        summed(met.transpose(2, 3) @ passed, key.size(1)),
    )
    precision = PRECISION[arguments[0].dtype][1]
    for a, b, of_terms in zip(found, wanted, terms, strict=True):
        assert_within(a, b, precision * of_terms)


@settings(max_examples=20, deadline=None)
@given(problems(), st.sampled_from(SCHEDULES))
def test_output_and_gradients_are_the_references(problem, schedule):
    arguments = inputs(**problem)
    device = AttentionDevice(schedule=schedule, seed=problem["seed"], weak_memory=True)
    found, grads = both(device, arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width(dtype, width):
    options = {"heads": 2, "kv_heads": 1, "dropout_p": 0.2, "softcap": 3.0, "is_causal": True}
    arguments = inputs(dtype, head_dim=width, value_dim=width, queries=70, keys=70, **options)
    found, grads = both(AttentionDevice(), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(dtype, mask):
    options = {"batch": 2, "head_dim": 16, "value_dim": 16, "padding": "some", "mask": mask}
    arguments = inputs(dtype, queries=110, keys=100, **options)
    found, grads = both(AttentionDevice(), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)


@pytest.mark.parametrize("dtype", PRECISION)
def test_a_row_without_a_key_is_zero_and_gives_no_gradient(dtype):
    options = {"batch": 2, "padding": "of the first tiles", "is_causal": True, "clamp": 1.0}
    arguments = inputs(dtype, queries=80, keys=100, **options)
    found = AttentionDevice().attention(*arguments)
    assert torch.all(found.output[:, :, :64] == 0) and torch.all(found.output[:, :, 64:] != 0)
    assert torch.all(found.logsumexp[:, :, :64] == INF)
    assert torch.all(found.stats[0, :, :, :64] == -INF) and torch.all(found.stats[1, ..., :64] == 0)
    grad = gradient(arguments)
    results = []
    for of_dead_rows in (0.0, NAN):
        grad[:, :, :64] = of_dead_rows
        results.append(
            AttentionDevice().attention_backward(
                grad, *arguments[:3], found.output, found.logsumexp, *arguments[3:-2]
            )
        )
    assert same(bits(results[0]), bits(results[1]))
    assert not any(x.isnan().any() for x in results[0])
    assert torch.all(results[0][0][:, :, :64] == 0)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("padding", ["some", "of the first tiles", "all of the first"])
def test_nan_in_a_padded_key_reaches_nothing(dtype, padding):
    arguments = inputs(dtype, batch=2, padding=padding, dropout_p=0.2)
    query, key, value, mask, *rest = arguments
    expected = both(AttentionDevice(), arguments)
    hidden = mask[:, None, :, None]
    for bad in (NAN, INF):
        poisoned = (query, key.masked_fill(hidden, bad), value.masked_fill(hidden, bad))
        found = both(AttentionDevice(), (*poisoned, mask, *rest))
        assert same(bits(found), bits(expected))
    for grad in expected[1][1:]:
        assert torch.all(grad.masked_select(hidden) == 0)


def test_a_padded_key_has_zero_gradients_though_nan_comes_back():
    arguments = inputs(BF16, padding="some")
    found = AttentionDevice().attention(*arguments)
    grad = gradient(arguments)
    grad[0, 0, 3] = NAN
    _, *grads = AttentionDevice().attention_backward(
        grad, *arguments[:3], found.output, found.logsumexp, *arguments[3:-2]
    )
    hidden = arguments[3][:, None, :, None]
    for x in grads:
        assert torch.all(x.masked_select(hidden) == 0)
        assert x.isnan().any(-1)[~arguments[3][:, None]].all()


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_in_a_valid_input_passes_the_clamp(dtype, which):
    arguments = inputs(dtype, clamp=0.5)
    arguments[("query", "key", "value").index(which)][0, 0, 5, 7] = NAN
    found, grads = both(AttentionDevice(), arguments)
    assert_forward(arguments, found)
    assert grads[0].isnan().any()


@pytest.mark.parametrize("dtype", PRECISION)
def test_nan_in_a_value_gives_no_gradient_to_rows_that_do_not_see_it(dtype):
    arguments = list(inputs(dtype, mask="shown", clamp=1.0))
    arguments[2][0, 0, 5] = NAN
    arguments[4][0, 0, :, 5] = torch.arange(70) >= 32
    _, grads = both(AttentionDevice(), arguments)
    assert not grads[0][0, 0, :32].isnan().any() and grads[0][0, 0, 32:].isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_dropout_keeps_what_the_reference_keeps(seed):
    """157,000 weights: some draw the very threshold."""
    options = {"heads": 8, "kv_heads": 8, "queries": 140, "keys": 140, "dropout_p": 0.5}
    arguments = inputs(F32, head_dim=4, value_dim=4, seed=seed, **options)
    found, grads = both(AttentionDevice(), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)


@pytest.mark.parametrize("dtype", PRECISION)
def test_the_gradient_stops_at_the_bound(dtype):
    """Where the output is the bound itself, as its dtype has it, nothing passes; NaN neither."""
    arguments = list(inputs(dtype, keys=1, queries=3, clamp=0.3, return_stats=False))
    bound = torch.tensor(0.3).to(dtype)
    below = torch.nextafter(bound, torch.zeros_like(bound))
    arguments[2][0, 0, 0, :5] = torch.tensor([-bound, bound, below, -below, 5.0])
    found = AttentionDevice().attention(*arguments)
    assert torch.equal(
        found.output[0, 0, 0, :5], torch.stack([-bound, bound, below, -below, bound])
    )
    found.output[0, 0, 1, 2] = NAN
    _, _, grad_value = AttentionDevice().attention_backward(
        torch.ones_like(found.output),
        *(*arguments[:3], found.output, found.logsumexp, *arguments[3:-2]),
    )
    assert grad_value[0, 0, 0, :5].tolist() == [0, 0, 2, 3, 0]
