"""What others decide wrongly or too late, one test for each: fastguard passes it."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from fastguard.thresholds import AdaGC, AutoClip, RunningMedian, ZClip
from tests.tensors import assert_same_bits, bits, parameters_with

from .test_guard_device import optimizers
from .test_peers import feed, state_of

# --- what is decided, and when (7, 8, 9) ----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_decides_before_it_clips(bad, caplog):
    """7 SpeechBrain's optimizers_step clips, then calls check_gradients (core.py): one NaN is in
    all three gradients by then, and all are dropped; one Inf, and the other two are stepped with
    zeros, that is by momentum and weight decay. Its warning names a parameter "None"."""
    parameters = parameters_with([torch.ones(2), torch.ones(3), torch.ones(4)])
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    guard = GradGuard(zip(("encoder", "decoder", "head"), parameters, strict=True))
    guard.step(optimizer)
    parameters[1].grad[2] = bad
    grads, state = bits(p.grad for p in parameters), state_of(optimizer, parameters)
    report = guard.step(optimizer)
    assert report.nonfinite == ("decoder",)
    assert "decoder[2]" in caplog.text and "None" not in caplog.text
    assert_same_bits(state, state_of(optimizer, parameters))
    assert_same_bits(grads, bits(p.grad for p in parameters))


@pytest.mark.parametrize("name", ["fastguard", "fused", "foreign"])
def test_every_param_group_is_measured_and_clipped(name):
    """7 SpeechBrain clips optimizer.param_groups[0] alone (core.py); a NaN in the second group goes
    on into the weights."""
    parameters = parameters_with([torch.zeros(4), torch.full((4,), 8.0)])
    build = type(optimizers(parameters)[name])
    options = {"fused": True} if name == "fused" else {}
    optimizer = build([{"params": [p]} for p in parameters], lr=1.0, **options)
    guard = GradGuard(parameters, max_norm=1.0)
    report = guard.step(optimizer)
    assert (report.verdict, report.total_norm) == (Verdict.CLIP, 16.0)
    moved = optimizer.state[parameters[1]].get("exp_avg", -parameters[1].detach())
    share = 0.1 if "exp_avg" in optimizer.state[parameters[1]] else 1.0  # 1 - beta1
    torch.testing.assert_close(moved, torch.full((4,), 0.5 * share))
    parameters[1].grad[0] = math.nan
    before = state_of(optimizer, parameters)
    assert guard.step(optimizer).nonfinite == ("parameter 1",)
    assert_same_bits(before, state_of(optimizer, parameters))


@pytest.mark.parametrize("name", ["fastguard", "fused", "foreign"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_with_skipped_steps_is_the_run_without_them(name, bad):
    """8 OLMo-core's AdamW multiplies by a step_factor of 0 to skip (optim/adamw.py): 0 * NaN is
    NaN, and both moments are NaN from there on."""
    runs = []
    for norms in ([1.0, 3.0, 0.5], [bad, 1.0, bad, 3.0, bad, bad, 0.5]):
        parameters = [nn.Parameter(torch.linspace(1, 2, 7))]
        optimizer = optimizers(parameters)[name]
        feed(GradGuard(parameters), optimizer, parameters, norms)
        runs.append(state_of(optimizer, parameters))
    assert_same_bits(*runs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("later", [0, 100, 300])
def test_an_outlier_is_skipped_however_long_after_a_nan(bad, later):
    """8 OLMo-core's SkipStepOptimizer keeps the NaN in a window of 128, whose mean and deviation
    are NaN so long: nothing is above them, and each spike goes through (OLMo-core#424). llm.c's
    OutlierDetector (llmc/outlier_detector.h) keeps running sums of its window: NaN for ever.
    """
    parameters = [nn.Parameter(torch.zeros(10))]
    optimizer = fastguard.AdamW(parameters)
    guard = GradGuard(parameters, skip_norm=10.0)
    norms = [1.0] * 20 + [bad] + [1.0] * later + [50.0, 1.0]
    *_, spike, normal = feed(guard, optimizer, parameters, norms)
    assert spike.verdict is Verdict.SKIP_OUTLIER
    assert not normal.skipped


@pytest.mark.parametrize(
    "threshold",
    [ZClip(warmup=5), AutoClip(warmup=5), RunningMedian(warmup=5), AdaGC(warmup=5)],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("place", [0, 3, 30], ids=["at the start", "warming up", "warm"])
def test_an_adaptive_threshold_clips_after_a_nan(threshold, place):
    """9 ZClip: one NaN norm, and the moving mean and variance are NaN for ever; no norm is above
    them, and clipping is off for the rest of the run (zclip.py). AutoClip: np.percentile of a
    history with a NaN is NaN, and so become all gradients."""
    ordinary = [1.0, 1.1, 0.9, 1.05, 0.95] * 8
    runs = []
    for bad in ([], [math.nan, math.inf]):
        parameters = [nn.Parameter(torch.zeros(10))]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        guard = GradGuard(parameters, max_norm=1e6, threshold=threshold)
        norms = [*ordinary[:place], *bad, *ordinary[place:], 100.0]
        runs.append(feed(guard, optimizer, parameters, norms))
    clean, hit = ([(r.total_norm, r.clip_coef) for r in run if not r.skipped] for run in runs)
    assert clean == hit
    assert runs[1][-1].verdict is Verdict.CLIP
    assert parameters[0].grad.norm() < 3  # of 100
