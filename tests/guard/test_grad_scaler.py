"""GradScaler beside a guard: what its internals must be, and how it is not to be used."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

import fastguard
from fastguard import GradGuard


def test_the_internals_that_are_read_are_those_of_this_torch():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    changed = f"torch {torch.__version__} changed GradScaler: mend fastguard/guard/grad_scaler.py; "
    own = vars(scaler)
    for name in ("_scale", "_growth_tracker", "_per_optimizer_states"):
        assert name in own, f"{changed}it has no {name}, only {sorted(own)}"
    assert own["_scale"] is None, f"{changed}_scale is not None before the first loss"
    scaler.scale(weight.sum()).backward()
    for name, dtype in (("_scale", torch.float32), ("_growth_tracker", torch.int32)):
        tensor = vars(scaler)[name]
        kind = tensor.dtype, tuple(tensor.shape)
        assert kind == (dtype, ()), f"{changed}{name} is of {kind}"
    states = scaler._per_optimizer_states
    assert states.get(id(optimizer)) is None, f"{changed}there is a state before unscale_"
    scaler.unscale_(optimizer)
    state = states[id(optimizer)]
    assert state["stage"] is OptState.UNSCALED, f"{changed}after unscale_ the state is {state}"
    found = state["found_inf_per_device"][torch.device("cpu")]
    assert found.item() == 0.0, f"{changed}unscale_ found {found} in finite gradients"
    scaler.step(optimizer)
    assert state["stage"] is OptState.STEPPED, f"{changed}after step the state is {state}"
    scaler.update()
    assert not scaler._per_optimizer_states, f"{changed}update leaves states of optimizers"
    step = inspect.getsource(torch.amp.GradScaler.step)
    for word in ("_step_supports_amp_scaling", "optimizer.grad_scale", "optimizer.found_inf"):
        assert word in step, f"{changed}step does not mention {word}"


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_can_be_pickled_and_copied_after_a_step(unscale):
    """An entry for the optimizer, which indexing makes, would forbid it."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = fastguard.AdamW([weight]), GradGuard([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for value in (1.0, math.inf):
        scaler.scale(weight.sum() * value).backward()
        if unscale:
            scaler.unscale_(optimizer)
        guard.step(optimizer, scaler=scaler)
        optimizer.zero_grad()
        for again in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
            assert again.get_scale() == scaler.get_scale()
    assert scaler.get_scale() == 4.0


def test_a_loss_that_was_never_scaled_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = fastguard.AdamW([weight]), GradGuard([weight])
    weight.sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"its scale of 65536: call scaler\.scale\(loss\)"):
        guard.step(optimizer, scaler=scaler)
    with pytest.raises(ValueError, match=r"call scaler\.scale\(loss\)"):
        guard.accumulate(scaler=scaler)
    assert weight.tolist() == [1.0, 1.0]
    assert guard.state_dict()["steps"] == 0


def test_a_scaler_that_stepped_already_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = torch.optim.SGD([weight], lr=1.0), GradGuard([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(ValueError, match=r"has stepped this optimizer since its last update"):
        guard.step(optimizer, scaler=scaler)
    assert weight.tolist() == [0.0, 0.0]


def two_networks():
    one, two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    optimizers = [torch.optim.SGD([one], lr=1.0), torch.optim.SGD([two], lr=1.0)]
    guards = [GradGuard([p], max_norm=math.inf) for p in (one, two)]
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1)
    return (one, two), optimizers, guards, scaler


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad_first", [False, True])
def test_two_guards_that_leave_the_update_to_the_loop(unscale, bad_first):
    (one, two), optimizers, guards, scaler = two_networks()
    for turn in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(one * (math.inf if bad_first and turn == 0 else 1.0)).backward()
        scaler.scale(two * 1.0).backward()
        for guard, optimizer in zip(guards, optimizers, strict=True):
            if unscale:
                scaler.unscale_(optimizer)
            guard.step(optimizer, scaler=scaler, update_scaler=False)
        scaler.update()
    ends = one.item(), two.item(), scaler.get_scale()
    assert ends == ((-1.0, -2.0, 128.0) if bad_first else (-2.0, -2.0, 512.0))


def test_two_guards_that_would_each_update_one_scaler_are_refused():
    (one, two), optimizers, guards, scaler = two_networks()
    for p in (one, two):
        scaler.scale(p * 1.0).backward()
    guards[0].step(optimizers[0], scaler=scaler)
    with pytest.raises(ValueError, match="update_scaler=False"):
        guards[1].step(optimizers[1], scaler=scaler)
    assert two.item() == 0.0
    # Where the second loss is scaled after the first step, one says so.
    optimizers[1].zero_grad()
    scaler.scale(two * 1.0).backward()
    guards[1].step(optimizers[1], scaler=scaler, update_scaler=True)
    assert (one.item(), two.item(), scaler.get_scale()) == (-1.0, -1.0, 512.0)


def test_a_guard_that_is_gone_frees_its_scaler():
    (one, two), optimizers, guards, scaler = two_networks()
    scaler.scale(one * 1.0).backward()
    guards.pop(0).step(optimizers[0], scaler=scaler)
    scaler.scale(two * 1.0).backward()
    guards[0].step(optimizers[1], scaler=scaler)
    assert two.item() == -1.0


def test_a_step_without_an_update_may_not_be_followed_by_another():
    (one, _), optimizers, guards, scaler = two_networks()
    scaler.scale(one * 1.0).backward()
    guards[0].step(optimizers[0], scaler=scaler, update_scaler=False)
    with pytest.raises(ValueError, match="since its last update"):
        guards[0].step(optimizers[0], scaler=scaler, update_scaler=False)
    assert scaler.get_scale() == 128.0
    scaler.update()
    assert scaler.get_scale() == 256.0
