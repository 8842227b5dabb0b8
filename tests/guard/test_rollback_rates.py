"""The learning rate after a rollback: lowered, then back to its schedule."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard

from .test_grad_guard import set_gradient_norms
from .test_rollback import guarded


class Rates(torch.optim.SGD):
    """Remembers the learning rate of each step."""

    def __init__(self, params):
        super().__init__(params, lr=1.0, momentum=0.9)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(float(self.param_groups[0]["lr"]))
        return super().step()


LRS = torch.optim.lr_scheduler
SCHEDULERS = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: LRS.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "onecycle": lambda optimizer: LRS.OneCycleLR(optimizer, max_lr=2.0, total_steps=60),
    "cyclic": lambda optimizer: LRS.CyclicLR(optimizer, 0.5, 2.0, step_size_up=5),
    "plateau": lambda optimizer: LRS.ReduceLROnPlateau(optimizer, patience=1),
    "sequential": lambda optimizer: LRS.SequentialLR(
        optimizer,
        [LRS.LinearLR(optimizer, 0.1, total_iters=4), LRS.ExponentialLR(optimizer, 0.9)],
        milestones=[4],
    ),
    "cosine": lambda optimizer: LRS.CosineAnnealingLR(optimizer, 30),  # each from the last
}


def scheduled(kind, norms, guard_of, restored=False):
    """The learning rates of the applied steps; one scheduler step after each call of step."""
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = Rates(parameters)
    scheduler = SCHEDULERS[kind](optimizer)
    guard = guard_of(parameters, scheduler if restored else None)
    for norm in norms:
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        if scheduler is not None:
            scheduler.step(1.0) if kind == "plateau" else scheduler.step()
    return optimizer, guard


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_learning_rate_returns_to_its_schedule_step_by_step(kind):
    """As a GradScaler's scale: a power of lr_factor, one less after every growth_interval steps."""
    bad = [math.nan] * 2
    norms = [1.0] * 3 + bad + [1.0] + bad + [1.0] * 14
    optimizer, guard = scheduled(
        kind,
        norms,
        lambda parameters, _: guarded(parameters, every=1, lr_factor=0.1, growth_interval=4),
    )
    reference, _ = scheduled(kind, [1.0] * len(norms), lambda p, _: GradGuard(p))
    factors = [1.0] * 3 + [0.1] + [0.01] * 4 + [0.1] * 4 + [1.0] * 6
    applied = [rate for rate, norm in zip(reference.rates, norms, strict=True) if norm == 1.0]
    expected = [rate * factor for rate, factor in zip(applied, factors, strict=True)]
    assert optimizer.rates == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert guard.lr_factor == 1.0


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULERS if kind != "none"])
def test_a_scheduler_that_is_given_goes_back_with_the_state(kind):
    norms = [1.0] * 4 + [math.nan] * 2 + [1.0] * 6
    optimizer, guard = scheduled(
        kind,
        norms,
        lambda parameters, scheduler: guarded(
            parameters, every=2, lr_factor=0.5, growth_interval=math.inf, scheduler=scheduler
        ),
        restored=True,
    )
    # The copy is of after the third step, before its scheduler.step; one came after the rollback.
    reference, _ = scheduled(kind, [1.0] * 9, lambda p, _: GradGuard(p))
    expected = [*reference.rates[:3], reference.rates[3], *(0.5 * r for r in reference.rates[3:9])]
    assert optimizer.rates == pytest.approx(expected, rel=1e-12)
    assert guard.lr_factor == 0.5


def test_a_single_skip_leaves_the_factor_and_its_interval():
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = Rates(parameters)
    guard = guarded(parameters, every=1, growth_interval=3)
    for norm in [1.0, math.nan, math.nan, 1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0]:
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
    assert optimizer.rates == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]


def test_the_factor_goes_into_the_state_and_goes_on():
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = Rates(parameters)
    guard = guarded(parameters, lr_factor=0.25, growth_interval=3)
    for norm in (1.0, math.nan, math.nan, 1.0, 1.0):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
    resumed = guarded(parameters, lr_factor=0.25, growth_interval=3)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.lr_factor == 0.25
    for factor in (0.25, 1.0):
        set_gradient_norms(parameters, 1.0)
        resumed.step(optimizer)
        assert optimizer.rates[-1] == factor
    old = {k: v for k, v in guard.state_dict().items() if not k.startswith("lr_")}
    resumed.load_state_dict(old)  # of a version that had no such entries
    assert resumed.lr_factor == 1.0
    with pytest.raises(ValueError, match="negative or not finite"):
        resumed.load_state_dict(old | {"lr_backoffs": -1})


@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_groups_keep_their_rates_whatever_the_step_does(make, tensor):
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    rates = [torch.tensor(0.1) if tensor else 0.1, torch.tensor(0.2) if tensor else 0.2]
    optimizer = make([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
    guard = guarded(parameters, lr_factor=0.5)
    moves = []
    for norm in (1.0, math.nan, math.nan, 1.0):
        before = [p.detach().clone() for p in parameters]
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        pairs = zip(before, parameters, strict=True)
        moves.append([(b - p.detach()).max().item() for b, p in pairs])
        assert [group["lr"] for group in optimizer.param_groups] == rates
    assert moves[3] == pytest.approx([0.05, 0.1], rel=0.1)
    optimizer.step = lambda: 1 / 0
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_a_rate_that_the_step_sets_itself_stays():
    class Sets(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["lr"] = self.next

    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer, guard = Sets(parameters, lr=1.0), guarded(parameters)
    for norm, optimizer.next in ((1.0, 0.5), (math.nan, 0.0), (math.nan, 0.0), (1.0, 0.75)):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.75
