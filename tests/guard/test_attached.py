"""``guard.attach``: the optimizer's own step is the guarded one, however other code calls it."""

import copy
import functools
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, Verdict
from fastguard.guard.attached import STATE_KEY, link_of
from fastguard.thresholds import ZClip
from tests.test_clip import assert_same_bits, bits

from .test_grad_guard import everything, set_gradient_norms, small_model
from .test_guard_device import slow
from .test_update import OPTIMIZERS, OnlyCalls, seeded, without_batch_norm


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


# --- copies, pickles and checkpoints --------------------------------------------------------------


def copied(thing):
    return copy.deepcopy(thing)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("again", [copied, pickled])
@pytest.mark.parametrize("what", ["optimizer", "guard", "both"])
def test_copies_are_guarded_by_a_copy_of_the_guard(make, again, what):
    model, optimizer, guard = guarded(make, max_norm=0.02, threshold=ZClip(warmup=2))
    for x in BATCHES:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    if what == "optimizer":
        other = again(optimizer)
        other_guard = link_of(other).guard
    elif what == "guard":
        other_guard = again(guard)
        other = other_guard._attached
    else:
        other, other_guard = again([optimizer, guard])
    assert other is not optimizer and type(other) is type(optimizer)
    assert link_of(other).guard is other_guard is not guard
    other_model = other_guard._watched.module
    assert other_model is not model
    held = other_guard.state_dict()
    assert repr(held) == repr(guard.state_dict())
    before = everything(model, optimizer)
    for x in (seeded(7), seeded(8, math.nan)):
        other.zero_grad()
        backward(other_model, x)
        other.step()
    assert other_guard.last_report.skipped
    assert_same_bits(before, everything(model, optimizer))
    assert repr(guard.state_dict()) == repr(held)  # there is a NaN in it
    for x in (seeded(7), seeded(8, math.nan)):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    assert_same_bits(everything(model, optimizer), everything(other_model, other))
    assert repr(other_guard.state_dict()) == repr(guard.state_dict())


def test_a_copied_guard_puts_its_own_modules_buffers_back():
    model, _, guard = guarded(OPTIMIZERS["AdamW"])
    other_guard = copied(guard)
    other_model = other_guard._watched.module
    other_model.load_state_dict(model.state_dict())  # its hook listens
    before = bits(other_model.buffers())
    backward(other_model, seeded(0, math.nan))
    other_guard._attached.step()
    assert_same_bits(before, bits(other_model.buffers()))


def test_a_guard_with_a_process_group_says_why_it_is_not_copied():
    guard = GradGuard([nn.Parameter(torch.ones(2))])
    guard._group = object()
    with pytest.raises(TypeError, match="process_group"):
        pickle.dumps(guard)


def test_the_guards_state_travels_with_the_optimizers(make, tmp_path):
    model, optimizer, guard = guarded(make, skip_norm=10.0)
    for x in BATCHES:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    state = json.dumps(guard.state_dict())  # as text, there are NaNs in it
    assert json.dumps(json.loads(saved["param_groups"][0][STATE_KEY])) == state
    assert optimizer.param_groups[0][STATE_KEY] == ""

    _, other, other_guard = guarded(make, skip_norm=10.0)
    other.load_state_dict(saved)
    assert json.dumps(other_guard.state_dict()) == state
    assert other.param_groups[0][STATE_KEY] == ""
    assert saved["param_groups"][0][STATE_KEY] != ""

    plain_model = small_model()
    plain = make(plain_model.parameters())
    plain.load_state_dict(saved)  # a plain optimizer loads it; a guard that comes later finds it
    late = GradGuard(plain_model, skip_norm=10.0)
    late.attach(plain)
    assert json.dumps(late.state_dict()) == state
    late.detach()
    assert STATE_KEY not in plain.param_groups[0]


NAMES = "model", "optimizer"


@pytest.mark.parametrize("flatten", [False, True])
def test_the_guards_state_survives_a_distributed_checkpoint(make, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer, guard = guarded(make)
    for x in BATCHES:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    saved = dict(zip(NAMES, get_state_dict(model, optimizer, options=options), strict=True))
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    other_model, other, other_guard = guarded(make)
    found = dict(zip(NAMES, get_state_dict(other_model, other, options=options), strict=True))
    torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other_model,
        other,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=options,
    )
    assert repr(other_guard.state_dict()) == repr(guard.state_dict())
    assert_same_bits(everything(other_model, other), everything(model, optimizer))


def test_a_state_that_does_not_fit_changes_neither():
    model, optimizer, guard = guarded(OPTIMIZERS["AdamW"])
    backward(model, seeded(0))
    optimizer.step()
    good, before = optimizer.state_dict(), everything(model, optimizer)
    held = guard.state_dict()
    first = good["param_groups"][0]
    damaged = good | {"param_groups": [first | {STATE_KEY: "{"}]}
    wrong = good | {"param_groups": [first | {STATE_KEY: json.dumps({"steps": "many"})}]}
    longer = good | {"param_groups": [first | {"params": [*first["params"], 99]}]}
    longer["param_groups"][0][STATE_KEY] = json.dumps(held | {"steps": 77})
    for state, message in (
        (damaged, "damaged"), (wrong, "no state of a GradGuard"), (longer, "doesn't match")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert repr(guard.state_dict()) == repr(held)
        assert_same_bits(before, everything(model, optimizer))


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
