"""``guard.attach``: the optimizer's own step is the guarded one, however other code calls it."""

import functools
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from tests.tensors import assert_same_bits

from .test_grad_guard import everything, set_gradient_norms, small_model
from .test_guard_device import slow
from .test_update import OPTIMIZERS, seeded, without_batch_norm


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def backward(model, x, scaler=None):
    loss = model(x).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def guarded(make, **options):
    model = small_model()
    optimizer = make(model.parameters())
    guard = GradGuard(model, **options)
    assert guard.attach(optimizer) is optimizer
    return model, optimizer, guard


BATCHES = [seeded(0), seeded(1), seeded(2, math.nan), seeded(3), seeded(4, math.inf), seeded(5)]


def test_step_is_the_guarded_step(make):
    model, optimizer, guard = guarded(make, max_norm=0.02)
    other = small_model()
    plain, plain_guard = make(other.parameters()), GradGuard(other, max_norm=0.02)
    for x in BATCHES:
        optimizer.zero_grad()
        backward(model, x)
        assert optimizer.step() is None
        plain.zero_grad()
        backward(other, x)
        report = plain_guard.step(plain)
        assert guard.last_report.verdict is report.verdict
        assert guard.last_report.skipped == (not x.isfinite().all())
    assert_same_bits(everything(model, optimizer), everything(other, plain))
    assert type(optimizer).__name__ == type(plain).__name__
    assert isinstance(optimizer, type(plain))


def test_a_closure_runs_first_and_its_loss_counts():
    model, optimizer, guard = guarded(OPTIMIZERS["fastguard.AdamW"])
    backward(model, seeded(1))
    optimizer.step()
    before = everything(model, optimizer)
    losses = iter([math.nan, 1.0])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        backward(model, seeded(0))
        return torch.tensor(next(losses))

    assert math.isnan(optimizer.step(closure))
    assert guard.last_report.verdict is Verdict.SKIP_NONFINITE
    assert math.isnan(guard.last_report.loss)
    assert_same_bits(before, everything(model, optimizer))
    assert optimizer.step(closure=closure) == 1.0
    assert not guard.last_report.skipped


@pytest.mark.parametrize("answer", [None, "no loss", torch.ones(2), {"loss": math.nan}, True])
def test_what_is_no_loss_is_none(answer):
    model, optimizer, guard = guarded(OPTIMIZERS["AdamW"])
    backward(model, seeded(0))
    assert optimizer.step(lambda: answer) is answer
    assert guard.last_report.loss is None
    assert not guard.last_report.skipped


def test_a_closure_that_raises_leaves_everything_as_it_was():
    model, optimizer, guard = guarded(OPTIMIZERS["fastguard.AdamW"])
    backward(model, seeded(0))
    optimizer.step()
    before, state = everything(model, optimizer), guard.state_dict()

    def closure():
        raise KeyError("no such batch")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_same_bits(before, everything(model, optimizer))
    assert guard.state_dict() == state
    optimizer.step()  # and it goes on
    assert guard.state_dict()["steps"] == 2


def test_what_describes_the_next_step_is_used_once():
    model, optimizer, guard = guarded(OPTIMIZERS["SGD fused"])
    backward(model, seeded(0))
    guard.describe(batch_id="b7", loss=math.inf)
    optimizer.step()
    assert guard.last_report.batch_id == "b7"
    assert guard.last_report.skipped
    optimizer.step()
    assert guard.last_report.batch_id is None
    assert not guard.last_report.skipped


# --- GradScaler, as torch documents it ------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_torchs_recipe_for_a_scaler(make, unscale):
    """The weights are those of a run without the bad batches; scale and stages are torch's."""
    ends = []
    for batches in (BATCHES, [x for x in BATCHES if x.isfinite().all()]):
        model, optimizer, guard = guarded(make, max_norm=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for x in batches:
            optimizer.zero_grad()
            backward(model, x, scaler)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert guard.last_report.skipped == (not x.isfinite().all())
            assert not hasattr(optimizer, "grad_scale")
        ends.append(everything(model, optimizer))
    # The scale is a power of two, so gradients differ in no bit.
    assert_same_bits(*ends)
    assert guard.state_dict()["steps"] == 4


def test_a_norm_is_reported_unscaled_and_an_inf_as_one():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    guard = GradGuard([weight], max_norm=math.inf)
    guard.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for value in (3.0, math.inf):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert guard.last_report.total_norm == 2 * value


@pytest.mark.parametrize("bad_first", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_one_scaler_for_two_guards(unscale, bad_first):
    """torch's recipe for several networks: both backward passes, both steps, one update."""

    def run(attach):
        one, two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        optimizers = [torch.optim.SGD([one], lr=1.0), torch.optim.SGD([two], lr=1.0)]
        guards = [GradGuard([p], max_norm=math.inf) for p in (one, two)]
        if attach:
            for guard, optimizer in zip(guards, optimizers, strict=True):
                guard.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1)
        for turn in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            factor = math.inf if bad_first and turn == 0 else 1.0
            scaler.scale(one * factor).backward()
            scaler.scale(two * 1.0).backward()
            for optimizer in optimizers:
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
        return one.item(), two.item(), scaler.get_scale()

    assert run(attach=True) == run(attach=False)
    assert run(attach=True) == ((-1.0, -2.0, 128.0) if bad_first else (-2.0, -2.0, 512.0))


def test_a_window_under_a_scaler_names_the_call():
    model, optimizer, guard = guarded(OPTIMIZERS["fastguard.AdamW"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(model, seeded(0), scaler)
    guard.accumulate(scaler=scaler)
    with pytest.raises(ValueError, match=r"guard\.step\(optimizer, scaler=scaler\)"):
        scaler.step(optimizer)
    assert not guard.step(optimizer, scaler=scaler).skipped


def test_a_window_without_a_scaler_is_stepped():
    ends = []
    for attach in (True, False):
        model = small_model()
        optimizer = fastguard.AdamW(model.parameters())
        guard = GradGuard(model)
        if attach:
            guard.attach(optimizer)
        for x in BATCHES:
            backward(model, x)
            guard.accumulate()
        optimizer.step() if attach else guard.step(optimizer)
        ends.append(everything(model, optimizer))
    assert_same_bits(*ends)


# --- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["attach", "scheduler"])
def test_schedulers_patch_step_before_or_after(make, first, recwarn):
    model = small_model()
    optimizer, guard = make(model.parameters()), GradGuard(model)
    if first == "attach":
        guard.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if first == "scheduler":
        guard.attach(optimizer)
    backward(model, seeded(0))
    optimizer.step()
    scheduler.step()
    before = everything(model, optimizer)
    backward(model, seeded(0, math.nan))
    optimizer.step()
    assert_same_bits(before, everything(model, optimizer))
    assert guard.state_dict()["steps"] == 2
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    guard.detach()
    optimizer.zero_grad()
    optimizer.step()  # the patched step outlives the guard
    assert guard.state_dict()["steps"] == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_guarded_scheduler_counts_applied_steps(late, monkeypatch):
    if late:
        slow(monkeypatch)
    parameters = [nn.Parameter(torch.ones(4))]
    optimizer = fastguard.AdamW(parameters, lr=1.0)
    guard = GradGuard(parameters, max_lag=2)
    guard.attach(optimizer)
    scheduler = guard.scheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rates = []
    for norm in (1.0, math.nan, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0):
        set_gradient_norms(parameters, norm)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    if not late:
        assert rates == [0.5**n for n in (1, 1, 2, 2, 3, 4, 5, 6)]
    assert scheduler.last_epoch == 6
    assert optimizer.state[parameters[0]]["step"] == 6


def test_a_guarded_scheduler_resumes_and_takes_a_plain_ones_state():
    parameters = [nn.Parameter(torch.ones(4))]
    optimizer = fastguard.AdamW(parameters, lr=1.0)
    guard = GradGuard(parameters)
    scheduler = guard.scheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    set_gradient_norms(parameters, math.nan)
    guard.step(optimizer)
    state = scheduler.state_dict()  # one step is owed
    again = guard.scheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    again.load_state_dict(state)
    again.step()
    assert again.last_epoch == 0
    plain = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    plain.step()
    again.load_state_dict(plain.state_dict())
    assert again.last_epoch == 1
    again.step()
    plain.load_state_dict(again.state_dict())
    assert plain.last_epoch == 2


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["step", "loop", "attached loop"])
def test_compiled_code_that_calls_a_guarded_step(make, what):
    """A traced guard would bake a verdict into the graph, and let the NaN of a later batch pass."""
    ends = []
    for compiled in (True, False):
        compile_ = functools.partial(torch.compile, backend="eager") if compiled else lambda f: f
        model = without_batch_norm()
        optimizer = make(model.parameters())
        guard = GradGuard(model, max_norm=0.02)
        if what != "loop":
            guard.attach(optimizer)
        if what == "step":
            optimizer.step = compile_(optimizer.step)

        def turn(x, model=model, optimizer=optimizer, guard=guard):
            optimizer.zero_grad()
            backward(model, x)
            guard.step(optimizer) if what == "loop" else optimizer.step()

        if what != "step":
            turn = compile_(turn)
        for x in BATCHES:
            turn(x)
        ends.append(everything(model, optimizer))
        assert guard.state_dict()["steps"] == len(BATCHES)
    torch._dynamo.reset()
    assert_same_bits(*ends)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_step_of_a_plain_optimizer_is_refused(make):
    model = small_model()
    optimizer = make(model.parameters())
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    backward(model, seeded(0))
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        GradGuard(model).step(optimizer)
    with pytest.raises(ValueError, match=r"was replaced by"):
        GradGuard(model).attach(optimizer)
