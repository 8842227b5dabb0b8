"""Buffers of modules that come from elsewhere: inference mode, the meta device, copies."""

import copy
import math

import pytest
import torch

import fastguard
from fastguard import GradGuard, ops
from fastguard.ops.settle import can_settle

from .test_buffers import BAD, GOOD, assert_same_buffers, buffers_of
from .test_grad_guard import small_model, train_step

# --- where modules come from --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_state_dict", "commit_buffers", "GradGuard"])
def test_what_is_committed_in_inference_mode_can_be_written_later(how):
    model = small_model()
    guard = GradGuard(model)
    with torch.inference_mode():
        if how == "load_state_dict":
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        elif how == "commit_buffers":
            model.eval()(GOOD)
            guard.commit_buffers()
        else:
            guard = GradGuard(model)
    model.train()
    optimizer = fastguard.AdamW(model.parameters())
    assert not train_step(model, optimizer, guard, GOOD).skipped
    kept = buffers_of(model)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(model, kept)


def test_a_buffer_that_is_assigned_in_inference_mode():
    model = small_model()
    model.register_buffer("cache", torch.zeros(2))
    guard, optimizer = GradGuard(model), fastguard.AdamW(model.parameters())
    with torch.inference_mode():
        model.cache = model.cache + 1
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache += math.nan
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("first", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.SGD])
def test_a_guard_built_on_the_meta_device(make, first):
    with torch.device("meta"):
        model = small_model()
        guard = GradGuard(model, max_norm=0.5)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = make(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, guard, first).skipped == first.isnan().any()
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped
    kept = buffers_of(model)
    assert all(b.isfinite().all() for b in kept.values())
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(model, kept)


def test_a_buffer_that_moves_to_the_meta_device():
    """There are no values in it then: nothing to look at, and nothing to put back."""
    model = small_model()
    model.register_buffer("cache", torch.ones(2))
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache = model.cache.to("meta")
    kept = buffers_of(model)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.is_meta
    del kept["cache"]
    assert all(torch.equal(model.get_buffer(name), value) for name, value in kept.items())


def test_a_deep_copy_with_a_guard_of_its_own():
    model = small_model()
    guard = GradGuard(model)
    twin, twin_guard = copy.deepcopy((model, guard))
    optimizer = fastguard.AdamW(twin.parameters())
    mean = model[1].running_mean.clone()
    assert not train_step(twin, optimizer, twin_guard, GOOD).skipped
    kept = buffers_of(twin)
    assert train_step(twin, optimizer, twin_guard, BAD).skipped
    assert_same_buffers(twin, kept)
    assert torch.equal(model[1].running_mean, mean)


def test_buffers_that_no_state_dict_holds():
    model = small_model()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model.cache += 1
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache += math.nan
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.tolist() == [1.0, 1.0]


def test_a_buffer_on_another_device_than_the_verdict(monkeypatch):
    """As after a rollback, whose verdict is the host's: no kernel is asked for both."""
    buffer, saved = torch.ones(2), torch.zeros(2)
    elsewhere = torch.ones(2, device="meta")
    assert can_settle([buffer], [saved], torch.device("cpu"))
    assert not can_settle([buffer, elsewhere], [saved, elsewhere], torch.device("cpu"))


@pytest.mark.parametrize("verdict", [ops.Verdict.APPLY, ops.Verdict.SKIP_NONFINITE])
def test_buffers_that_share_memory_are_settled_as_one(verdict):
    """Many enough that several threads write them."""
    before, now = torch.arange(300_000.0), torch.arange(300_000.0) + 0.5
    memory = now.clone()
    buffers = [memory[:200_000], memory[100_000:]] * 4
    saved = [before[:200_000].clone(), before[100_000:].clone()] * 4
    ops.settle_(buffers, saved, torch.tensor(int(verdict)), torch.arange(8))
    expected = before if verdict.skipped else now
    assert torch.equal(memory, expected)
    assert all(map(torch.equal, saved, [expected[:200_000], expected[100_000:]] * 4))
