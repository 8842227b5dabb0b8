"""What the guard refuses or does with parameters that are not as it expects; nothing half-done."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard
from fastguard.thresholds import AdaGC, ZClip
from tests.tensors import parameters_with

from .test_grad_guard import small_model, train_step


def refused(guard, optimizer, parameters, message):
    """``step`` raises and changes nothing; the next good step goes as if nothing had been."""
    before = [p.detach().clone() for p in parameters]
    state = guard.state_dict()
    with pytest.raises(ValueError, match=message):
        guard.step(optimizer)
    for p, b in zip(parameters, before, strict=True):
        assert torch.equal(p.detach(), b)
    assert guard.state_dict() == state
    assert not optimizer.state


def test_parameters_without_gradients():
    parameters = [nn.Parameter(torch.ones(3))]
    for optimizer in (torch.optim.SGD(parameters, lr=1.0), fastguard.AdamW(parameters)):
        report = GradGuard(parameters).step(optimizer)
        assert report.total_norm == 0.0
        assert not report.skipped
    assert parameters[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("make", [torch.optim.SGD, fastguard.AdamW])
def test_an_optimizer_of_other_parameters(make):
    mine, other = parameters_with([torch.ones(2), torch.ones(4, 1)])
    guard = GradGuard([mine])
    refused(guard, make([mine, other]), [mine], r"a parameter of shape \(4, 1\).*does not watch")
    refused(guard, make([other]), [other], "watches none of the optimizer's parameters")


def test_a_stranger_that_gets_its_gradient_later():
    mine, other = parameters_with([torch.ones(2), torch.ones(4, 1)])
    other.grad = None
    guard = GradGuard([mine])
    optimizer = torch.optim.SGD([mine, other], lr=0.1)
    guard.step(optimizer)
    other.grad = torch.ones(4, 1)
    refused(guard, optimizer, [mine, other], "does not watch")


def test_dtypes_are_named():
    fine = nn.Parameter(torch.ones(2))
    fine.grad = torch.ones(2)
    whole = torch.ones(2, dtype=torch.int64)
    whole.grad = torch.ones(2, dtype=torch.int64)
    guard = GradGuard([("fine", fine), ("whole", whole)])
    optimizer = torch.optim.SGD([fine], lr=1.0)
    refused(guard, optimizer, [fine], "the gradient of whole has dtype torch.int64; float32")


def test_complex_gradients_are_measured():
    wave = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    for optimizer in (fastguard.AdamW([wave]), torch.optim.AdamW([wave])):
        wave.grad = torch.tensor([3 + 4j])
        assert GradGuard([wave]).step(optimizer).total_norm == 5.0


def test_several_devices_are_named():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    guard = GradGuard(parameters)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with pytest.raises(ValueError, match=r"several devices, \['cpu', 'meta'\]"):
        guard.step(optimizer)


def test_an_optimizer_that_needs_a_closure_is_refused():
    parameters = parameters_with([torch.ones(2)])
    optimizer = torch.optim.LBFGS(parameters)
    before = parameters[0].detach().clone()
    with pytest.raises(ValueError, match=r"LBFGS.step needs a closure"):
        GradGuard(parameters, max_norm=0.1).step(optimizer)
    assert parameters[0].grad.tolist() == [1.0, 1.0]
    assert torch.equal(parameters[0].detach(), before)


def test_a_module_whose_parameters_are_all_replaced_one_by_one():
    model = nn.Linear(4, 1)
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    optimizer.zero_grad()
    model.weight, model.bias = (nn.Parameter(p.detach().clone()) for p in model.parameters())
    model(torch.ones(6, 4)).sum().backward()
    assert guard.step(optimizer).total_norm == 0.0  # nothing is done, and it is noticed next time
    with pytest.raises(ValueError, match="watches none of the optimizer's parameters"):
        guard.step(optimizer)


def test_parameters_replaced_after_the_optimizer_was_built():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer.zero_grad()
    model(torch.ones(6, 4)).sum().backward()
    refused(guard, optimizer, [*model.parameters()], "watches none of the optimizer's parameters")
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), guard, torch.ones(6, 4))


def test_a_layer_added_with_its_param_group():
    model = small_model()
    guard = GradGuard(model, max_norm=math.inf)
    optimizer = fastguard.AdamW(model.parameters())
    train_step(model, optimizer, guard, torch.ones(6, 4))
    model.append(nn.Linear(1, 1))
    optimizer.add_param_group({"params": model[4].parameters()})
    report = train_step(model, optimizer, guard, torch.ones(6, 4))
    assert "4.weight" in report.norms()
    x = torch.ones(6, 4)
    optimizer.zero_grad()
    model(x).sum().backward()
    model[4].weight.grad.fill_(math.nan)
    assert guard.step(optimizer).nonfinite == ("4.weight",)


def test_a_module_that_moved_to_another_dtype():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    model.double()
    assert not train_step(model, optimizer, guard, torch.ones(6, 4).double()).skipped
    assert train_step(model, optimizer, guard, torch.full((6, 4), math.nan).double()).skipped
    assert model[1].running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": -1}, ValueError, "max_norm must be a number >= 0"),
        ({"max_norm": math.nan}, ValueError, "max_norm must be a number >= 0.*nan"),
        ({"skip_norm": math.nan}, ValueError, "skip_norm must be a number >= 0"),
        ({"patience": 0}, ValueError, "patience must be at least 1 step, got 0"),
        ({"max_lag": 0}, ValueError, "max_lag must be at least 1 step, got 0"),
        ({"on_patience": "pray"}, ValueError, "on_patience must be one of raise, rollback"),
        ({"threshold": 2.0}, TypeError, "threshold must be one of fastguard.thresholds, got 2.0"),
        ({"threshold": ZClip}, TypeError, "threshold must be one of fastguard.thresholds"),
    ],
)
def test_refuses_arguments_that_can_not_work(arguments, error, message):
    with pytest.raises(error, match=message):
        GradGuard(small_model(), **arguments)


def test_refuses_what_is_no_list_of_parameters():
    used_up = small_model().parameters()
    list(used_up)
    for empty in ([], used_up, nn.ReLU()):
        with pytest.raises(ValueError, match="GradGuard got no parameters"):
            GradGuard(empty)
    with pytest.raises(TypeError, match="parameter 1 is a str"):
        GradGuard([nn.Parameter(torch.ones(1)), "weight"])
    with pytest.raises(TypeError, match="weight is a dict"):
        GradGuard([("weight", {})])


def test_a_parameter_listed_twice_counts_once():
    """torch counts and scales it twice."""
    p = parameters_with([torch.tensor([3.0, 4.0])])[0]
    report = GradGuard([("a", p), ("b", p)]).step(torch.optim.SGD([p], lr=0.0))
    assert report.total_norm == 5.0
    assert list(report.norms()) == ["a"]


def test_a_loss_that_is_no_number():
    parameters = parameters_with([torch.ones(2)])
    guard = GradGuard(parameters)
    with pytest.raises(ValueError, match=r"loss must be one real.*float32 tensor of shape \(3,\)"):
        guard.step(torch.optim.SGD(parameters, lr=1.0), loss=torch.ones(3))
    with pytest.raises(ValueError, match=r"loss must be one real number, got \[1.0, 2.0\]"):
        guard.step(torch.optim.SGD(parameters, lr=1.0), loss=[1.0, 2.0])
    assert guard.state_dict()["steps"] == 0


def test_a_state_that_is_none():
    guard = GradGuard(small_model())
    before = guard.state_dict()
    for wrong in (
        {},
        {"steps": 1},
        {**before, "statistics": None},
        *(
            {**before, which: before[which] | wrong}
            for which in ("statistics", "micro_statistics")
            for wrong in (
                {"seen": -1},
                {"accepted": math.inf},
                {"mean": math.inf},
                {"variance": -1.0},
                {"seen": 100},
                {"accepted": 1},
                {"seen_norms": ["x"], "seen": 1},
                {"accepted_norms": [math.nan], "accepted": 1},
            )
        ),
        {**before, "budget": {}},
        {**before, "ema_norms": [1.0]},
        {**before, "steps": -4},
        {**before, "threshold": "none"},
    ):
        with pytest.raises(ValueError, match="this is no state of a GradGuard"):
            guard.load_state_dict(wrong)
    assert guard.state_dict() == before


# --- what a guard cannot see ----------------------------------------------------------------------


def test_an_optimizer_in_place_of_the_model():
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"not a SGD: write guard = GradGuard\(model\)"):
        GradGuard(optimizer)


@pytest.mark.parametrize("nested", [False, True])
def test_a_scripted_module_is_refused_and_its_tensors_are_taken(nested):
    model = torch.jit.script(small_model())
    with pytest.raises(TypeError, match=r"torch.jit.ScriptModule.* buffers=model.named_buf"):
        GradGuard(nn.Sequential(model, nn.ReLU()) if nested else model)
    guard = GradGuard(model.named_parameters(), buffers=model.named_buffers())
    optimizer = fastguard.AdamW(model.parameters())
    assert not train_step(model, optimizer, guard, torch.ones(6, 4)).skipped
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert train_step(model, optimizer, guard, torch.full((6, 4), math.nan)).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("later", [False, True])
def test_optimizers_that_step_in_the_backward_pass_are_refused(later):
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Sequential(nn.Linear(4, 2))
    guard = GradGuard(model) if later else None
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"steps 0.weight in the backward pass"):
        if later:
            guard.step(torch.optim.SGD(model.parameters(), lr=0.1))
        else:
            GradGuard(model)


def test_deepspeed_is_refused():
    """By the package of its classes; it is not installed here."""
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = small_model()
    with pytest.raises(ValueError, match=r"DeepSpeed steps and shards by itself. Use fully_shard"):
        GradGuard(engine)
    optimizer = type("FP16_Optimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.fp16"})
    model = small_model()
    with pytest.raises(ValueError, match=r"FP16_Optimizer steps by itself. Use fully_shard"):
        GradGuard(model).step(optimizer(model.parameters(), lr=0.1))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_id = 3
    with pytest.raises(ValueError, match="DeepSpeed"):
        GradGuard([parameter])


# --- names ----------------------------------------------------------------------------------------


def learnt(guard, optimizer, model):
    for step in range(3):
        train_step(model, optimizer, guard, torch.full((6, 4), 1.0 + step))
    return guard.state_dict()


PREFIXES = ["module.", "_orig_mod.", "_forward_module.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_state_of_prefixed_names_is_found_by_the_names_of_now(prefix):
    """As older versions saved it; and with a part that the user calls ``module``."""
    model = nn.Sequential()
    model.add_module("module", nn.Linear(4, 1))
    guard, optimizer = GradGuard(model, threshold=AdaGC()), fastguard.AdamW(model.parameters())
    state = learnt(guard, optimizer, model)
    assert list(state["ema_norms"]) == ["module.weight", "module.bias"]
    old = {prefix + name: norm for name, norm in state["ema_norms"].items()}
    resumed = GradGuard(nn.Sequential(model), threshold=AdaGC())
    resumed.load_state_dict(state | {"ema_norms": {"0." + prefix + "weight": 2.0, "x": 1.0}})
    assert resumed.state_dict()["ema_norms"] == {"0.module.weight": 2.0, "x": 1.0}
    resumed = GradGuard(model, threshold=AdaGC())
    resumed.load_state_dict(state | {"ema_norms": old})
    assert resumed.state_dict() == state


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_state_fits_however_the_model_is_wrapped(wrap):
    model = small_model()
    wrapped = wrap(model)
    guard = GradGuard(wrapped, threshold=AdaGC())
    state = learnt(guard, fastguard.AdamW(wrapped.parameters()), model)
    assert list(state["ema_norms"]) == [name for name, _ in model.named_parameters()]
    plain = GradGuard(model, threshold=AdaGC())
    plain.load_state_dict(state)
    assert plain.state_dict() == state


def test_a_state_of_adagc_whose_norms_were_lost_is_refused():
    """torch.distributed.checkpoint loads only what the fresh guard has names for."""
    model = small_model()
    guard, optimizer = GradGuard(model, threshold=AdaGC()), fastguard.AdamW(model.parameters())
    state = learnt(guard, optimizer, model)
    with pytest.raises(ValueError, match=r"has no norms by parameter.*json.dumps"):
        GradGuard(model, threshold=AdaGC()).load_state_dict(state | {"ema_norms": {}})
    GradGuard(model).load_state_dict(state | {"ema_norms": {}, "threshold": "fixed"})
