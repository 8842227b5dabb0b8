"""What an attached optimizer refuses, and what becomes of errors."""

import functools
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, Verdict
from tests.tensors import assert_same_bits

from . import test_attached
from .test_attached import backward, guarded
from .test_grad_guard import everything, small_model
from .test_update import OPTIMIZERS, OnlyCalls, seeded

make = test_attached.make  # a fixture

# --- bad input ------------------------------------------------------------------------------------


def test_a_step_around_the_guard_is_refused(make):
    model = small_model()
    optimizer, guard = make(model.parameters()), GradGuard(model)
    kept = optimizer.step
    guard.attach(optimizer)
    backward(model, seeded(0, math.nan))
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="around its guard"):
        kept()
    assert_same_bits(before, everything(model, optimizer))
    guard.detach()
    assert type(optimizer) is type(make(model.parameters()))
    optimizer.zero_grad()
    backward(model, seeded(1))
    kept()


def test_twice_and_by_another():
    model, optimizer, guard = guarded(OPTIMIZERS["AdamW"])
    assert guard.attach(optimizer) is optimizer  # once more changes nothing
    other = GradGuard(model)
    with pytest.raises(ValueError, match="attached to another GradGuard"):
        other.attach(optimizer)
    with pytest.raises(ValueError, match="attached to another GradGuard"):
        other.step(optimizer)
    with pytest.raises(ValueError, match=r"guard\.step\(\[one, two\]\)"):
        guard.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    backward(model, seeded(0))
    optimizer.step()
    guard.step(optimizer)  # its own may step it too
    assert guard.state_dict()["steps"] == 2
    guard.detach()
    guard.detach()
    other.attach(optimizer)
    optimizer.step()
    assert other.state_dict()["steps"] == 1


def test_what_cannot_be_attached():
    weight = nn.Parameter(torch.ones(2))
    guard = GradGuard([weight])
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.Optimizer, got NoneType"):
        guard.attach(None)
    with pytest.raises(ValueError, match="watches none"):
        guard.attach(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0))
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        guard.attach(torch.optim.LBFGS([weight]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.step = own = lambda: None
    with pytest.raises(ValueError, match="was replaced by"):
        guard.attach(optimizer)
    assert optimizer.step is own
    assert type(optimizer) is torch.optim.SGD
    guard.attach(torch.optim.SGD([weight], lr=1.0))  # nothing was changed


def test_a_step_that_calls_the_guard_is_refused_instead_of_recursing():
    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = torch.optim.SGD([weight], lr=1.0), GradGuard([weight])
    optimizer.step = lambda closure=None: guard.step(optimizer)
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Use guard\.attach"):
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


def test_sam_is_told_what_to_attach_to():
    class SAM(torch.optim.Optimizer):
        def __init__(self, params, base):
            super().__init__(params, {})
            self.base_optimizer = base

        first_step = second_step = None

        def step(self, closure=None):
            raise AssertionError("needs a closure")

    weight = nn.Parameter(torch.ones(2))
    sam = SAM([weight], torch.optim.SGD([weight], lr=1.0))
    guard = GradGuard([weight])
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"guard\.attach\(optimizer\.base_optimizer\)"):
        guard.step(sam)
    guard.attach(sam.base_optimizer)
    sam.base_optimizer.step()
    assert guard.last_report.verdict is Verdict.CLIP


def test_patience_ends_an_attached_run():
    model, optimizer, _ = guarded(OPTIMIZERS["fastguard.AdamW"], patience=3)
    backward(model, seeded(0, math.nan))
    optimizer.step()
    optimizer.step()
    with pytest.raises(GradientExplosionError):
        optimizer.step()


def test_an_attached_run_rolls_back(make):
    """As a run with guard.step does, bit for bit."""
    ends = []
    for attach in (True, False):
        model = small_model()
        optimizer = make(model.parameters())
        guard = GradGuard(
            model, patience=2, on_patience="rollback", rollback=Rollback(every=2, lr_factor=0.5)
        )
        if attach:
            guard.attach(optimizer)
        for x in (*map(seeded, range(5)), seeded(5, math.nan), seeded(6, math.nan), seeded(7)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step() if attach else guard.step(optimizer)
        ends.append(everything(model, optimizer))
    assert_same_bits(*ends)


def test_an_optimizer_that_raises_leaves_the_guard_as_it_was():
    class Raises(OnlyCalls):
        def step(self):
            raise RuntimeError("no space")

    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = Raises([weight]), GradGuard([weight])
    guard.attach(optimizer)
    weight.grad = torch.ones(2)
    state = guard.state_dict()
    with pytest.raises(RuntimeError, match="no space"):
        optimizer.step()
    assert guard.state_dict() == state


def test_a_class_that_wraps_our_step_and_forgets_it_is_noticed():
    class Forgets(fastguard.AdamW):
        @functools.wraps(fastguard.AdamW.step)
        def step(self, closure=None):
            pass

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    guard = GradGuard([weight])
    with pytest.raises(RuntimeError, match="the guard's verdict was not carried out"):
        guard.step(Forgets([weight]))
