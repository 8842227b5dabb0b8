"""State dicts and pickles of Adam and AdamW."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastguard
from tests.optim.adam_cases import PAIRS, parameters, run, state_bits
from tests.tensors import F64, assert_close, assert_same_bits, bits


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize(
    "implementation", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]
)
def test_state_dicts_load_both_ways(ours, theirs, implementation):
    # torch's fused step on the CPU takes a gradient that is laid out otherwise in memory order.
    laid = {"as_parameters": True}
    options = {"amsgrad": True, "betas": (0.8, 0.9), "weight_decay": 0.1}
    here, there = parameters(), parameters()
    other = theirs(there, **options, **implementation)
    run(other, there, **laid)
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    mine = ours(here)
    mine.load_state_dict(other.state_dict())
    run(mine, here, range(4, 7), **laid)
    run(other, there, range(4, 7), **laid)  # whose state is not shared
    assert_close(here, there)
    back = theirs(there, **implementation)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    for p, q in zip(here, there, strict=True):
        q.data = p.data.clone()
    run(mine, here, range(7, 9), **laid)
    run(back, there, range(7, 9), **laid)
    assert_close(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_our_own_state_survives(dtype, way):
    params = parameters(dtype)
    mine = fastguard.AdamW(params, amsgrad=True)
    run(mine, params)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(mine.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = fastguard.AdamW(others)
        other.register_load_state_dict_post_hook(
            lambda o: [s["exp_avg"].add_(0) for s in o.state.values()]
        )
        other.load_state_dict(torch.load(file))
    else:
        other = copy.deepcopy(mine) if way == "deepcopy" else pickle.loads(pickle.dumps(mine))
        others = other.param_groups[0]["params"]
    assert other._step_supports_amp_scaling
    assert_same_bits(state_bits(other), state_bits(mine))
    run(mine, params, range(4, 7))
    run(other, others, range(4, 7))
    assert_same_bits(bits(others), bits(params))
    assert_same_bits(state_bits(other), state_bits(mine))


@pytest.mark.parametrize("source", PAIRS[1])
def test_a_loaded_state_is_a_copy(source):
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), source(there)
    run(other, there)
    mine.load_state_dict(other.state_dict())
    before = state_bits(mine)
    run(other, there)
    assert_same_bits(state_bits(mine), before)
    run(mine, here)
    before = state_bits(mine)
    run(other, there)
    assert_same_bits(state_bits(mine), before)


def test_torch_rounds_the_moments_of_bfloat16_that_it_loads():
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params)
    run(mine, params)
    other = torch.optim.AdamW(params)
    other.load_state_dict(mine.state_dict())
    run(other, params)
    assert other.state[params[0]]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch.save", "pickle"])
def test_files_are_not_larger_than_torchs(save):
    """Packed tensors are written once, not once for each of their views."""
    sizes = []
    for optimizer_class in (fastguard.AdamW, torch.optim.AdamW):
        params = [nn.Parameter(torch.zeros(100)) for _ in range(50)]
        optimizer = optimizer_class(params)
        run(optimizer, params, [0])
        file = io.BytesIO()
        save(optimizer.state_dict() if save is torch.save else optimizer, file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] <= sizes[1] * 1.02
