"""Options and state that no step may take: refused by name before anything is written."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import fastguard
from fastguard.optim import fused
from fastguard.optim.checks import check_options, check_state, nonfinite_state, state_problem
from tests.tensors import assert_same_bits, bits

from .adam_cases import give_grads, parameters, run, state_bits

BAD = [math.nan, math.inf, -math.inf]


def two_groups(**options):
    params = parameters()
    optimizer = fastguard.AdamW([{"params": params[:3]}, {"params": params[3:]}], **options)
    run(optimizer, params, range(2))
    give_grads(params, 2)
    return optimizer, params


#: Finite, and infinite in float32.
TOO_LARGE = (1e39, torch.tensor(-1e39, dtype=torch.float64))


@pytest.mark.parametrize("value", [*BAD, *map(torch.tensor, BAD), *TOO_LARGE])
@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
def test_a_step_refuses_an_option_that_is_not_finite(option, value):
    optimizer, params = two_groups()
    before = bits(params), state_bits(optimizer)
    optimizer.param_groups[1][option] = value
    message = re.escape(f"{option} of param group 1 is {float(value)};")
    with pytest.raises(ValueError, match=f"{message}.*param_groups\\[1\\]\\['{option}'\\]"):
        optimizer.step()
    assert_same_bits(bits(params), before[0])
    assert_same_bits(state_bits(optimizer), before[1])
    optimizer.param_groups[1][option] = 1e-3
    optimizer.step()
    assert not torch.equal(bits(params)[0], before[0][0])


@pytest.mark.parametrize("betas", [(math.nan, 0.9), (0.9, math.nan), (0.9, torch.tensor(math.nan))])
def test_a_step_refuses_betas_that_are_not_finite(betas):
    optimizer, _ = two_groups()
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match="betas of param group 0 is nan"):
        optimizer.step()


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
def test_options_of_other_optimizers(option):
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    check_options(sgd.param_groups)
    sgd.param_groups[0][option] = math.nan
    with pytest.raises(ValueError, match=f"{option} of param group 0 is nan"):
        check_options(sgd.param_groups)


def test_what_cannot_be_looked_at_or_is_no_number_passes():
    group = {
        "params": [],
        "lr": torch.tensor([math.nan], device="meta"),  # as on a GPU: not on the host
        "eps": (None, 1e-3),  # Adafactor's
        "betas": None,
        "weight_decay": 0,
        "max_lr": math.inf,
    }
    check_options([group])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_loading_refuses_state_that_is_not_finite(entry, bad):
    refuses(entry, bad, "NaN or infinite")


@pytest.mark.parametrize("entry", ["exp_avg_sq", "max_exp_avg_sq", "step"])
def test_loading_refuses_state_that_is_negative(entry):
    refuses(entry, -0.5, "negative")


def refuses(entry, bad, what):
    optimizer, params = two_groups(amsgrad=True)
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, [3])
    before = state_bits(optimizer)
    poisoned = saved["state"][4][entry]
    poisoned[(-1,) * poisoned.dim()] = bad
    saved["param_groups"][0]["lr"] = 0.5
    for value in (saved, {**saved, "state": {**saved["state"]}}):
        with pytest.raises(ValueError, match=f"state of parameter 4: its {entry} is {what}"):
            optimizer.load_state_dict(value)
    assert_same_bits(state_bits(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    # What is there without a load, in the place of the view, is refused by the step.
    optimizer.state[params[4]][entry] = saved["state"][4][entry]
    give_grads(params, 5)
    start = bits(params)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 1: its {entry} is {what}"):
        optimizer.step()
    assert_same_bits(bits(params), start)


def test_a_step_that_is_a_number_is_looked_at_too():
    optimizer, _ = two_groups()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 2
    optimizer.load_state_dict(saved)
    for bad in (-1, math.nan, None):
        saved["state"][0]["step"] = bad
        with pytest.raises(ValueError, match="state of parameter 0: its step is"):
            optimizer.load_state_dict(saved)


def test_state_of_others_in_a_state_dict_is_theirs():
    optimizer, params = two_groups()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["mine"] = torch.tensor(math.nan)
    saved["state"]["hook"] = 5
    optimizer.load_state_dict(saved)
    assert optimizer.state["hook"] == 5
    run(optimizer, params, [3])
    again = copy.deepcopy(optimizer)
    assert again.state["hook"] == 5


def test_state_problem_of_complex_and_meta_tensors():
    assert state_problem("exp_avg_sq", torch.tensor(-1 - 1j)) is None  # the sum of two squares each
    assert "NaN" in state_problem("exp_avg_sq", torch.tensor(complex(0, math.nan)))
    assert state_problem("exp_avg_sq", torch.empty(3, device="meta")) is None
    assert state_problem("exp_avg", torch.tensor(-1.0)) is None


def test_nonfinite_state_names_parameter_and_entry():
    optimizer, params = two_groups()
    assert nonfinite_state(optimizer) == []
    optimizer.state[params[1]]["exp_avg"][0, 0] = math.inf
    optimizer.state[params[4]]["exp_avg_sq"][-1, -1] = math.nan
    optimizer.state[params[4]]["other"] = math.nan
    optimizer.state[params[4]]["fine"] = 0.5
    assert nonfinite_state(optimizer) == [
        ("parameter 1 of group 0", "exp_avg"),
        ("parameter 1 of group 1", "exp_avg_sq"),
        ("parameter 1 of group 1", "other"),
    ]
    names = {id(params[1]): "conv.weight"}
    assert nonfinite_state(optimizer, names)[0] == ("conv.weight", "exp_avg")


def test_nonfinite_state_of_any_optimizer_with_names_of_its_own():
    model = nn.Linear(2, 3)
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    assert nonfinite_state(sgd) == []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    sgd.state[model.bias]["momentum_buffer"][1] = math.nan
    sgd.state["hook"] = math.nan
    assert nonfinite_state(sgd) == [("bias", "momentum_buffer")]


@pytest.mark.parametrize("count, more", [(1, ""), (3, ""), (4, " and 1 more")])
def test_a_refused_state_lists_the_first_entries(count, more):
    params = parameters()
    adam = torch.optim.Adam(params)
    run(adam, params, [0])
    for p in params[3:4] + params[:1] + params[4:]:
        if count:
            adam.state[p]["exp_avg"].fill_(math.nan)
            count -= 1
    with pytest.raises(
        ValueError, match=rf"the state of Adam is NaN or infinite: .*{more}\. A step"
    ) as e:
        check_state(adam, {id(params[0]): "first"})
    assert (" more. A step" in str(e.value)) == bool(more)


def test_a_capture_needs_capturable_and_lr_on_the_host(monkeypatch):
    """As torch's. On the CPU nothing captures; the step is told that something does."""
    optimizer, params = two_groups()
    before = bits(params)
    monkeypatch.setattr(fused, "_capturing", lambda buckets: True)
    with pytest.raises(RuntimeError, match="capturable of param group 0 is False"):
        optimizer.step()
    assert_same_bits(bits(params), before)
    for group in optimizer.param_groups:
        group["capturable"] = True
    optimizer.step()
    assert not torch.equal(bits(params)[0], before[0])


def test_only_a_capture_of_the_parameters_device_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    optimizer, params = two_groups()
    before = bits(params)
    optimizer.step()
    assert not torch.equal(bits(params)[0], before[0])
    for bucket in optimizer._buckets:
        bucket.device = torch.device("cuda")
    assert fused._capturing(optimizer._buckets)


def test_of_a_dtensor_this_ranks_shard_is_read(monkeypatch):
    """Alone: a collective would wait for ranks that have no reason to call it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        moment = distribute_tensor(torch.tensor([1.0, math.nan]), mesh, [Shard(0)])
        monkeypatch.setattr(DTensor, "isfinite", lambda self: pytest.fail("of the whole DTensor"))
        assert "NaN" in state_problem("exp_avg", moment)
        p = nn.Parameter(torch.ones(2))
        adam = torch.optim.Adam([p])
        adam.state[p]["exp_avg"] = moment
        assert nonfinite_state(adam) == [("parameter 0 of group 0", "exp_avg")]
    finally:
        distributed.destroy_process_group()


def explode(spoil):
    """The error of a guard whose every batch is bad after ``spoil(model, optimizer)``."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = fastguard.AdamW(model.parameters())
    guard = fastguard.GradGuard(model, patience=3)
    with pytest.raises(fastguard.GradientExplosionError) as raised:
        for step in range(9):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 3)).square().mean()
            (loss * (math.nan if step > 3 else 1.0)).backward()
            guard.step(optimizer)
            if step == 1:
                spoil(model, optimizer)
    return raised.value


def test_the_error_at_the_end_of_patience_names_what_is_poisoned():
    """A moment written by others: the next step takes it to the weights, and all after are NaN."""
    error = explode(
        lambda model, optimizer: optimizer.state[model.weight]["exp_avg"].fill_(math.inf)
    )
    assert error.poisoned[0] == "weight"
    assert "exp_avg of weight" in error.poisoned
    assert "bias" not in error.poisoned[0]
    assert "NaN or Inf is in weight, exp_avg of weight" in str(error)
    assert "load an earlier state of the model and its optimizer" in str(error)
    assert pickle.loads(pickle.dumps(error)).poisoned == error.poisoned


def test_the_error_of_bad_batches_blames_no_state():
    error = explode(lambda model, optimizer: None)
    assert error.poisoned == []
    assert "earlier state of the model" not in str(error)
