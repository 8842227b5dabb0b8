"""Options and optimizer state that no step may take."""

import copy
import math

import pytest
import torch

import fastguard
from fastguard import GradGuard
from tests.tensors import assert_same_bits

from . import test_update
from .test_grad_guard import everything, small_model, train_step
from .test_update import seeded

make = test_update.make  # a fixture

# --- options and state that no step may take ------------------------------------------------------


@pytest.mark.parametrize("lr", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_learning_rate_that_is_not_finite_is_refused(make, lr):
    """The gradients are good, so the verdict would be APPLY, and the weights NaN."""
    model = small_model()
    optimizer = make(model.parameters())
    guard = GradGuard(model)
    train_step(model, optimizer, guard, seeded(0))
    before, state = everything(model, optimizer), guard.state_dict()
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr of param group 0 is (nan|inf)"):
        guard.step(optimizer)
    assert_same_bits(before, everything(model, optimizer))
    assert guard.state_dict() == state


MOMENTS = ("exp_avg", "momentum_buffer", "square_avg", "calls")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("how", ["before the first step", "loaded later", "loaded twice"])
def test_a_moment_that_is_not_finite_is_refused(make, how, value):
    model = small_model()
    optimizer = make(model.parameters())
    train_step(model, optimizer, GradGuard(model), seeded(0))
    good = copy.deepcopy(optimizer.state_dict())
    entries = optimizer.state[model[1].weight]
    name = next(name for name in MOMENTS if name in entries)
    guard = GradGuard(model)
    if how == "before the first step":
        entries[name].view(-1)[0] = value
    else:
        train_step(model, optimizer, guard, seeded(1))
        if how == "loaded twice":
            optimizer.load_state_dict(good)
            train_step(model, optimizer, guard, seeded(2))
        bad = copy.deepcopy(optimizer.state_dict())
        bad["state"][2][name].view(-1)[0] = value
        if isinstance(optimizer, (fastguard.Adam, fastguard.AdamW)):
            with pytest.raises(ValueError, match=f"its {name} is NaN or infinite"):
                optimizer.load_state_dict(bad)
            return
        optimizer.load_state_dict(bad)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=rf"is NaN or infinite: {name} of 1\.weight"):
        guard.step(optimizer)
    assert_same_bits(before, everything(model, optimizer))
    optimizer.load_state_dict(good)
    assert not guard.step(optimizer).skipped
