"""Which finite norms are outliers: GradGuard.step, driven with series of norms."""

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, Verdict
from fastguard.thresholds import AdaGC, RunningMedian

from .test_grad_guard import set_gradient_norms


class Driven:
    """A guard whose gradients have the norms that it is given."""

    def __init__(self, skip_norm=10.0, patience=1000, **kwargs):
        self.parameters = [nn.Parameter(torch.zeros(4))]
        self.optimizer = fastguard.AdamW(self.parameters, lr=0.0)
        self.guard = GradGuard(
            self.parameters, 0.5, skip_norm=skip_norm, patience=patience, **kwargs
        )

    def step(self, norm, **kwargs):
        set_gradient_norms(self.parameters, norm)
        return self.guard.step(self.optimizer, **kwargs)

    def verdicts(self, norms):
        return [self.step(norm).verdict for norm in norms]

    def skipped(self, norms):
        """The places of the norms whose steps were skipped."""
        return [i for i, verdict in enumerate(self.verdicts(norms)) if verdict.skipped]


def noisy(level, rng, noise=0.4):
    """Norms as a training has them: lognormal around their level."""
    return [norm * rng.lognormvariate(0.0, noise) for norm in level]


small, large = st.floats(0.1, 9.0), st.floats(11.0, 1e6)


@given(
    st.one_of(st.lists(small, min_size=14, max_size=18), st.lists(large, min_size=60, max_size=70)),
    st.lists(st.one_of(small, large, st.sampled_from([0.0, math.nan])), max_size=150),
)
@settings(max_examples=60, deadline=None)
def test_the_rule_in_python(start, norms):
    driven, seen = Driven(), []
    for norm in start + norms:
        recent = seen[-128:]
        enough = len(recent) >= 16
        usual = statistics.median([*recent, math.inf]) if enough else math.inf
        limit = max(10.0, 4 * usual)
        assert driven.guard.outlier_above == limit
        report = driven.step(norm)
        if math.isnan(norm):
            assert report.verdict is Verdict.SKIP_NONFINITE
            continue
        norm = report.total_norm  # rounded to float32
        rule = enough and norm > 10.0 and norm > 4 * statistics.median([*recent, norm])
        assert (report.verdict is Verdict.SKIP_OUTLIER) == rule
        assert report.outlier_above == limit
        seen += [norm] if norm > 0 else []


def test_the_edges_of_the_rule():
    """Above, not equal; both of the two; from the 17th norm on."""
    driven = Driven(skip_norm=8.0)
    assert driven.skipped([1.0] * 15 + [1e6]) == []
    assert driven.skipped([8.0]) == []
    assert driven.skipped([8.001]) == [0]
    driven = Driven(skip_norm=8.0)
    assert driven.skipped([4.0] * 16 + [16.0, 16.001]) == [17]
    driven = Driven(skip_norm=math.inf)
    assert driven.skipped([1.0] * 16 + [1e17]) == []


def test_skipped_norms_count_and_old_ones_leave():
    driven = Driven()
    assert driven.skipped([1.0] * 128) == []
    # Of 128 norms and the one in question, the median is 1 while 65 are small.
    assert driven.skipped([100.0] * 80) == list(range(64))
    assert driven.guard.outlier_above == 400.0


def test_what_says_nothing_of_the_size_of_gradients_does_not_count():
    driven = Driven()
    assert driven.skipped([0.0, math.nan, math.inf] * 20) == [i for i in range(60) if i % 3]
    for _ in range(20):
        assert driven.step(1.0, loss=math.nan).skipped
    assert driven.guard.outlier_above == math.inf
    assert driven.skipped([1.0] * 16) == []
    assert driven.guard.outlier_above == 10.0


def test_batches_that_are_passed_over_after_a_rollback_do_not_count():
    driven = Driven(patience=2, on_patience="rollback", rollback=Rollback(every=1, skip_batches=3))
    driven.verdicts([1.0] * 20 + [math.nan] * 2)
    before = driven.guard.state_dict()["statistics"]
    assert before["seen"] == 20
    assert driven.verdicts([50.0] * 3) == [Verdict.SKIP_ROLLBACK] * 3
    assert driven.guard.state_dict()["statistics"] == before
    assert driven.skipped([50.0, 1.0]) == [0]


# --- series that a guard must live with ---------------------------------------------------------


def test_a_first_norm_above_skip_norm_is_no_outlier():
    """From scratch the norm is 120 where skip_norm is 10; skipping there would never end."""
    driven = Driven()
    assert driven.skipped([120.0] * 200) == []
    assert driven.guard.outlier_above == 480.0


def test_a_threshold_below_the_usual_norm():
    """A user's run: skip_norm 2.0, norms of 2.19, and every step was skipped."""
    assert Driven(skip_norm=2.0).skipped([1.9] * 30 + [2.19] * 300) == []


@pytest.mark.parametrize(("low", "high"), [(1.0, 50.0), (0.01, 1000.0)])
def test_two_alternating_levels(low, high):
    """Half of all norms are 50 times the others: that is how this training is."""
    assert Driven(patience=25).skipped([high, low] * 500) == []
    assert Driven(patience=25).skipped([low, high] * 500) == []


def test_a_level_that_alternates_with_an_old_one():
    """It is ordinary when half of the window is of it."""
    driven = Driven(patience=25)
    driven.verdicts([1.0] * 200)
    assert driven.skipped([1.0, 50.0] * 500) == list(range(1, 128, 2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("growth", [1.0005, 1.002, 1.005])
def test_slow_growth_is_clipped_and_not_skipped(growth, seed):
    """From 2 to far above skip_norm, with the noise of small batches."""
    norms = noisy([2.0 * growth**i for i in range(2000)], random.Random(seed))
    assert len(Driven(patience=25).skipped(norms)) < 0.02 * len(norms)


@pytest.mark.parametrize("seed", range(5))
def test_a_training_whose_norms_fall_and_rise(seed):
    """As the stable teacher's: 400 at the start, 2 in epoch 10, 14 in epoch 50."""
    steps = range(4000)
    level = [400 * 0.99**i + 2.0 + 12.0 * i / len(steps) for i in steps]
    norms = noisy(level, random.Random(seed))
    assert len(Driven(patience=25).skipped(norms)) < 0.02 * len(norms)


@pytest.mark.parametrize("spike", [100.0, 1e4, 1e15])
def test_a_sudden_spike_is_skipped_whatever_the_level(spike):
    for level in (0.3, 5.0, 300.0):
        norms = noisy([level] * 400, random.Random(1), noise=0.2)
        norms[200] = norms[300] = spike * level
        assert Driven(patience=25).skipped(norms) == [200, 300]


def test_a_jump_that_stays_ends_the_run():
    driven = Driven(patience=25)
    driven.verdicts([1.0] * 200)
    with pytest.raises(GradientExplosionError) as caught:
        driven.verdicts([100.0] * 64)
    assert driven.guard.state_dict()["steps"] == 225
    text = str(caught.value)
    for part in (
        "25 steps in a row were skipped, steps 200 to 224",
        "25 had a norm above skip_norm=10 (100",
        "raise skip_norm or set it to inf",
        "a patience above 64",
    ):
        assert part in text, text


def test_a_bad_loss_alone_is_not_called_a_large_norm():
    driven = Driven(patience=3)
    driven.verdicts([1.0] * 20)
    with pytest.raises(GradientExplosionError) as caught:
        for _ in range(4):
            driven.step(1.0, loss=math.nan)
    assert "3 had a loss of nan" in str(caught.value)
    assert "had a norm above" not in str(caught.value)


def test_a_jump_above_a_level_above_skip_norm_names_the_median():
    driven = Driven(patience=3)
    driven.verdicts([20.0] * 128)
    with pytest.raises(GradientExplosionError, match=r"above 80, 4 times the median .*_norm=10"):
        driven.verdicts([2000.0] * 3)


def test_a_jump_that_stays_is_rolled_back():
    driven = Driven(patience=25, on_patience="rollback", rollback=Rollback(every=50))
    driven.verdicts([1.0] * 200)
    driven.verdicts([100.0] * 25)
    assert driven.optimizer.param_groups[0]["lr"] == 0.0
    assert driven.guard.state_dict()["statistics"]["seen_norms"] == [1.0] * 128
    assert driven.skipped([1.0] * 50) == []


def test_a_jump_that_stays_is_ordinary_with_more_patience_than_64():
    driven = Driven(patience=65)
    driven.verdicts([1.0] * 200)
    assert driven.skipped([100.0] * 1000) == list(range(64))
    assert driven.skipped([1e4]) == [0]


# --- micro-batches --------------------------------------------------------------------------------


def accumulated(driven, micro_batches):
    """The reports of a window of micro-batches, each (norm, sign), and of its step."""
    reports = []
    for norm, sign in micro_batches:
        set_gradient_norms(driven.parameters, norm)
        driven.parameters[0].grad.mul_(sign)
        reports.append(driven.guard.accumulate())
    return reports, driven.guard.step(driven.optimizer)


def test_micro_batches_are_judged_by_micro_batches():
    """Their mean has a norm of 2, and each of them 40: 20 times the steps', and none an outlier."""
    driven = Driven(patience=25)
    window = [(40.0, 1)] * 11 + [(40.0, -1)] * 10
    for _ in range(40):
        reports, step = accumulated(driven, window)
        assert not any(report.skipped for report in reports)
        assert step.total_norm == pytest.approx(40 / 21)
        assert not step.skipped
    reports, step = accumulated(driven, [*window[:-1], (4000.0, 1)])
    assert [r.verdict.skipped for r in reports] == [False] * 20 + [True]
    assert not step.skipped


def test_micro_batches_say_nothing_of_steps():
    driven = Driven()
    driven.verdicts([1.0] * 20)
    before = driven.guard.state_dict()
    for _ in range(50):
        set_gradient_norms(driven.parameters, 5.0)
        driven.guard.accumulate()
    after = driven.guard.state_dict()
    assert after["statistics"] == before["statistics"]
    assert after["micro_statistics"]["seen"] == 50


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 128, 150, 300])
@pytest.mark.parametrize("threshold", [None, RunningMedian(), AdaGC()])
def test_a_resumed_guard_judges_as_the_first_does(steps, threshold):
    """Also which norm leaves the window next: 150 is no multiple of its length."""
    rng = random.Random(steps)
    norms = noisy([2.0] * steps, rng)
    first = Driven(threshold=threshold)
    first.verdicts([*norms, 90.0])
    resumed = Driven(threshold=threshold)
    resumed.guard.load_state_dict(first.guard.state_dict())
    assert resumed.guard.state_dict() == first.guard.state_dict()
    for norm in noisy([4.0] * 40 + [9.0] * 120, rng):
        assert resumed.step(norm).result() == first.step(norm).result()
        assert resumed.guard.outlier_above == first.guard.outlier_above
    assert resumed.guard.state_dict() == first.guard.state_dict()


def old_state(state):
    """As fastguard wrote it before it kept the norms of skipped steps."""
    known = state["statistics"]
    return {
        "steps": state["steps"],
        "threshold": state["threshold"],
        "moments": [float(known["accepted"]), known["mean"], known["variance"]],
        "accepted": known["accepted_norms"],
        "ema_norms": state["ema_norms"],
        "skips_in_a_row": state["budget"]["skips"],
        "batches_to_skip": 0,
    }


def test_a_state_of_an_older_fastguard_loads():
    first = Driven(patience=4)
    first.verdicts([*noisy([2.0] * 150, random.Random(0)), math.nan, math.nan])
    state = first.guard.state_dict()
    resumed = Driven(patience=4)
    resumed.guard.load_state_dict(old_state(state))
    new = {"budget": None, "usual_norms": {}, "clipped_since": {}}
    assert resumed.guard.state_dict() | new == state | new
    assert resumed.skipped([50.0]) == [0]
    with pytest.raises(GradientExplosionError, match="4 steps in a row were skipped, steps 150 to"):
        resumed.step(math.nan)


def test_a_state_of_a_newer_fastguard_is_refused_by_its_version():
    driven = Driven()
    driven.verdicts([1.0] * 3)
    state = driven.guard.state_dict()
    with pytest.raises(ValueError, match=r"of version 3, and this fastguard knows .* 1 to 2; use"):
        driven.guard.load_state_dict({**state, "version": 3})
    assert driven.guard.state_dict() == state
