"""Attention's CUDA kernels on the executor, against the reference in float64."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.ops.attention import attention_backward_ref, attention_ref
from tests import simt

from .build import ROOT
from .kernels.attention import AttentionDevice
from .test_kernels import bits, same

INF, NAN = math.inf, math.nan
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Of forward and backward, of the sums of absolute terms. 16-bit weights are rounded once and so is
# what they make; backward has the output's rounding and that of the logits' gradients as well. In
# float32 it is logits of up to 20, sums of 128 products, that are off by some 2e-6.
PRECISION = {BF16: (2 * 2**-8, 4 * 2**-8), F16: (2 * 2**-11, 4 * 2**-11), F32: (8e-6, 16e-6)}
SCHEDULES = ("round_robin", "greedy", "random", "unfair")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        AttentionDevice().attention(*inputs())
    except simt.NoCompiler as error:
        pytest.skip(str(error))


# --- problems -------------------------------------------------------------------------------------


def inputs(
    dtype=BF16,
    batch=1,
    heads=1,
    kv_heads=1,
    queries=70,
    keys=100,
    head_dim=64,
    value_dim=64,
    padding=None,
    mask=None,
    is_causal=False,
    dropout_p=0.0,
    softcap=0.0,
    clamp=INF,
    return_stats=True,
    layout="heads inside",
    seed=0,
):
    """Arguments of the operator; ``padding`` and ``mask`` say how they are drawn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, rows, columns):
        if layout == "heads outside":
            return torch.randn(batch, heads, rows, columns, generator=generator).to(dtype)
        # Rows of each head within those of all, as the projections leave them, or not aligned.
        offset = 1 if layout == "misaligned" else 0
        wide = torch.randn(batch, rows, heads, columns + offset, generator=generator).to(dtype)
        return wide[..., offset:].transpose(1, 2)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    tensors = (
        normal(heads, queries, head_dim),
        normal(kv_heads, keys, head_dim),
        normal(kv_heads, keys, value_dim),
    )
    shape = (batch, heads, queries, keys)
    masks = {
        None: None,
        "shown": uniform(*shape) < 0.7,
        "of all heads": (uniform(1, 1, queries, keys) < 0.6).expand(shape),
        "added": uniform(*shape).log() * 3,
        "of keys": (uniform(batch, 1, 1, keys) * 4).expand(shape),
        # Rows that see nothing of the first tiles, which others do see, and some that see nothing.
        "from the query on": torch.ones(shape, dtype=torch.bool).triu(),
        "from the query on, added": torch.full(shape, -INF).tril(-1),
    }
    paddings = {
        None: None,
        "some": uniform(batch, keys) < 0.4,
        "all of the first": torch.arange(batch)[:, None].expand(-1, keys) == 0,
        "after a length": torch.arange(keys) >= (uniform(batch, 1) * keys),
        "of the first tiles": (torch.arange(keys) < 64).expand(batch, -1),
    }
    given = (paddings[padding], masks[mask], torch.tensor([7 << 40 | seed, -5]))
    return (*tensors, *given, is_causal, dropout_p, 0.3, softcap, clamp, return_stats)


MASKS = ["shown", "of all heads", "added", "of keys"]
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
    if arguments[-1]:
        assert_within(found.stats[0], wanted.stats[0], 4e-6 * (1 + wanted.stats[0].abs()))
        assert_within(found.stats[1], wanted.stats[1], 2e-5)


def assert_backward(arguments, grad_output, output, found):
    """What passes the clamp is taken from the output that the kernel gave."""
    given = exact(arguments)[:-1]
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


def gradient(arguments, seed=1):
    query, _, value = arguments[:3]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*query.shape[:3], value.size(3), generator=generator)
    return drawn.to(query.dtype)


def both(device, arguments):
    """Output and gradients."""
    found = device.attention(*arguments)
    grads = device.attention_backward(
        gradient(arguments), *arguments[:3], found.output, found.logsumexp, *arguments[3:-1]
    )
    return found, grads


# --- results --------------------------------------------------------------------------------------


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
                grad, *arguments[:3], found.output, found.logsumexp, *arguments[3:-1]
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
        grad, *arguments[:3], found.output, found.logsumexp, *arguments[3:-1]
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
        *(*arguments[:3], found.output, found.logsumexp, *arguments[3:-1]),
    )
    assert grad_value[0, 0, 0, :5].tolist() == [0, 0, 2, 3, 0]


# --- order, bounds, barriers ----------------------------------------------------------------------

CASES = {
    "bfloat16, 40 of 64 columns": {
        **{"heads": 2, "kv_heads": 1, "head_dim": 40, "value_dim": 24, "mask": "shown"},
        **{"padding": "some", "dropout_p": 0.3},
    },
    "float16, 128 columns, causal": {
        **{"dtype": F16, "head_dim": 128, "value_dim": 120, "queries": 130, "keys": 130},
        **{"is_causal": True, "mask": "added", "softcap": 2.0},
    },
    "float32, 64 columns": {
        **{"dtype": F32, "head_dim": 60, "value_dim": 64, "dropout_p": 0.2, "padding": "some"},
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_result_is_the_same_on_every_schedule(case, seed):
    """The seed also draws the order of the sums in an mma, which no GPU changes between runs."""
    arguments = inputs(**CASES[case])
    results = [
        bits(both(AttentionDevice(schedule=s, seed=seed, weak_memory=s != "random"), arguments))
        for s in SCHEDULES
    ]
    assert all(same(result, results[0]) for result in results[1:])


class Both:
    """Forward and backward with the reports of each."""

    def __init__(self, **options):
        self.forward, self.backward = AttentionDevice(**options), AttentionDevice(**options)

    def attention(self, *arguments):
        return self.forward.attention(*arguments)

    def attention_backward(self, *arguments):
        return self.backward.attention_backward(*arguments)

    def removable(self):
        return {*self.forward.report.removable(), *self.backward.report.removable()}


@pytest.fixture(scope="module")
def sites():
    """Where each barrier, wait and bound is, and the cases that meet it."""
    found = {}
    for case in CASES:
        device = Both()
        both(device, inputs(**CASES[case]))
        for site in device.removable():
            found.setdefault(site, []).append(case)
    return found


def caught(site, cases, expected):
    for case, (seed, schedule) in itertools.product(cases, enumerate(SCHEDULES)):
        options = {"schedule": schedule, "seed": seed, "removed": frozenset([site])}
        try:
            found = bits(both(Both(**options), inputs(**CASES[case])))
        except simt.Error:
            return True
        if not same(found, expected(case, seed)):
            return True
    return False


def test_every_barrier_wait_and_bound_is_needed(sites):
    """The kernels with one barrier, wait or bound taken away: each is noticed."""
    known = {}

    def expected(case, seed):
        if (case, seed) not in known:
            known[case, seed] = bits(both(Both(seed=seed), inputs(**CASES[case])))
        return known[case, seed]

    assert [site for site, cases in sites.items() if not caught(site, cases, expected)] == []


def test_every_barrier_wait_and_bound_is_met(sites):
    text = re.compile(r"\b(within|__syncthreads|__syncwarp|wait_async(<\d>)?)\(")
    met = {site.rsplit(":", 1)[0] for site in sites}
    for path in sorted((ROOT / "csrc/cuda").glob("attention*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if text.search(line.split("//")[0]):
                assert f"{path.relative_to(ROOT)}:{number}" in met


# --- what is moved and computed -------------------------------------------------------------------


def counted(**problem):
    device = Both(count=True)
    both(device, inputs(**problem))
    return device.forward.report, device.backward.report


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_shared_memory_is_read_without_bank_conflicts(dtype, width):
    reports = counted(dtype=dtype, head_dim=width, value_dim=width, is_causal=True)
    for report in reports:
        if dtype != F32:
            assert report.total("calls", "ldmatrix") > 0
            assert report.total("conflicts", "ldmatrix", "shared_store") == 0
        assert report.total("conflicts", "shared_load") == 0


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [128, 256])
def test_memory_is_read_and_written_in_proportion_to_the_length(dtype, length):
    """Of what is read and written each sector counts once: nothing of T x S is among it."""
    options = {"dtype": dtype, "queries": length, "keys": length, "return_stats": False}
    forward, backward = counted(heads=2, kv_heads=2, **options)
    size = 2 * length * 64 * (2 if dtype == BF16 else 4)  # bytes of a tensor
    rows = 2 * length * 4  # of a number for each row
    (launch,) = forward.launches
    assert (launch.loaded_sectors * 32, launch.stored_sectors * 32) == (3 * size, size + rows)
    moved = [(x.kernel, 32 * x.loaded_sectors, 32 * x.stored_sectors) for x in backward.launches]
    assert moved == [
        ("attention_delta_kernel", 2 * size + rows, size + 2 * rows),
        ("attention_grad_query_kernel", 4 * size + 2 * rows, size),
        ("attention_grad_key_kernel", 4 * size + 2 * rows, 2 * size),
    ]
    for report in (forward, backward):
        for site in report.of("copy_async", "load", "store"):
            if site.bytes == 16:
                assert site.sectors == site.calls * 16 / 32, site


def test_tiles_without_a_visible_key_are_left_out():
    def products(**problem):
        return [r.total("requests", "mma") for r in counted(queries=256, keys=256, **problem)]

    whole = products()
    assert whole == [2 * 256 * 256 * 64 // 2048, 7 * 256 * 256 * 64 // 2048]
    # Of 2 x 8 tiles of 128 x 32 there are 12 at or below the diagonal, of 4 x 4 of 64 x 64 10.
    assert products(is_causal=True) == [whole[0] * 12 // 16, whole[1] * 10 // 16]
    assert products(padding="of the first tiles") == [n * 3 // 4 for n in whole]
