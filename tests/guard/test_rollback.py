"""Going back: exactly, further back each time, and with a lower learning rate."""

import math
import random

import numpy
import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, Verdict
from fastguard.guard import report as step_report
from fastguard.thresholds import AdaGC
from tests.tensors import assert_same_bits, bits

from .test_grad_guard import everything, set_gradient_norms, small_model, train_step


def guarded(model, **rollback):
    return GradGuard(model, patience=2, on_patience="rollback", rollback=Rollback(**rollback))


def rate_of(optimizer, guard):
    """With which the next step is taken."""
    return optimizer.param_groups[0]["lr"] * guard.lr_factor


def explode(model, optimizer, guard, times=2):
    for _ in range(times):
        train_step(model, optimizer, guard, torch.full((6, 4), math.nan))


@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.AdamW])
def test_the_state_is_restored_bit_for_bit(make):
    """DeepSpeed undoes the arithmetic of Adam instead: a second moment of 2.6e-8 came back as 0."""
    model = small_model()
    optimizer = make(model.parameters(), lr=0.1)
    guard = guarded(model, every=3, keep=1)
    states = {}
    for step in range(1, 6):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        train_step(model, optimizer, guard, x * 10**step)
        states[step] = everything(model, optimizer), guard.state_dict(), torch.get_rng_state()
    explode(model, optimizer, guard)
    assert_same_bits(everything(model, optimizer), states[4][0])
    assert rate_of(optimizer, guard) == 0.05
    assert guard.state_dict()["statistics"] == states[4][1]["statistics"]
    assert guard.state_dict()["steps"] == 7  # reports keep counting
    assert torch.equal(torch.get_rng_state(), states[4][2])
    assert not train_step(model, optimizer, guard, torch.ones(6, 4)).skipped


def test_the_generators_go_back():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guarded(model)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    draws = [torch.rand(3).tolist(), random.random(), numpy.random.rand()]
    explode(model, optimizer, guard)
    assert [torch.rand(3).tolist(), random.random(), numpy.random.rand()] == draws


def test_each_copy_serves_once_and_then_the_run_ends():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    guard = guarded(model, every=1, keep=2)
    weights = []
    for _ in range(4):
        train_step(model, optimizer, guard, torch.randn(6, 4))
        weights.append(model[0].weight.detach().clone())
    explode(model, optimizer, guard)
    assert torch.equal(model[0].weight.detach(), weights[3])
    explode(model, optimizer, guard)
    assert torch.equal(model[0].weight.detach(), weights[2])
    assert rate_of(optimizer, guard) == pytest.approx(0.2)
    with pytest.raises(GradientExplosionError, match="2 steps in a row"):
        explode(model, optimizer, guard)


def test_without_a_copy_the_run_ends():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GradientExplosionError):
        explode(model, optimizer, guarded(model))


def test_batches_are_skipped_afterwards_by_the_loop_or_by_step(caplog):
    for asks in (True, False):
        parameters = [nn.Parameter(torch.zeros(4))]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        guard = guarded(parameters, skip_batches=3)
        verdicts = []
        for norm in (1.0, math.nan, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0):
            if asks and guard.skip_batch():
                verdicts.append(Verdict.SKIP_ROLLBACK)
                continue
            set_gradient_norms(parameters, norm)
            before = bits(p.detach() for p in parameters)
            verdicts.append(guard.step(optimizer).verdict)
            if verdicts[-1] is Verdict.SKIP_ROLLBACK:
                assert_same_bits(before, bits(p.detach() for p in parameters))
        assert [v.skipped for v in verdicts] == [False, *[True] * 5, False, False]
        assert verdicts[3:6] == [Verdict.SKIP_ROLLBACK] * 3
    assert sum("after the rollback" in r.getMessage() for r in caplog.records) == 3
    assert "Rolled back to the state after step 1; learning rate 0.05" in caplog.text


def test_a_scheduler_goes_back_and_goes_on_lower():
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    guard = guarded(parameters, every=2, lr_factor=0.1, scheduler=scheduler)
    for norm in (1.0, 1.0, 1.0, 1.0, math.nan, math.nan):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        scheduler.step()
    # the copy is of after the third step, before its scheduler.step; one came after the rollback
    assert scheduler.last_epoch == 3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 4)
    assert rate_of(optimizer, guard) == pytest.approx(0.1 / 4)


def test_a_grad_scaler_goes_back():
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = guarded(model)

    def step(x):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        guard.step(optimizer, scaler=scaler)

    step(torch.ones(6, 4))
    step(torch.full((6, 4), math.nan))
    assert scaler.get_scale() == 512.0
    step(torch.full((6, 4), math.nan))
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"keep": 0}, "keep must be >= 1, got 0"),
        ({"skip_batches": -1}, "skip_batches must be >= 0, got -1"),
        ({"lr_factor": 0.0}, r"lr_factor must be in \(0, 1\], got 0.0"),
        ({"lr_factor": math.nan}, r"lr_factor must be in \(0, 1\], got nan"),
        ({"growth_interval": 0.5}, "growth_interval must be >= 1, got 0.5"),
        ({"growth_interval": math.nan}, "growth_interval must be >= 1, got nan"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rollback(**arguments)
    with pytest.raises(ValueError, match='on_patience is "raise"'):
        GradGuard(small_model(), rollback=Rollback())


def test_learnt_statistics_and_skipped_batches_go_back_and_into_the_state():
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    make = lambda: GradGuard(  # noqa: E731
        parameters,
        patience=2,
        on_patience="rollback",
        rollback=Rollback(every=2, skip_batches=2),
        threshold=AdaGC(warmup=1),
    )
    guard = make()
    states = []
    for norm in (1.0, 2.0, 3.0, 4.0, math.nan, math.nan):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        states.append(guard.state_dict())
    assert states[-1]["ema_norms"] == states[2]["ema_norms"] != states[3]["ema_norms"]
    resumed = make()
    resumed.load_state_dict(states[-1])
    assert [resumed.skip_batch() for _ in range(3)] == [True, True, False]


def test_a_state_that_is_loaded_clears_the_copies_of_the_run_before():
    """The same guard: it would go back to weights of another run."""
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = guarded(parameters, every=1)
    for _ in range(3):
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)
    guard.load_state_dict(guard.state_dict())
    with pytest.raises(GradientExplosionError):
        for _ in range(2):
            set_gradient_norms(parameters, math.nan)
            guard.step(optimizer)


def test_a_window_that_was_begun_is_dropped_on_going_back(monkeypatch):
    """Late, as on a device: its gradients are of weights that are gone."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guarded(model, every=1)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    monkeypatch.setattr(step_report.Transfer, "ready", property(lambda self: False))
    explode(model, optimizer, guard)
    optimizer.zero_grad()
    model(torch.ones(6, 4)).square().mean().backward()
    guard.accumulate()
    assert guard.lr_factor == 1.0  # the host does not know yet
    guard.poll(wait=True)
    assert guard.lr_factor == 0.5
    optimizer.zero_grad()
    model(torch.ones(6, 4)).square().mean().backward()
    guard.accumulate()
    assert guard.step(optimizer).micro_batches == 1


def test_a_batch_that_is_passed_over_still_tells_the_scaler():
    """Or an Inf in it would come again and again."""
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = guarded(model, skip_batches=2)
    scales = []
    for value in (1.0, math.nan, math.nan, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((6, 4), value)).square().mean()).backward()
        report = guard.step(optimizer, scaler=scaler)
        scales.append(scaler.get_scale())
    assert report.verdict is Verdict.SKIP_ROLLBACK
    scaled = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert report.total_norm == pytest.approx(scaled.double().norm().item() / 512.0)
    assert scales == [1024.0, 512.0, 1024.0, 512.0, 512.0]


class Keeps(torch.optim.Optimizer):
    """With state that torch's load_state_dict would cast to the parameter's dtype."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("master", p.detach().float().clone()).sub_(p.grad.float() * 0.001)
            state["calls"] = state.get("calls", torch.zeros((), dtype=torch.int64)) + 1
            p.copy_(state["master"])


def test_optimizer_state_of_other_dtypes_is_restored_exactly():
    parameters = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer = Keeps(parameters)
    guard = guarded(parameters)
    for norm in (1.0, math.nan, math.nan):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
    state = optimizer.state[parameters[0]]
    torch.testing.assert_close(state["master"], torch.full((4,), 1 - 0.5 * 0.001))
    assert state["calls"].dtype == torch.int64 and state["calls"] == 1


def test_an_optimizer_that_has_grown_ends_the_run_whole():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guarded(model)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(GradientExplosionError):
        explode(model, optimizer, guard)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_state_is_not_rolled_back_to_another_run(assign):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guarded(model)
    train_step(model, optimizer, guard, torch.ones(6, 4))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=assign)
    with pytest.raises(GradientExplosionError):
        explode(model, torch.optim.SGD(model.parameters(), lr=0.1), guard)


def test_parameters_that_only_the_optimizer_holds_go_back_too():
    mine, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([mine, other], lr=0.1)
    guard = guarded([mine])
    for norm in (1.0, math.nan, math.nan):
        set_gradient_norms([mine], norm)
        guard.step(optimizer)
        with torch.no_grad():
            other.add_(1.0)
    assert other.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("every", [1, 5])
def test_batches_that_are_passed_over_make_no_copies(every):
    """Or it would go back to the same state for ever, at ever lower rates."""
    parameters = [nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = guarded(parameters, every=every, keep=3, skip_batches=10)
    for _ in range(20):
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)
    with pytest.raises(GradientExplosionError):
        for _ in range(200):
            set_gradient_norms(parameters, math.nan)
            guard.step(optimizer)
    assert rate_of(optimizer, guard) == pytest.approx(0.1 / 8)


def test_a_copy_is_of_no_use_to_another_optimizer():
    model = small_model()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = guarded(model)
    train_step(model, first, guard, torch.ones(6, 4))
    with pytest.raises(GradientExplosionError):
        explode(model, torch.optim.SGD(model.parameters(), lr=0.5), guard)
    assert first.param_groups[0]["lr"] == 0.1


def test_a_part_that_is_loaded_at_each_step_leaves_the_copies():
    """As a target network is."""
    model = small_model()
    model.add_module("target", nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[:4].parameters(), lr=0.1)
    guard = guarded(model)
    online = nn.Linear(1, 1)
    for x in (torch.ones(6, 4), torch.full((6, 4), math.nan), torch.full((6, 4), math.nan)):
        model.target.load_state_dict(online.state_dict())
        train_step(model[:4], optimizer, guard, x)
    assert guard.lr_factor == 0.5
