"""Steps that are not what they look like: wrappers, subclasses, hooks, shared gradients."""

import math
import types

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastguard
from fastguard import GradGuard
from tests.tensors import assert_same_bits

from . import test_update
from .test_grad_guard import everything, small_model, train_step
from .test_update import seeded, without_batch_norm

make = test_update.make  # a fixture

# --- steps that are not what they look like -------------------------------------------------------


class Wrapper:
    """As Lightning's and Fabric's wrappers: it takes on the class of what it holds."""

    def __init__(self, optimizer, steps=True):
        own = {name: value for name, value in vars(optimizer).items() if name != "step"}
        vars(self).update(own, optimizer=optimizer, steps=steps, calls=0)
        names = {"__module__": "lightning.fabric.wrappers"}
        self.__class__ = type("Fabric", (Wrapper, type(optimizer)), names)

    def step(self, closure=None):
        self.calls += 1
        if self.steps:
            self.optimizer.step()


def test_a_wrapper_with_the_class_of_what_it_wraps_is_stepped_through_its_own_step(make):
    def run(wrap, batches):
        model = without_batch_norm()
        optimizer = wrap(make(model.parameters()))
        guard = GradGuard(model, max_norm=0.02)
        for x in batches:
            train_step(model, optimizer, guard, x)
        return model, optimizer

    good = [seeded(0), seeded(2), seeded(4)]
    model, optimizer = run(Wrapper, [good[0], seeded(1, math.nan), *good[1:], seeded(3, math.inf)])
    assert optimizer.calls == 3  # a skip is not its step
    assert_same_bits(everything(model, optimizer), everything(*run(Wrapper, good)))
    plain, _ = run(lambda optimizer: optimizer, good)
    for ours, right in zip(model.parameters(), plain.parameters(), strict=True):
        # Gradients are scaled in place here, and rounded.
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_skip_reaches_through_a_wrapper(make, bad):
    model = small_model()
    optimizer = Wrapper(make(model.parameters()))
    guard = GradGuard(model, max_norm=0.02)
    train_step(model, optimizer, guard, seeded(0))
    before = everything(model, optimizer)
    report = train_step(model, optimizer, guard, seeded(1, bad))
    if report.skipped:
        assert_same_bits(before, everything(model, optimizer))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_wrapper_that_does_not_step_is_an_error(make):
    model = small_model()
    optimizer = Wrapper(make(model.parameters()), steps=False)
    with pytest.raises(RuntimeError, match=r"verdict was not carried out.*guard\.attach"):
        train_step(model, optimizer, GradGuard(model), seeded(0))


class Lookahead(torch.optim.Optimizer):
    """As timm's and pytorch_optimizer's: the constructor of torch's class is not called."""

    def __init__(self, base, hooks):
        self.base = base
        if hooks:  # timm's has the attributes, but its step calls no hooks
            self._optimizer_step_pre_hooks = {}
            self._optimizer_step_post_hooks = {}
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            p.copy_(slow.lerp_(p, 0.5))


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("attach", [False, True])
def test_an_optimizer_that_never_called_torchs_constructor(make, hooks, attach):
    def run(batches):
        model = without_batch_norm()
        optimizer = Lookahead(make(model.parameters()), hooks)
        guard = GradGuard(model, max_norm=0.02)
        if attach:
            guard.attach(optimizer)
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step() if attach else guard.step(optimizer)
        guard.detach()
        return everything(model, optimizer)

    good = [seeded(0), seeded(2), seeded(4)]
    assert_same_bits(run(good), run([good[0], seeded(1, math.nan), *good[1:]]))


def test_a_subclass_with_a_step_of_its_own_is_stepped_by_it():
    class Doubled(fastguard.AdamW):
        calls = 0

        def step(self, closure=None):
            Doubled.calls += 1
            return super().step(closure)

    class Inherits(fastguard.AdamW):
        pass

    ends = []
    for kind in (Doubled, Inherits, fastguard.AdamW):
        model = without_batch_norm()
        optimizer = kind(model.parameters(), lr=0.1)
        guard = GradGuard(model)  # clips nothing: scaling in place rounds
        for x in (seeded(0), seeded(1, math.nan), seeded(2)):
            train_step(model, optimizer, guard, x)
        ends.append(everything(model, optimizer))
    assert Doubled.calls == 2
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[1], ends[2])


def test_a_wrapper_that_holds_a_scaler_is_refused_by_name():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Wrapper(torch.optim.SGD([weight], lr=1.0))
    optimizer.scaler = torch.amp.GradScaler("cpu")
    for arguments in ({}, {"scaler": optimizer.scaler}):
        with pytest.raises(ValueError, match=r"holds a GradScaler.*guard\.attach\(optimizer\)"):
            GradGuard([weight]).step(optimizer, **arguments)
    optimizer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    GradGuard([weight]).step(optimizer)
    assert weight.ne(1.0).all()


def test_a_wrapper_that_accumulates_is_refused_before_the_last_micro_batch():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Wrapper(torch.optim.SGD([weight], lr=1.0))
    optimizer.gradient_state = types.SimpleNamespace(sync_gradients=False)
    with pytest.raises(ValueError, match=r"accelerator\.sync_gradients"):
        GradGuard([weight]).step(optimizer)
    optimizer.gradient_state.sync_gradients = True
    GradGuard([weight]).step(optimizer)
    assert weight.ne(1.0).all()


@pytest.mark.parametrize("hook", ["pre", "post", "global post"])
def test_hooks_of_a_step_do_not_hear_of_a_skip(make, hook):
    """An average of the weights in a post-step hook must count the steps that were taken."""
    model = small_model()
    optimizer = make(model.parameters())
    guard = GradGuard(model)
    heard = []

    def listen(*_):
        heard.append(1)

    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global post": register_optimizer_step_post_hook,
    }[hook]
    handle = register(listen)
    try:
        for x in (seeded(0), seeded(1, math.nan), seeded(2), seeded(3, math.inf)):
            train_step(model, optimizer, guard, x)
    finally:
        handle.remove()
    assert len(heard) == 2


EXPANDED = {
    "one number": lambda: torch.full((1,), 0.5).expand(64, 33),
    "one row": lambda: torch.arange(33.0).expand(64, 33),
    "transposed": lambda: torch.arange(64.0 * 33).view(33, 64).t(),
    "with gaps": lambda: torch.arange(64.0 * 66).view(64, 66)[:, ::2],
}


@pytest.mark.parametrize("layout", EXPANDED)
@pytest.mark.parametrize("max_norm", [0.1, math.inf])
def test_gradients_that_lie_otherwise_than_their_parameters(make, layout, max_norm):
    """torch's fused kernels go by the parameter's layout, and write into the gradient."""
    ends = []
    for grad in (EXPANDED[layout](), EXPANDED[layout]().contiguous()):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 33))
        optimizer = make([weight])
        weight.grad = grad
        assert not GradGuard([weight], max_norm).step(optimizer).skipped
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_two_parameters_that_share_an_expanded_gradient():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    shared = torch.ones(1).expand(3)
    for p in parameters:
        p.grad = shared
    GradGuard(parameters, max_norm=0.5).step(torch.optim.SGD(parameters, lr=1.0))
    for p in parameters:
        torch.testing.assert_close(p.detach(), torch.full((3,), -0.5 / 3**0.5))
