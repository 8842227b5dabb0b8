"""Copies, pickles and checkpoints of attached optimizers."""

import copy
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

from fastguard import GradGuard
from fastguard.guard.attached import STATE_KEY, link_of
from fastguard.thresholds import ZClip
from tests.tensors import assert_same_bits, bits

from . import test_attached
from .test_attached import BATCHES, backward, guarded
from .test_grad_guard import everything, small_model
from .test_update import OPTIMIZERS, seeded

make = test_attached.make  # a fixture

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
