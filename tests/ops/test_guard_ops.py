"""The operators of GradGuard: the decision with its statistics, buffers and micro-batches."""

import math
import random
import statistics
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.guard.statistics import unseen
from fastguard.ops import Verdict
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip
from tests.drawn import DTYPES, gradients
from tests.simt.kernels.devices import DEVICES, on_devices
from tests.test_clip import assert_same_bits, bits

from .test_ops import needs_kernel, owned

THRESHOLDS = [
    Fixed(),
    ZClip(warmup=5),
    RunningMedian(warmup=4),
    AutoClip(warmup=3),
    AdaGC(warmup=4),
]


def double(value):
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def fresh(window=128, n=3):
    zeros = [torch.zeros(size, dtype=torch.float64) for size in (4, window, window)]
    return ops.Statistics(*zeros, unseen(n, "cpu"))


def measured(*norms):
    norms = double(list(norms))
    return ops.GradNorm(norms.square().sum().sqrt(), norms, None)


def decide(
    found,
    known,
    threshold,
    max_norm=1.0,
    skip_norm=math.inf,
    function=ops.guard_decide_,
    step=0,
    **scalars,
):
    unscale, loss = (double(scalars.get(name)) for name in ("unscale", "loss"))
    return function(found, unscale, loss, known, step, threshold, max_norm, skip_norm)


def decide_by_reference(
    found, known, threshold, max_norm=1.0, skip_norm=math.inf, step=0, **scalars
):
    unscale, loss = (double(scalars.get(name)) for name in ("unscale", "loss"))
    rest = (step, threshold.kind, max_norm, skip_norm, threshold.options)
    return ops.guard_decide_ref_(*found[:2], unscale, loss, *known, *rest)


# The squares of 1e-40 and 2.46e-214 are tiny and 0 in float64, those of 1e160 overflow.
STRANGE = [0.0, 2.46e-214, 1e-40, 30.0, 100.0, 1e30, 1e160, math.nan, math.inf]
norm = st.one_of(st.floats(0, 5), st.sampled_from(STRANGE))
step = st.tuples(
    norm,
    norm,
    norm,
    st.sampled_from([None, 0.5, 3.0]),
    st.sampled_from([None, None, 1.0, math.nan, -math.inf]),
)
FUNCTIONS = [ops.guard_decide_, *on_devices("guard_decide_")]


def same(here, there):
    for a, b in zip(here, there, strict=True):
        # What is denormal has fewer digits than 12: a mean of 1e-161 has a square of 3.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=sys.float_info.min, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(norm, max_size=30), st.lists(step, max_size=40), st.sampled_from([1, 7, 128]))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_the_native_decision_is_that_of_the_reference(threshold, function, before, steps, window):
    ours, reference = fresh(window), fresh(window)
    for known in (ours, reference):  # so that some steps are judged by a median
        for norm in before:
            decide_by_reference(measured(norm, 0.1, 0.0), known, threshold, 1.5, 8.0)
    for number, (*norms, unscale, loss) in enumerate(steps):
        found = measured(*norms)
        scalars = {"unscale": unscale, "loss": loss, "step": 40 * number}
        here = decide(found, ours, threshold, 1.5, 8.0, function, **scalars)
        same(
            (*here, *ours),
            (*decide_by_reference(found, reference, threshold, 1.5, 8.0, **scalars), *reference),
        )
        assert all(t.isfinite().all() for t in ours[:3])
        assert not ours.per_tensor.isnan().any()


any_number = st.one_of(st.floats(), st.sampled_from([-1.0, 0.5, 15.5, 16.0, 1e300, math.nan]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_number, min_size=4, max_size=4),
    st.lists(any_number, min_size=14, max_size=14),
    st.lists(any_number, min_size=4, max_size=4),
    st.lists(any_number, min_size=2, max_size=2),
    st.floats(0, 100),
)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_whatever_the_statistics_hold_nothing_is_read_or_written_beside_them(
    threshold, function, numbers, norms, columns, options, value
):
    """A count of -5 or 1e300, a quantile of 1e9: an index made of them must lie in the window.

    Each window lies between the other tensors in one block of memory, whose values would change.
    The executor of the CUDA kernels finds such accesses by itself.
    """

    class Odd:
        kind = threshold.kind

    Odd.options = [*options, 3.0]
    block, there = (torch.full((42,), 77.0, dtype=torch.float64) for _ in range(2))
    views = [
        ops.Statistics(b[4:8], b[12:19], b[24:31], b[34:38].view(4, 1)) for b in (block, there)
    ]
    for known in views:
        known.numbers.copy_(double(numbers))
        known.seen_norms.copy_(double(norms[:7]))
        known.accepted_norms.copy_(double(norms[7:]))
        known.per_tensor.copy_(double(columns)[:, None])
    found = measured(value)
    here = decide(found, views[0], Odd, 1.5, 8.0, function)
    same((*here, block), (*decide_by_reference(found, views[1], Odd, 1.5, 8.0), there))


def limits(threshold, norms, max_norm=math.inf):
    """The threshold in force at each of these norms, all of which are accepted."""
    known = fresh(n=1)
    return [decide(measured(n), known, threshold, max_norm).record[3].item() for n in norms]


def test_zclip_as_published():
    """Against the paper's algorithm in Python floats."""
    generator = torch.Generator().manual_seed(0)
    norms = (1 + 0.1 * torch.randn(60, generator=generator, dtype=torch.float64)).tolist()
    norms[30], norms[45] = 9.0, 100.0
    mean = statistics.fmean(norms[:10])
    variance = statistics.pvariance(norms[:10])
    expected = [math.inf] * 10
    for norm in norms[10:]:
        z = (norm - mean) / math.sqrt(variance)
        expected.append(mean + 2.5 * math.sqrt(variance) / (z / 2.5) if z > 2.5 else math.inf)
        clipped = min(norm, expected[-1])
        mean = 0.9 * mean + 0.1 * clipped
        variance = 0.9 * variance + 0.1 * (clipped - mean) ** 2
    found = limits(ZClip(z=2.5, alpha=0.9, warmup=10), norms)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[30] < 2
    assert found[45] < 2


def test_running_median_and_autoclip_against_python():
    norms = [float(i * 37 % 50 + 1) for i in range(200)]
    medians = [statistics.median(norms[max(0, i - 128) : i]) for i in range(16, 200)]
    assert limits(RunningMedian(factor=2.0), norms)[16:] == [2 * m for m in medians]
    deciles = [
        torch.quantile(double(norms[max(0, i - 128) : i]), 0.1).item() for i in range(16, 200)
    ]
    assert limits(AutoClip(percentile=10), norms)[16:] == pytest.approx(deciles)


@pytest.mark.parametrize("threshold", THRESHOLDS[1:4], ids=lambda t: type(t).__name__)
def test_max_norm_caps_what_is_learnt_and_holds_during_the_warm_up(threshold):
    found = limits(threshold, [5.0, 6.0, 7.0, 500.0] * 10, max_norm=2.0)
    assert set(found) == {2.0}


def test_adagc_clips_the_one_tensor_that_spikes():
    known = fresh(n=3)
    threshold = AdaGC(relative=1.05, beta=0.9, warmup=2)
    for _ in range(2):
        decide(measured(0.3, 0.2, 0.0), known, threshold)
    assert known.ema_norms.tolist() == [0.3, 0.2, math.inf]
    coefs, verdict, record = decide(measured(0.3, 20.0, 0.1), known, threshold)
    assert coefs.tolist() == pytest.approx([1.0, 1.05 * 0.2 / 20.0, 1.0])
    assert verdict == Verdict.CLIP
    assert record[1] == coefs.min()
    assert known.ema_norms.tolist() == pytest.approx([0.3, 0.9 * 0.2 + 0.1 * 0.21, 0.1])


def test_adagc_clips_the_global_norm_while_it_warms_up():
    known = fresh(n=2)
    coefs = decide(measured(3.0, 4.0), known, AdaGC(warmup=2), max_norm=1.0).grad_coef
    assert coefs.tolist() == pytest.approx([0.2, 0.2], rel=1e-5)
    assert known.ema_norms.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_no_threshold_learns_from_what_was_skipped(threshold):
    """One NaN ends ZClip's clipping for ever, and OLMo-core's for the next 128 steps.

    Only the norms by which outliers are judged take in the outliers.
    """
    clean, hit = fresh(), fresh()
    outliers = 0
    for i in range(60):
        normal = measured(1.0 + i % 5 / 10, 0.1, 0.1)
        bad = measured(*[(math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (1e30, 1.0, 1.0)][i % 3])
        outliers += i > 20 and i % 3 == 2
        if i > 20:
            assert decide(bad, hit, threshold, skip_norm=5.0).verdict >= Verdict.SKIP_NONFINITE
            skipped = decide(normal, hit, threshold, loss=math.nan)
            assert skipped.verdict == Verdict.SKIP_NONFINITE
        here, there = (decide(normal, known, threshold, skip_norm=5.0) for known in (clean, hit))
        assert_same_bits(bits(here[:2]), bits(there[:2]))
    assert_same_bits(bits([clean.accepted_norms]), bits([hit.accepted_norms]))
    assert_same_bits(bits(clean.per_tensor[:2]), bits(hit.per_tensor[:2]))
    assert_same_bits(bits([clean.numbers[1:]]), bits([hit.numbers[1:]]))
    assert hit.seen == clean.seen + outliers == 60 + 13
    assert (hit.seen_norms == 1e30).sum() == outliers


def coefficients(threshold, norms, max_norm=math.inf):
    """What AdaGC lets through of the only tensor, at each of these norms."""
    known = fresh(n=1)
    decided = [
        decide(measured(norm), known, threshold, max_norm, step=step)
        for step, norm in enumerate(norms)
    ]
    return [decision.record[1].item() for decision in decided]


@pytest.mark.parametrize("rise", [3.0, 10.0, 1000.0])
def test_zclip_finds_a_level_to_which_norms_have_risen_for_good(rise):
    """As published it clips to 6 % of a norm that is ten times the old ones, for ever."""
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(600, generator=generator)).exp().tolist()
    level = [0.1] * 200 + [0.1 * rise] * 400
    norms = [x * y for x, y in zip(noise, level, strict=True)]
    found = limits(ZClip(), norms)
    clipped = [norm > limit for norm, limit in zip(norms, found, strict=True)]
    assert all(clipped[200:240])
    assert sum(clipped[266:]) < 20  # the noise of the new level
    # And the limit tightens around the new level.
    assert limits(ZClip(), [*norms, 100 * rise])[-1] < 0.2 * rise


@pytest.mark.parametrize("spikes", [1, 10])
@pytest.mark.parametrize("threshold", [ZClip(), AdaGC()], ids=lambda t: type(t).__name__)
def test_a_few_spikes_are_no_new_level(threshold, spikes):
    norms = [0.1 + 0.001 * (i % 7) for i in range(300)]
    spiked = [*norms[:200], *[50.0] * spikes, *norms[200:]]
    if isinstance(threshold, ZClip):
        after = limits(threshold, [*spiked, 50.0])[-1]
    else:
        after = 50.0 * coefficients(threshold, [*spiked, 50.0])[-1]
    assert after < 0.2


@pytest.mark.parametrize("rise", [3.0, 10.0, 100.0])
def test_adagc_finds_a_level_to_which_a_norm_has_risen_for_good(rise):
    found = coefficients(AdaGC(), [0.1] * 200 + [0.1 * rise] * 400)
    assert found[199] == 1.0
    assert found[200] == pytest.approx(1.05 / rise, rel=1e-3)
    assert found[327] < 0.5  # as published: 0.1 % more with each step
    assert min(found[329:]) > 0.85


def test_adagc_restarts_only_after_steps_in_a_row():
    """A tensor that is clipped in nine steps of ten keeps its average."""
    norms = [0.1] * 200 + [0.1 if i % 10 == 0 else 1.0 for i in range(400)]
    assert coefficients(AdaGC(), norms)[-1] < 0.2


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_the_usual_norm_of_each_tensor(threshold):
    """Against Python: all thresholds keep it, and skipped steps count."""
    known, usual, since = fresh(), [math.inf] * 3, [-1] * 3
    rng = random.Random(0)
    for step in range(200):
        norms = [rng.lognormvariate(0, 0.3), 0.0 if step % 3 else 2.0, 0.01 * 1.2 ** (step % 60)]
        if step in (50, 51, 52, 120):
            norms[0] *= 1e4
        loss = math.nan if step in (30, 51) else 1.0
        decide(measured(*norms), known, threshold, 1.0, 5.0, loss=loss, step=step)
        for i, norm in enumerate(norms):
            if loss != 1.0 or norm == 0:
                continue
            if usual[i] == math.inf:
                usual[i] = norm
                continue
            above = norm > 4 * usual[i]
            since[i] = (step if since[i] < 0 else since[i]) if above else -1
            usual[i] = 0.98 * usual[i] + 0.02 * min(norm, 4 * usual[i])
        assert known.usual_norms.tolist() == pytest.approx(usual)
        assert known.risen_since.tolist() == since
        if step == 52:
            assert since[0] == 50  # a step with a bad loss says nothing


def test_tensors_are_not_remembered_where_there_are_no_columns():
    known = fresh(n=0)
    assert decide(measured(3.0, 4.0), known, Fixed()).verdict == Verdict.CLIP
    assert known.per_tensor.shape == (4, 0)
    assert known.seen == 1


def test_the_coefficient_unscales_too():
    known = fresh(n=1)
    coef, _, record = decide(measured(1000.0), known, Fixed(), max_norm=1.0, unscale=1 / 256)
    assert record[2].item() == 1000 / 256
    assert coef.item() == pytest.approx(1 / 1000, rel=1e-5)
    assert record[1].item() == pytest.approx(256 / 1000, rel=1e-5)
    assert known.seen_norms[0] == known.accepted_norms[0] == 1000 / 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"found": ops.GradNorm(torch.tensor(1.0), torch.ones(3).double(), None)},
        {"known": fresh()._replace(numbers=torch.zeros(3, dtype=torch.float64))},
        {"known": fresh()._replace(seen_norms=torch.zeros(4, dtype=torch.float64))},
        {"known": fresh(window=0)},
        {"known": fresh(n=2)},
        {"known": fresh(n=0), "threshold": AdaGC()},
        {"known": fresh()._replace(per_tensor=torch.zeros(3, 3, dtype=torch.float64))},
    ],
)
@needs_kernel
def test_guard_decide_refuses(wrong):
    arguments = {"found": measured(1.0, 1.0, 1.0), "known": fresh(), "threshold": Fixed()} | wrong
    with pytest.raises(RuntimeError, match=r"guard_decide_: .*(must|needs).*got"):
        decide(**arguments)


APPLY, SKIP = torch.tensor(int(Verdict.APPLY)), torch.tensor(int(Verdict.SKIP_OUTLIER))


def buffers():
    return [
        torch.randn(5),
        torch.tensor(7),
        torch.randn(3, 4).t(),
        torch.randn(6, 2)[:, 0],
        torch.tensor([True, False]),
        torch.zeros(0),
    ]


def numbered(tensors):
    """As if each buffer had an owner of its own."""
    return torch.arange(len(tensors))


SETTLE = [ops.settle_, ops.settle_ref_, *on_devices("settle_")]


@pytest.mark.parametrize("function", SETTLE)
@pytest.mark.parametrize("verdict", Verdict)
def test_settle(function, verdict):
    current, saved = buffers(), [b.clone() for b in buffers()]
    expected = bits(saved if verdict.skipped else current)
    lost = function(current, saved, torch.tensor(int(verdict)), numbered(current))
    assert_same_bits(bits(current), expected)
    assert_same_bits(bits(saved), expected)
    assert lost.tolist() == [0] * 2 * len(current)


@pytest.mark.parametrize("function", SETTLE)
@pytest.mark.parametrize("dtype", [*DTYPES, *ops.COMPLEX_DTYPES])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_settle_never_saves_what_is_finite_no_more(function, dtype, bad):
    """Nor the other buffers of the same owner; those of others are saved."""
    value = complex(1.0, bad) if dtype.is_complex else bad
    saved = [torch.full((3, 9_001), 0.5).to(dtype).t(), torch.tensor(3), torch.ones(2).to(dtype)]
    saved[0][5, 2] = -value  # what was not finite before protects nothing
    current = [s + 1 for s in saved]
    owners = torch.tensor([1, 1, 0])
    assert not function(current, saved, APPLY, owners).any()
    before = [s.clone() for s in saved]
    current[0][9_000, 1] = value
    current[1] += 4
    current[2] += 1
    later = current[2].clone()
    lost = function(current, saved, APPLY, owners)
    assert lost.bool().tolist() == [True, False, False, False, True, False]
    for tensors in (current, saved):
        assert_same_bits(bits(tensors), bits([*before[:2], later]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3))
@pytest.mark.parametrize("function", [ops.settle_, *on_devices("settle_")])
def test_settle_is_that_of_the_reference(function, data, verdict):
    numbers = st.sampled_from([0.0, 1.5, -2.0, math.nan, math.inf, -math.inf])
    n = data.draw(st.integers(1, 5))
    drawn = []
    for _ in range(n):
        dtype = data.draw(st.sampled_from([*DTYPES, *ops.COMPLEX_DTYPES, torch.int64, torch.bool]))
        size = data.draw(st.integers(0, 4))
        pair = [data.draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(2)]
        if dtype in (torch.int64, torch.bool):
            pair = [[x == 1.5 for x in values] for values in pair]
        drawn.append([torch.tensor(values).to(dtype) for values in pair])
    owners = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    found, expected = ([[t.clone() for t in pair] for pair in drawn] for _ in range(2))
    lost = function(*map(list, zip(*found, strict=True)), torch.tensor(verdict), owners)
    right = ops.settle_ref_(*map(list, zip(*expected, strict=True)), torch.tensor(verdict), owners)
    assert torch.equal(lost > 0, right > 0)
    for pair, other in zip(found, expected, strict=True):
        assert_same_bits(bits(pair), bits(other))


@needs_kernel
def test_settle_refuses_lists_that_do_not_match():
    before = [torch.zeros(2), torch.zeros(2)]
    saved = [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match="buffer 1 and its saved copy differ"):
        ops.settle_(before, saved, SKIP, numbered(before))
    with pytest.raises(RuntimeError, match="2 buffers but 1 saved"):
        ops.settle_(before, saved[:1], SKIP, numbered(before))
    with pytest.raises(RuntimeError, match="2 saved copies and 1 owners"):
        ops.settle_(before, before, SKIP, torch.arange(1))
    assert torch.stack(before).eq(0).all()


@needs_kernel
@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
def test_settle_on_the_cpu_refuses_owners_that_are_not_there(wrong):
    before, saved = [torch.zeros(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)]
    with pytest.raises(RuntimeError, match=rf"owners must be numbers from 0 to 1, .* got {wrong}"):
        ops.settle_(before, saved, SKIP, torch.tensor([0, wrong]))
    assert torch.stack(before).eq(0).all()


@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
@pytest.mark.parametrize("function", on_devices("settle_"))
def test_settle_on_a_device_reads_no_owner_that_is_not_there(function, wrong):
    """The host cannot look at the numbers: such a buffer is alone."""
    current, saved = [torch.ones(2), torch.tensor([math.nan, 1.0])], [torch.zeros(2)] * 2
    saved = [s.clone() for s in saved]
    lost = function(current, saved, APPLY, torch.tensor([0, wrong]))
    assert lost.tolist() == [0, 1, 0, 1]
    assert current[0].tolist() == [1, 1] and current[1].tolist() == [0, 0]


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


SCALING = (torch.tensor([8.0]), torch.tensor([1], dtype=torch.int32), 2.0, 0.5, 3)


def in_one(function, known, threshold, grads, **kwargs):
    scaling = ops.Scaling(*(t.clone() if isinstance(t, torch.Tensor) else t for t in SCALING))
    measured, decision = function(
        grads, double(0.5), double(1.0), known, 3, threshold, 1.0, 9.0, scaling=scaling, **kwargs
    )
    return (*measured, *decision, *known, *scaling[:2])


def grad_norm_decide_ref_(grads, unscale, loss, known, step, threshold, *rest, scaling):
    found = ops.grad_norm_decide_ref_(
        *(grads, unscale, loss, *known, step, int(threshold.kind), *rest, threshold.options),
        *(*scaling[:2], scaling[2:]),
    )
    return found[:3], found[3:]


@settings(max_examples=30, deadline=None)
@given(st.lists(gradients(magnitudes=False, max_tensors=3), min_size=1, max_size=4))
@pytest.mark.parametrize(
    "function, rtol",
    [(ops.grad_norm_decide_, 1e-12)]
    + [(device.values[0].grad_norm_decide_, 1e-6) for device in DEVICES],
)
@pytest.mark.parametrize(
    "threshold", [THRESHOLDS[0], THRESHOLDS[-1]], ids=lambda t: type(t).__name__
)
def test_measured_and_decided_in_one(threshold, function, rtol, steps):
    for grads in steps:
        ours, reference = fresh(n=len(grads)), fresh(n=len(grads))
        here = in_one(function, ours, threshold, grads)
        there = in_one(grad_norm_decide_ref_, reference, threshold, grads)
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "function", [ops.grad_norm_decide_, *on_devices("grad_norm_decide_"), grad_norm_decide_ref_]
)
@pytest.mark.parametrize("scale", [4.0, 3e38, 1e-45])
def test_the_scale_grows_and_shrinks_as_a_grad_scalers(function, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scaler.scale(torch.ones(()))
    ours = ops.Scaling(torch.tensor([scale]), torch.tensor([0], dtype=torch.int32), 2.0, 0.5, 2)
    known = fresh(n=1)
    for bad in (0, 0, 0, 1, 0, 0, 1, 1, 0):
        grad = torch.tensor([math.inf if bad else 1.0])
        function([grad], None, None, known, 0, THRESHOLDS[0], 1.0, 9.0, scaling=ours)
        found = {grad.device: torch.tensor(float(bad))}
        scaler._per_optimizer_states[0]["found_inf_per_device"] = found
        scaler.update()
        assert ours.scale.item() == scaler.get_scale()
        assert ours.growth_tracker.item() == scaler._get_growth_tracker()


@pytest.mark.parametrize("function", [ops.guard_decide_, ops.grad_norm_decide_])
def test_what_a_decision_writes_has_another_version_then(function):
    """scaler.scale(loss) keeps the scale for backward, and must not get another one silently."""
    known, scaling = fresh(n=1), ops.Scaling(torch.ones(1), SCALING[1].clone(), 2.0, 0.5, 1)
    rest = (None, None, known, 0, THRESHOLDS[0], 1.0, 9.0)
    if function is ops.guard_decide_:
        function(measured(1.0), *rest)
    else:
        function([torch.ones(2)], *rest, scaling=scaling)
        assert scaling.scale._version > 0
    assert all(tensor._version > 0 for tensor in known)


def test_no_gradients_are_decided_about_where_the_statistics_are():
    known = ops.Statistics(*(t.to("meta") for t in fresh(n=0)))
    scalars = (torch.zeros((), dtype=torch.float64, device="meta"), None)
    found = ops.grad_norm_decide_([], *scalars, known, 0, THRESHOLDS[0], 1.0, 9.0)
    assert {t.device.type for part in found for t in part} == {"meta"}


@needs_kernel
def test_measured_and_decided_in_one_refuses_before_it_writes():
    known, grads = fresh(n=0), [torch.ones(2), torch.ones(2).int()]
    before = [t.clone() for t in known]
    args = (None, None, known, 0, THRESHOLDS[0], 1.0, 9.0)
    with pytest.raises(RuntimeError, match="tensor 1 has dtype"):
        ops.grad_norm_decide_(grads, *args)
    for scaling, message in (
        (ops.Scaling(torch.ones(1).double(), SCALING[1], 2.0, 0.5, 3), "one float32 and one int32"),
        (ops.Scaling(torch.ones(1), None, 2.0, 0.5, 3), "come together"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.grad_norm_decide_(grads[:1], *args, scaling=scaling)
    assert_same_bits(bits(known), bits(before))


@needs_kernel
def test_opcheck_grad_norm_decide():
    args = (double(0.5), double(1.0), *fresh(n=1), 0, int(THRESHOLDS[0].kind), 1.0, 5.0)
    torch.library.opcheck(
        torch.ops.fastguard.grad_norm_decide_.default,
        ([torch.ones(3)], *args, THRESHOLDS[0].options, *SCALING[:2], SCALING[2:]),
    )


@needs_kernel
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_opcheck_guard_decide(threshold):
    found = measured(1.0, 2.0, 3.0)
    for scalars in ((double(0.5), double(1.0)), (None, double(1.0))):  # opcheck takes NaN != NaN
        torch.library.opcheck(
            torch.ops.fastguard.guard_decide_.default,
            (
                *(found.total_norm, found.norms, *scalars, *fresh(), 0, int(threshold.kind)),
                *(1.0, 5.0, threshold.options),
            ),
        )


@needs_kernel
@pytest.mark.parametrize("verdict", [APPLY, SKIP])
def test_opcheck_settle_and_accumulate(verdict):
    torch.library.opcheck(
        torch.ops.fastguard.settle_.default,
        (buffers(), [b.clone() for b in buffers()], verdict, numbered(buffers())),
    )
    window = torch.zeros(3, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fastguard.accumulate_.default,
        ([torch.ones(3)], [torch.randn(3)], verdict, window, 1.0),
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZClip(z=-1), "ZClip: z must be a number >= 0, got -1"),
        (lambda: ZClip(alpha=1.5), "ZClip: alpha must be a number >= 0 and <= 1, got 1.5"),
        (lambda: ZClip(warmup=1), "ZClip: warmup must be a number >= 2, got 1"),
        (lambda: RunningMedian(factor=math.nan), "RunningMedian: factor .* got nan"),
        (lambda: AutoClip(percentile=101), "AutoClip: percentile .* <= 100, got 101"),
        (lambda: AdaGC(beta=-0.1), "AdaGC: beta .* got -0.1"),
    ],
)
def test_thresholds_name_what_they_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()
