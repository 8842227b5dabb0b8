"""GradGuard at the limits: large norms, thresholds that are loaded, names, copies."""

import copy
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict, ops
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

from .test_grad_guard import set_gradient_norms, small_model, train_step


def stepped(guard, optimizer, parameters, *norms):
    for norm in norms:
        set_gradient_norms(parameters, norm)
        report = guard.step(optimizer)
    return report


@pytest.mark.parametrize("max_norm", [math.inf, 1e19])
def test_what_second_moments_can_not_hold_is_skipped(max_norm):
    """Otherwise exp_avg_sq is Inf for ever and the parameter never moves again."""
    parameters = [nn.Parameter(torch.ones(4))]
    optimizer = fastguard.AdamW(parameters)
    guard = GradGuard(parameters, max_norm=max_norm)
    assert stepped(guard, optimizer, parameters, 1e30).verdict is Verdict.SKIP_OUTLIER
    stepped(guard, optimizer, parameters, 1e17)
    assert optimizer.state[parameters[0]]["exp_avg_sq"].isfinite().all()


def test_adagc_clips_a_parameter_that_has_its_first_gradient_after_the_warm_up():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    guard = GradGuard([one, two], max_norm=1.0, threshold=AdaGC(warmup=2))
    optimizer = torch.optim.SGD([one, two], lr=1.0)
    for _ in range(3):
        one.grad = torch.tensor([0.5])
        guard.step(optimizer)
    two.grad = torch.tensor([1e30])
    guard.step(optimizer)
    assert two.item() == pytest.approx(-1.0)
    assert guard.state_dict()["ema_norms"]["parameter 1"] == pytest.approx(1.0)


@pytest.mark.parametrize("then", [ZClip(), RunningMedian(), AutoClip(), AdaGC(), Fixed()])
@pytest.mark.parametrize("first", [Fixed(), ZClip(), AdaGC()])
def test_a_state_may_go_to_a_guard_with_another_threshold(first, then):
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    old = GradGuard(parameters, max_norm=math.inf, threshold=first)
    stepped(old, optimizer, parameters, *[0.9, 1.1] * 64)
    new = GradGuard(parameters, max_norm=math.inf, threshold=then)
    new.load_state_dict(old.state_dict())
    report = stepped(new, optimizer, parameters, 1.0)
    assert report.clip_coef > 0.85
    stepped(new, optimizer, parameters, *[1.0] * 20)
    if then.kind.name != "FIXED":
        assert stepped(new, optimizer, parameters, 1000.0).clip_coef < 0.01


def test_names_are_those_of_the_model_under_torch_compile():
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    assert GradGuard(compiled)._watched.names == [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="two parameters have the name 'a'"):
        GradGuard([("a", nn.Parameter(torch.ones(1))), ("a", nn.Parameter(torch.ones(1)))])


def test_guards_can_be_copied():
    model = small_model()
    guard = GradGuard(model, threshold=ZClip())
    train_step(model, fastguard.AdamW(model.parameters()), guard, torch.ones(6, 4))
    assert copy.deepcopy(guard).state_dict() == guard.state_dict()


def test_it_says_what_it_is():
    guard = GradGuard(small_model(), max_norm=0.5, skip_norm=10.0, threshold=ZClip())
    assert repr(guard) == (
        "GradGuard(max_norm=0.5, skip_norm=10, patience=25, "
        "threshold=ZClip(z=2.5, alpha=0.97, warmup=25); 6 parameters, 0 steps)"
    )


def test_adagc_resumes_where_a_parameter_was_never_seen():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = GradGuard(parameters, threshold=AdaGC())
    for first in (math.nan, 1.0):
        parameters[0].grad, parameters[1].grad = torch.full((2,), first), torch.zeros(2)
        guard.step(optimizer)
    state = guard.state_dict()
    assert list(state["ema_norms"]) == ["parameter 0"]
    again = GradGuard(parameters, threshold=AdaGC())
    again.load_state_dict(state)
    assert again.state_dict() == state


def test_adagc_lets_nothing_through_that_moments_can_not_hold():
    parameters = [nn.Parameter(torch.ones(4))]
    optimizer = fastguard.AdamW(parameters)
    guard = GradGuard(parameters, max_norm=math.inf, threshold=AdaGC(warmup=2))
    assert stepped(guard, optimizer, parameters, 1e21).verdict is Verdict.SKIP_OUTLIER
    assert guard.state_dict()["ema_norms"] == {}
    stepped(guard, optimizer, parameters, 1.0, 1.0, 1e21)
    assert optimizer.state[parameters[0]]["exp_avg_sq"].isfinite().all()


def test_an_error_that_is_not_about_the_gradients_is_not_retried(monkeypatch):
    calls = []

    def fails(*args):
        calls.append(args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops, "grad_norm_decide_", fails)
    model = small_model()
    guard = GradGuard(model, 1.0)
    model(torch.ones(6, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        guard.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(calls) == 1
