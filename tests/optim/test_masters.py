"""Masters of Adam and AdamW: the steps, the state dicts, and writes by others."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard
from tests.optim.adam_cases import PAIRS, give_grads, parameters, run, state_bits
from tests.tensors import assert_same_bits, bits

NARROW = [torch.bfloat16, torch.float16]
MASTER = "master_param"


def masters(optimizer):
    return [s[MASTER] for s in optimizer.state.values() if MASTER in s]


def whole(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return bits(params) + state_bits(optimizer)


def mixed(dtype):
    """Parameters of 16 and of 32 bits in turns."""
    listed = parameters(dtype)
    listed[::3] = [nn.Parameter(p.detach().float()) for p in listed[::3]]
    return listed


def net(dtype=torch.float32, tied=False):
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    if tied:
        made[3].weight = made[2].weight
    for part in (made[0], made[2], made[3]):
        part.to(dtype)
    return made


def train(model, optimizer, steps):
    for seed in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("make", [parameters, mixed])
def test_it_steps_as_torch_on_float32_copies(ours, theirs, dtype, make):
    here = make(dtype)
    there = [nn.Parameter(p.detach().float()) for p in here]
    options = {"amsgrad": True, "weight_decay": 0.1, "lr": 1e-3}
    mine = ours([{"params": here[:2]}, {"params": here[2:]}], **options, master_weights=True)
    other = theirs(there, **options)
    for seed in range(5):
        give_grads(here, seed)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.float()
        mine.step()
        other.step()
    assert mine.master_weights and not ours(make(dtype)).master_weights
    for p, q in zip(here, there, strict=True):
        value = mine.state[p].get(MASTER, p)
        assert value.dtype == torch.float32 and (MASTER in mine.state[p]) == (p.dtype == dtype)
        torch.testing.assert_close(value, q.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(p, value.to(p.dtype))


def test_steps_below_the_last_bit_add_up():
    results = []
    for master_weights in (False, True):
        p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = fastguard.AdamW([p], 1e-4, weight_decay=0.0, master_weights=master_weights)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(p[0].item())
    assert results == [1.0, 0.98046875]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", NARROW)
def test_state_with_masters_survives(dtype, way):
    params = mixed(dtype)
    mine = fastguard.AdamW(params, amsgrad=True, master_weights=True)
    run(mine, params)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(mine.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = fastguard.AdamW(others, master_weights=True)
        other.load_state_dict(torch.load(file))
    else:
        other = copy.deepcopy(mine) if way == "deepcopy" else pickle.loads(pickle.dumps(mine))
        others = other.param_groups[0]["params"]
    assert other.master_weights
    assert_same_bits(state_bits(other), state_bits(mine))
    run(mine, params, range(4, 7))
    run(other, others, range(4, 7))
    assert_same_bits(whole(other), whole(mine))


@pytest.mark.parametrize("theirs", PAIRS[1])
def test_a_state_without_masters_gets_them_from_the_parameters(theirs):
    here, there = parameters(torch.bfloat16), parameters(torch.bfloat16)
    other = theirs(there)
    run(other, there)
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    mine = fastguard.AdamW(here, master_weights=True)
    mine.load_state_dict(other.state_dict())
    assert not masters(mine)
    mine.decision = fastguard.ops.Decision(torch.ones((), dtype=torch.float64), torch.tensor(2))
    give_grads(here, 9)
    mine.step()  # a skip
    assert_same_bits(bits(masters(mine)), bits([p.float() for p in here]))


def test_torch_loads_a_state_with_masters_and_gives_it_back():
    here = parameters(torch.bfloat16)
    mine = fastguard.AdamW(here, master_weights=True)
    run(mine, here)
    there = [nn.Parameter(p.detach().clone()) for p in here]
    other = torch.optim.AdamW(there)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    run(other, there, range(4, 6))
    mine.load_state_dict(other.state_dict())
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    run(mine, here, [6])  # torch's parameters count, not the masters that it left as they were
    run(other, there, [6])
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-3)


def test_dropped_masters_are_warned_of_where_they_differ():
    model = net(torch.bfloat16)
    mine = fastguard.AdamW(model.parameters(), master_weights=True)
    train(model, mine, range(3))
    wide = net()
    wide.load_state_dict(model.state_dict())  # rounded
    other = fastguard.AdamW(wide.parameters())
    with pytest.warns(UserWarning, match="has float32 masters, and this optimizer keeps none for"):
        other.load_state_dict(mine.state_dict())
    assert not masters(other)
    wide.load_state_dict(mine.master_state_dict(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(mine.state_dict())
    assert not masters(other)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_to_a_float32_model_and_back_bit_for_bit(tied):
    model = net(torch.bfloat16, tied)
    mine = fastguard.AdamW(model.parameters(), master_weights=True)
    train(model, mine, range(3))
    weights, moments = mine.master_state_dict(model), copy.deepcopy(mine.state_dict())
    assert weights.keys() == model.state_dict().keys() and hasattr(weights, "_metadata")
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights.values())
    wide = net(tied=tied)
    wide.load_state_dict(weights)
    other = fastguard.AdamW(wide.parameters())
    other.load_state_dict(moments)

    back = net(torch.bfloat16, tied)
    again = fastguard.AdamW(back.parameters(), master_weights=True)
    again.load_state_dict(other.state_dict())
    again.load_master_state_dict(back, other.master_state_dict(wide))
    train(model, mine, range(3, 6))
    train(back, again, range(3, 6))
    assert_same_bits(whole(again), whole(mine))
    # Under autocast both runs compute with the same weights, so the float32 run is the same too.
    train(wide, other, range(3, 6))
    same = mine.master_state_dict(model)
    assert_same_bits(bits(wide.state_dict().values()), bits(same.values()))


def test_float32_weights_load_before_the_first_step():
    wide, model = net(), net(torch.bfloat16)
    with torch.no_grad():
        for p in wide.parameters():
            p.mul_(1.001)
    mine = fastguard.AdamW(model.parameters(), amsgrad=True, master_weights=True)
    mine.load_master_state_dict(model, wide.state_dict())
    found = mine.master_state_dict(model)
    assert_same_bits(bits(found.values()), bits(wide.state_dict().values()))
    saved = copy.deepcopy(mine.state_dict())  # what a run writes that ends before its first step
    other = torch.optim.AdamW(net(torch.bfloat16).parameters(), amsgrad=True)
    other.load_state_dict(saved)
    train(model, mine, [0])
    narrow, fresh = net(torch.bfloat16), net()
    again = fastguard.AdamW(narrow.parameters(), amsgrad=True, master_weights=True)
    narrow.load_state_dict(wide.state_dict())
    again.load_state_dict(saved)
    train(narrow, again, [0])
    assert_same_bits(whole(again), whole(mine))
    fresh.load_state_dict(wide.state_dict())
    train(fresh, fastguard.AdamW(fresh.parameters(), amsgrad=True), [0])
    assert_same_bits(
        bits(fresh.state_dict().values()), bits(mine.master_state_dict(model).values())
    )


def test_a_model_of_other_parameters_is_refused():
    model = net(torch.bfloat16)
    mine = fastguard.AdamW(model.parameters(), master_weights=True)
    with pytest.raises(ValueError, match="none of the optimizer's 6 parameters with masters"):
        mine.master_state_dict(net(torch.bfloat16))
    with pytest.raises(ValueError, match="give the model that the optimizer was built for"):
        mine.load_master_state_dict(net(torch.bfloat16), model.state_dict())
    plain = fastguard.AdamW(model.parameters())
    assert_same_bits(
        bits(plain.master_state_dict(model).values()), bits(model.state_dict().values())
    )


def by_data(p, value):
    p.data.copy_(value)


def by_copy(p, value):
    with torch.no_grad():
        p.copy_(value)


def by_new_data(p, value):
    p.data = value.clone()


def by_load(p, value):
    nn.ParameterList([p]).load_state_dict({"0": value})


@pytest.mark.parametrize("write", [by_data, by_copy, by_new_data, by_load])
def test_what_others_write_is_never_overwritten(write):
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params, lr=1e-3, weight_decay=0.0, master_weights=True)
    run(mine, params)
    p = params[5]
    before = mine.state[p][MASTER].clone()
    value = p.detach().clone()
    value[3, 7:9] = torch.tensor([5.0, -0.0])
    write(p, value)
    give_grads(params, 5, scale=0.0)
    mine.param_groups[0]["lr"] = 0.0
    mine.step()
    expected = before.clone()
    expected[3, 7:9] = torch.tensor([5.0, -0.0])
    assert_same_bits(bits([mine.state[p][MASTER]]), bits([expected]))
    assert_same_bits(bits([p]), bits([value]))


def test_an_exchange_with_averaged_weights_leaves_no_trace():
    results = []
    for exchanges in (False, True):
        params = parameters(torch.bfloat16)
        mine = fastguard.AdamW(params, master_weights=True)
        run(mine, params)
        if exchanges:
            kept = [p.detach().clone() for p in params]
            for p in params:
                p.data.copy_(torch.zeros_like(p))
            for p, value in zip(params, kept, strict=True):
                p.data.copy_(value)
        run(mine, params, range(4, 6))
        results.append(whole(mine))
    assert_same_bits(*results)


def test_a_model_cast_before_or_between_steps():
    model = net()
    mine = fastguard.AdamW(model.parameters(), master_weights=True)
    model.bfloat16()
    run(mine, list(model.parameters()), range(2))
    assert len(masters(mine)) == 8
    model.float()
    before = [p.detach().clone() for p in model.parameters()]
    run(mine, list(model.parameters()), [2])
    model.half()
    run(mine, list(model.parameters()), [3])
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, mine.state[p][MASTER].half())
        torch.testing.assert_close(p.float(), old, rtol=0, atol=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_skipped_step_changes_no_bit(dtype, bad):
    params = mixed(dtype)
    mine = fastguard.AdamW(params, master_weights=True)
    guard = GradGuard(params, max_norm=1.0)
    for seed in range(3):
        give_grads(params, seed)
        assert not guard.step(mine).skipped
    params[1].data[0] = 3.0  # written by others: the skip leaves this too
    before = whole(mine)
    give_grads(params, 4)
    params[4].grad.view(-1)[-1] = bad
    assert guard.step(mine).skipped
    assert_same_bits(whole(mine), before)
    give_grads(params, 5)
    assert not guard.step(mine).skipped
    assert all(p.isfinite().all() for p in [*params, *masters(mine)])


@pytest.mark.parametrize("guarded", [False, True])
def test_grad_scaler_with_float16(guarded):
    """The scale is found, an overflow is skipped, and unscaling happens in float32."""
    here = parameters(torch.float16)
    there = [nn.Parameter(p.detach().float()) for p in here]
    mine, other = fastguard.AdamW(here, master_weights=True), torch.optim.AdamW(there)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    guard = GradGuard(here)
    for seed in range(6):
        give_grads(here, seed, scale=1e-3)
        scaler.scale(torch.ones(()))
        for p, q in zip(here, there, strict=True):
            scale = scaler.get_scale()
            p.grad = p.grad * scale
            q.grad = p.grad.float() / scale
        if seed == 3:
            here[0].grad[2] = math.inf
        before = whole(mine)
        if guarded:
            guard.step(mine, scaler=scaler)
        else:
            scaler.step(mine)
            scaler.update()
        if seed == 3:
            assert_same_bits(whole(mine), before)
        else:
            other.step()
    assert scaler.get_scale() == 2.0**9
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(mine.state[p][MASTER], q.detach(), rtol=1e-6, atol=1e-7)


def test_a_master_that_is_not_finite_is_refused():
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params, master_weights=True)
    run(mine, params)
    saved = copy.deepcopy(mine.state_dict())
    saved["state"][1][MASTER][3, 0, 0, 0] = math.nan
    before = whole(mine)
    with pytest.raises(ValueError, match="parameter 1: its master_param is NaN or infinite"):
        mine.load_state_dict(saved)
    mine.state[params[1]][MASTER] = saved["state"][1][MASTER]
    with pytest.raises(RuntimeError, match="its master_param is NaN or infinite"):
        mine.step()
    assert_same_bits(bits(params), before[: len(params)])


def test_an_idle_parameter_keeps_its_master():
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params, master_weights=True)
    run(mine, params)
    before = mine.state[params[5]][MASTER].clone()
    params[5].grad = None
    mine.step()
    after = mine.state[params[5]][MASTER]
    assert torch.equal(after, before)
    assert after.untyped_storage().nbytes() == after.numel() * 4


def test_a_rollback_restores_masters():
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params, master_weights=True)
    rollback = fastguard.Rollback(every=1, keep=1)
    guard = GradGuard(params, patience=2, on_patience="rollback", rollback=rollback)
    for seed in range(3):
        give_grads(params, seed)
        guard.step(mine)
    before = whole(mine)
    for p in params:
        p.data.zero_()
    for _ in range(2):
        give_grads(params, 5)
        params[1].grad.fill_(math.nan)
        guard.step(mine)
    assert_same_bits(whole(mine), before)
    assert_same_bits(bits(params), bits([m.bfloat16() for m in masters(mine)]))
