"""One warning each: no gradients, gradients that no optimizer holds, clipping to almost nothing."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, StepReport, Verdict
from fastguard.guard.step_warnings import StepWarnings
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

from .test_grad_guard import set_gradient_norms
from .test_guard_device import slow


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "fastguard.guard.step_warnings")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "fastguard.guard.step_warnings"
    ]


def two_layers():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    return model, fastguard.AdamW(model.used.parameters(), lr=0.1)


def gradients(*modules):
    for module in modules:
        for p in module.parameters():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1


# --- no gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_no_watched_parameter_had_a_gradient(attached, warnings):
    model, optimizer = two_layers()
    guard = GradGuard(model)
    step = guard.attach(optimizer).step if attached else lambda: guard.step(optimizer)
    gradients(model.used)
    step()
    assert warnings() == []
    optimizer.zero_grad()
    step()
    (warning,) = warnings()
    assert warning.startswith("No watched parameter had a gradient at step 1, so the step changed")
    assert "after loss.backward() and before zero_grad()" in warning
    step()
    assert len(warnings()) == 1


def test_gradients_of_a_window_are_gradients(warnings):
    model, optimizer = two_layers()
    guard = GradGuard(model)
    gradients(model.used)
    guard.accumulate()
    guard.step(optimizer)
    assert warnings() == []


# --- gradients that no optimizer holds ------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_gradients_that_no_optimizer_holds(attached, accumulated, warnings):
    """The norm grows with what nobody clears."""
    model, optimizer = two_layers()
    guard = GradGuard(model)
    if attached:
        guard.attach(optimizer)
    norms = []
    for number in range(40):
        optimizer.zero_grad()
        gradients(model)
        if accumulated:
            guard.accumulate()
        if attached:
            optimizer.step()
        else:
            guard.step(optimizer)
        norms.append(guard.last_report.total_norm)
        assert len(warnings()) == (number >= 19)
    assert accumulated or norms[-1] > 20 * norms[0]
    (warning,) = warnings()
    assert warning.startswith(
        "No optimizer that this guard steps holds head.weight, head.bias: the gradients of 2 "
    )
    assert "guard.step([one, two])" in warning


def test_many_names_are_shortened(warnings):
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(30))
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=0.1)
    guard = GradGuard(layers)
    for _ in range(20):
        gradients(layers)
        guard.step(optimizer)
    (warning,) = warnings()
    assert "1.weight" in warning and "9.weight" not in warning
    assert ", ... (29 in all): the gradients of 29 parameters" in warning


def test_an_optimizer_that_comes_later_is_waited_for(warnings):
    """As a GAN's two, which one guard steps in turns; or a head that is trained after a while."""
    model, optimizer = two_layers()
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    guard = GradGuard(model, max_norm=math.inf)
    for number in range(100):
        gradients(model)
        guard.step(other if number % 25 == 19 else optimizer)
    assert warnings() == []


def test_a_group_that_is_added_later_counts(warnings):
    model, optimizer = two_layers()
    guard = GradGuard(model)
    for number in range(60):
        optimizer.zero_grad()
        gradients(model)
        guard.step(optimizer)
        if number == 10:
            optimizer.add_param_group({"params": model.head.parameters()})
    assert warnings() == []


def test_frozen_parameters_and_guards_of_their_own_networks_are_as_they_should_be(warnings):
    model, optimizer = two_layers()
    model.head.requires_grad_(False)
    guard = GradGuard(model)
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 2)
    pairs = [
        (GradGuard(net), torch.optim.SGD(net.parameters(), lr=0.1)) for net in (generator, critic)
    ]
    for _ in range(40):
        gradients(model.used, generator, critic)
        guard.step(optimizer)
        for each, its_optimizer in pairs:
            each.step(its_optimizer)
    assert warnings() == []


def test_a_copy_goes_on_counting(warnings):
    model, optimizer = two_layers()
    guard = GradGuard(model)
    for number in range(20):
        if number == 15:
            model, optimizer, guard = copy.deepcopy((model, optimizer, guard))
        gradients(model)
        guard.step(optimizer)
        assert len(warnings()) == (number == 19)


# --- clipping to almost nothing -------------------------------------------------------------------


def run(guard, parameters, norms, value=None):
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for norm in norms:
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        if value is not None:
            value.append(guard.last_report.clip_coef)


def test_more_than_half_are_clipped_below_one_percent(warnings):
    parameters = [nn.Parameter(torch.zeros(10))]
    guard = GradGuard(parameters, max_norm=0.5)
    run(guard, parameters, [49.0] * 200)
    assert warnings() == []
    run(guard, parameters, [100.0] * 64)
    assert warnings() == []
    run(guard, parameters, [200.0] * 100)
    (warning,) = warnings()
    assert warning.startswith(
        "65 of the last 128 steps were clipped below 1 %: the threshold is Fixed(), 0.5 now, the "
        "median norm is 100, the median coefficient 0.005."
    )
    assert "raise it" in warning


def test_a_few_steps_tell_nothing_yet(warnings):
    parameters = [nn.Parameter(torch.zeros(10))]
    guard = GradGuard(parameters, max_norm=0.5)
    run(guard, parameters, [1000.0] * 63)
    assert warnings() == []
    run(guard, parameters, [1000.0])
    assert warnings()[0].startswith("64 of the last 64 steps")
    run(guard, parameters, [1000.0] * 200)
    assert len(warnings()) == 1


def test_skips_neither_count_nor_dilute(warnings):
    parameters = [nn.Parameter(torch.zeros(10))]
    guard = GradGuard(parameters, max_norm=0.5, patience=1000)
    run(guard, parameters, [math.nan, math.inf] * 100)
    assert warnings() == []
    run(guard, parameters, [math.nan, 1000.0] * 64)
    assert warnings()[0].startswith("64 of the last 64 steps")


@pytest.mark.parametrize("coef", [0.01, 0.00999])
def test_below_means_below(coef, warnings):
    seen = StepWarnings()
    for step in range(100):
        seen.saw_report(StepReport(step, None, Verdict.CLIP, 50.0, coef, 0.5), Fixed())
    assert len(warnings()) == (coef < 0.01)


@pytest.mark.parametrize(
    "threshold", [ZClip(), AdaGC(), AutoClip(), RunningMedian(), Fixed()], ids=lambda t: t.kind.name
)
def test_a_learnt_threshold_that_is_stuck_below_a_new_level_says_so(threshold, warnings):
    """Those that find the new level in time have nothing to say."""
    parameters = [nn.Parameter(torch.zeros(10))]
    guard = GradGuard(parameters, max_norm=math.inf, threshold=threshold)
    coefs = []
    run(guard, parameters, [0.01] * 200)
    run(guard, parameters, [10.0] * 200, coefs)
    stuck = sum(coef < 0.01 for coef in coefs) > 64
    assert stuck == (threshold.kind.name in ("ADAGC", "AUTOCLIP"))
    assert len(warnings()) == stuck
    if stuck:
        assert repr(threshold) in warnings()[0]
        assert "begin with a new GradGuard" in warnings()[0]
        assert ("of the parameter that is clipped most" in warnings()[0]) == (
            threshold.kind.name == "ADAGC"
        )


def test_clipping_is_looked_at_when_the_host_learns_of_it(monkeypatch, warnings):
    slow(monkeypatch)
    parameters = [nn.Parameter(torch.zeros(10))]
    optimizer = fastguard.AdamW(parameters, lr=0.0)
    guard = GradGuard(parameters, max_norm=0.5, max_lag=8)
    for number in range(80):
        set_gradient_norms(parameters, 1000.0)
        guard.step(optimizer)
        assert len(warnings()) == (number >= 63 + 8)
