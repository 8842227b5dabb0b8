"""The packed state: when it moves, what it holds, what does not fit."""

import copy
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import ops
from tests.ops.adamw_cases import laid_out, scalar, verdict_
from tests.optim.adam_cases import give_grads, parameters, run
from tests.tensors import F64, assert_close, assert_same_bits, bits


def test_parameters_come_and_go():
    """Late gradients, missing ones, new groups, replaced state and options changed on the way."""
    here, there = parameters(), parameters()
    mine, other = fastguard.Adam(here[:3]), torch.optim.Adam(there[:3])
    late, early = (nn.Parameter(torch.ones(4)) for _ in range(2))

    def act(params, optimizer, extra):
        give_grads(params, 1)
        params[1].grad = None
        optimizer.step()
        assert params[1] not in optimizer.state
        give_grads(params, 2)
        optimizer.step()
        optimizer.add_param_group({"params": [*params[3:], extra], "lr": 0.01, "maximize": True})
        give_grads([*params, extra], 3)
        optimizer.step()
        params[0].grad = None
        optimizer.step()
        give_grads(params, 4)
        optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)
        optimizer.step()
        optimizer.state[params[4]] = {k: v * 2 for k, v in optimizer.state[params[4]].items()}
        optimizer.param_groups[0]["weight_decay"] = 0.3
        optimizer.step()
        optimizer.param_groups[1]["params"].pop()  # extra
        give_grads([extra], 5)
        optimizer.step()

    act(here, mine, late)
    act(there, other, early)
    assert_close([*here, late], [*there, early])
    for p, q in zip(here, there, strict=True):
        assert mine.state[p]["step"] == other.state[q]["step"]


def gapped():
    wide = torch.zeros(6, 8)
    return nn.Parameter(wide[:, ::2])


def storages(optimizer, name="exp_avg"):
    states = optimizer.state.values()
    return {s[name].untyped_storage().data_ptr() for s in states if s[name].numel()}


def skip(optimizer):
    """A step that writes nothing, and so shows what bringing the buckets up to date does."""
    optimizer.decision = ops.Decision(scalar(1.0), verdict_(2))
    optimizer.step()
    optimizer.decision = None


def kept(optimizer):
    return {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}


def assert_kept(optimizer, before):
    for p, entries in before.items():
        for name, entry in entries.items():
            assert_same_bits(bits([optimizer.state[p][name]]), bits([entry]))


def test_the_state_is_views_in_the_order_of_the_parameter():
    params = [*parameters(), gapped(), nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64).t())]
    optimizer = fastguard.AdamW(params, amsgrad=True)
    run(optimizer, params)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
        assert len(storages(optimizer, name)) == 1
    real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    offsets = ops.packed_offsets(p.numel() for p in real)
    start = optimizer.state[params[0]]["exp_avg"].data_ptr()
    for i, p in enumerate(params):
        state = optimizer.state[p]
        assert state["step"].shape == () and state["step"]._base.shape == (len(params),)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert state[name].shape == p.shape and state[name].is_complex() == p.is_complex()
            assert state[name].stride() == ((4, 1) if i == 6 else p.stride())
        if p.numel():
            assert state["exp_avg"].data_ptr() - start == 4 * offsets[i]


def test_float64_parameters_have_packs_of_their_own():
    here, there = (
        [p for pair in zip(parameters(), parameters(F64), strict=True) for p in pair]
        for _ in range(2)
    )
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    run(mine, here)
    run(other, there)
    assert_close(here, there)
    assert len(storages(mine)) == 2


def replace(optimizer, params):
    state = optimizer.state[params[4]]
    state["exp_avg"] = state["exp_avg"].clone()
    state["step"] = state["step"].clone()


def replace_all(optimizer, params):
    for p in params:
        optimizer.state[p] = {k: v.contiguous().clone() for k, v in optimizer.state[p].items()}


def reload(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(optimizer, params):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.add_param_group({"params": [extra]})


def add_parameter(optimizer, params):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].insert(2, extra)


def lose_gradients(optimizer, params):
    params[1].grad = params[4].grad = None


def amsgrad_on(optimizer, params):
    optimizer.param_groups[0]["amsgrad"] = True


def delete(optimizer, params):
    del optimizer.state[params[0]]["exp_avg"]


def from_channels_last(optimizer, params):
    params[1].data = params[1].data.contiguous()


def to_transposed(optimizer, params):
    params[5].data = params[5].data.t().contiguous().t()


def from_transposed_to_gaps(optimizer, params):
    """Not contiguous before and after."""
    params[4].data = laid_out(params[4].data, "gaps")


@pytest.mark.parametrize(
    "change",
    [replace, replace_all, reload, add_group, add_parameter, lose_gradients, amsgrad_on, delete,
     from_channels_last, to_transposed, from_transposed_to_gaps],
)  # fmt: skip
def test_packing_anew_keeps_the_values_bit_for_bit(change):
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = kept(optimizer)
    change(optimizer, params)
    if change is delete:
        before[params[0]]["exp_avg"].zero_()
    skip(optimizer)
    assert_kept(optimizer, before)
    assert len(storages(optimizer)) == {add_group: 2, lose_gradients: 3}.get(change, 1)
    for p in params:
        strides = ops.packed_strides(p)
        assert p.grad is None or optimizer.state[p]["exp_avg"].stride() == strides
    packed_now = storages(optimizer)
    skip(optimizer)
    assert storages(optimizer) == packed_now  # nothing moves without a reason
    # And all of them are stepped: as by an optimizer that has loaded the same.
    others = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = torch.optim.AdamW(others)
    if change is not add_group:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_grads(optimizer.param_groups[0]["params"], 9, as_parameters=True)
        give_grads(others, 9, as_parameters=True)
        optimizer.step()
        other.step()
        assert_close(optimizer.param_groups[0]["params"], others)
        for p, q in zip(optimizer.param_groups[0]["params"], others, strict=True):
            for name, entry in optimizer.state[p].items():
                torch.testing.assert_close(entry, other.state[q][name])
        assert len(storages(optimizer)) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_an_equal_entry_is_not_the_same(steps):
    p = nn.Parameter(torch.ones(1))
    optimizer = fastguard.AdamW([p])
    run(optimizer, [p], range(steps))
    for name, entry in list(optimizer.state[p].items()):
        mine = optimizer.state[p][name] = entry.clone()
        run(optimizer, [p], [9])
        assert optimizer.state[p][name] is not mine  # it was copied into a pack that is stepped
        assert optimizer.state[p][name] != mine


def test_entries_of_others_in_the_state_move_nothing():
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = [optimizer.state[p]["exp_avg"] for p in params]
    for calls in (torch.zeros(3), torch.ones(3), 5):
        for p in params:
            optimizer.state[p]["calls"] = calls
        run(optimizer, params, [1])
        assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, before, strict=True))


def test_packs_that_need_not_change_stay():
    params = parameters()
    optimizer = fastguard.AdamW([{"params": params[:3]}, {"params": params[3:]}])
    run(optimizer, params)
    first, second = ([optimizer.state[p]["exp_avg"] for p in ps] for ps in (params[:3], params[3:]))
    params[3].grad = None
    skip(optimizer)
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, first, strict=False))
    assert not any(
        optimizer.state[p]["exp_avg"] is m for p, m in zip(params[3:], second, strict=True)
    )


def in_two_groups(params):
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]


def wakes_one_of_two(optimizer, params):
    """Both were idle until now."""
    give_grads(params[:1], 7)


def sleeps_in_the_second_group(optimizer, params):
    params[4].grad = None


def replaces_in_the_second_group(optimizer, params):
    for p in params[4:]:
        state = optimizer.state[p]
        state["exp_avg"] = state["exp_avg"] * 0.5


def joins_the_second_group(optimizer, params):
    params.append(nn.Parameter(torch.ones(3)))
    give_grads(params[-1:], 7)
    optimizer.param_groups[1]["params"].append(params[-1])


@pytest.mark.parametrize(
    "change",
    [wakes_one_of_two, sleeps_in_the_second_group, replaces_in_the_second_group,
     joins_the_second_group],
)  # fmt: skip
def test_a_change_in_one_of_two_groups_is_seen(change):
    here, there = parameters(), parameters()
    mine = fastguard.AdamW(in_two_groups(here))
    other = torch.optim.AdamW(in_two_groups(there))
    for params, optimizer in ((here, mine), (there, other)):
        run(optimizer, params)
        params[0].grad = params[1].grad = None
        optimizer.step()
        change(optimizer, params)
        optimizer.step()
        give_grads(params, 8)
        optimizer.step()
    assert_close(here, there)
    for p, q in zip(here, there, strict=True):
        assert mine.state[p]["step"] == other.state[q]["step"]


def test_a_state_of_some_parameters_with_steps_of_other_shapes_loads():
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    there[0].grad = None
    give_grads(there[1:], 0)
    other.step()
    saved = copy.deepcopy(other.state_dict())
    saved["state"][1]["step"] = torch.tensor([1.0], dtype=F64)  # default dtype float64, old torch
    mine.load_state_dict(saved)
    assert mine._loading is None and not mine._optimizer_load_state_dict_pre_hooks
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    run(mine, here, [1])
    run(other, there, [1])
    assert_close(here, there)
    saved["state"][2]["step"] = math.nan
    with pytest.raises(ValueError, match="parameter 2: its step is NaN"):
        mine.load_state_dict(saved)
    assert mine._loading is None and not mine._optimizer_load_state_dict_pre_hooks


def test_an_error_names_the_group_by_its_number_now():
    params = parameters()
    mine = fastguard.AdamW(in_two_groups(params))
    run(mine, params)
    mine.param_groups.pop(0)
    mine.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr of param group 0 is nan"):
        mine.step()


def test_a_change_of_memory_alone_moves_no_state():
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = [optimizer.state[p]["exp_avg"] for p in params]
    for p in params:
        p.data = p.data.clone()
    run(optimizer, params)
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, before, strict=True))


def test_a_parameter_that_shrinks_where_it_lies_is_seen():
    """Its moments would fit, rounded to 16."""
    p = nn.Parameter(torch.randn(20, 3))
    optimizer = fastguard.AdamW([p])
    run(optimizer, [p])
    p.data = p.data[:17]
    p.grad = torch.ones(17, 3)
    with pytest.raises(RuntimeError, match=r"exp_avg must be .*\(17, 3\), got .*\(20, 3\)"):
        optimizer.step()


def test_a_group_that_can_not_be_stepped_leaves_the_others_alone():
    one, two = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1).expand(4))
    optimizer = fastguard.AdamW([{"params": [one]}, {"params": [two]}])
    one.grad, two.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert one.tolist() == [1.0] * 4
    assert optimizer.state[one]["step"] == 0


def test_an_idle_parameter_does_not_keep_the_pack_alive():
    params = [nn.Parameter(torch.zeros(n)) for n in (4, 100_000)]
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    params[0].grad = None
    before = kept(optimizer)
    skip(optimizer)
    assert_kept(optimizer, before)
    for entry in optimizer.state[params[0]].values():
        assert entry.untyped_storage().nbytes() == entry.numel() * 4


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("exp_avg", torch.zeros(1), r"exp_avg must be a torch.float32 .*\(5,\), got .*\(1,\)"),
        ("exp_avg_sq", torch.zeros(5, dtype=F64), "exp_avg_sq must be .*got torch.float64"),
        ("step", 3.0, r"step must be .*shape \(\), got float; delete it"),
        ("step", torch.tensor(3), "step must be .*got torch.int64"),
    ],
)
def test_state_that_does_not_fit_is_refused(name, entry, message):
    params = parameters()
    optimizer = fastguard.AdamW([{"params": params[1:]}, {"params": params[:1]}])
    run(optimizer, params)
    optimizer.state[params[0]][name] = entry
    before = bits(params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"parameter 0 of group 1: its {message}"):
            optimizer.step()
    assert_same_bits(bits(params), before)
    del optimizer.state[params[0]][name]
    optimizer.step()


def test_parameters_that_share_memory_are_refused_and_none_is_written():
    memory = torch.ones(10)
    whole, *shared = map(torch.nn.Parameter, (torch.ones(3), memory[:6], memory[4:]))
    for p in (whole, *shared):
        p.grad = torch.ones_like(p)
    optimizer = fastguard.AdamW([whole, *shared], lr=0.1)
    with pytest.raises(RuntimeError, match="parameters 1 and 2 of group 0 share memory"):
        optimizer.step()
    assert (memory == 1).all() and (whole == 1).all()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert (memory[:6] < 1).all() and (memory[6:] == 1).all()
