"""What each threshold does, and what it learns from, by the operator that decides."""

import math
import random
import statistics

import pytest
import torch

from fastguard.ops import Verdict
from fastguard.thresholds import AdaGC, AutoClip, RunningMedian, ZClip
from tests.ops.decide_cases import THRESHOLDS, decide, double, fresh, measured
from tests.tensors import assert_same_bits, bits


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
