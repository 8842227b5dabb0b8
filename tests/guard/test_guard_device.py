"""The host does not wait on the way of a step, and learns what happened with bounded lag."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, Verdict
from fastguard.guard import report as step_report
from fastguard.ops import _library
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

from .test_grad_guard import set_gradient_norms, small_model, train_step

aten = torch.ops.aten
HOST_READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.item}


class Ops(TorchDispatchMode):
    """The operators that ran, in order; reads of a tensor's values by the host among them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def optimizers(parameters):
    return {
        "fastguard": fastguard.AdamW(parameters, lr=0.1),
        "fused": torch.optim.AdamW(parameters, lr=0.1, fused=True),
        "foreign": torch.optim.SGD(parameters, lr=0.1),
    }


def slow(monkeypatch):
    """As on a GPU whose queue is long: no report arrives unless one waits for it."""
    monkeypatch.setattr(step_report.Transfer, "ready", property(lambda self: False))


@pytest.mark.skipif(_library.cpu_problem is not None, reason="the references are many operators")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_so_few_operators(scaled):
    """On a GPU each is a launch, but for what only looks; a scaler's are to undo its scale."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)), nn.BatchNorm1d(4))
    optimizer = fastguard.AdamW(model.parameters(), lr=0.1)
    guard = GradGuard(model, 1.0)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    looks = {"split_with_sizes", "view", "_record_function_enter_new", "_record_function_exit"}
    for _ in range(2):
        loss = model(torch.randn(6, 4)).square().mean()
        (scaler.scale(loss) if scaled else loss).backward()
        with Ops() as ran:
            guard.step(optimizer, scaler=scaler)
    names = [str(op).split(".")[-1] for op in ran.names]
    ours = ["cat", "grad_norm_decide_", "adamw_", "settle_"]
    assert [name for name in names if name in ours] == ours
    others = [name for name in names if name not in looks.union(ours)]
    assert len(others) <= (8 if scaled else 0), others


@pytest.mark.parametrize(
    "threshold", [Fixed(), ZClip(), RunningMedian(), AutoClip(), AdaGC()], ids=lambda t: t.kind.name
)
@pytest.mark.parametrize("name", ["fastguard", "fused", "foreign"])
def test_host_reads_of_a_step(name, threshold, monkeypatch):
    """None, but the one that an optimizer needs which knows neither the guard nor found_inf."""
    slow(monkeypatch)
    model = small_model()
    optimizer = optimizers(list(model.parameters()))[name]
    guard = GradGuard(model, 0.01, 5.0, threshold=threshold)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = model(torch.full((6, 4), math.nan if bad else 1.0)).square().mean()
        scaler.scale(loss).backward()
        with Ops() as ran:
            guard.step(optimizer, scaler=scaler, loss=loss)
        reads = sum(op in HOST_READS for op in ran.names)
        if name == "foreign" or (name == "fused" and threshold.kind.name == "ADAGC"):
            assert reads == 1
        elif name == "fastguard":
            assert reads == 0
        else:  # what torch's fused AdamW reads by itself, of its step counters on the CPU
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
            with Ops() as alone:
                optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            assert reads == sum(op in HOST_READS for op in alone.names)


@pytest.mark.parametrize("kind", ["cpu", "cpu without kernels", "cuda"])
@pytest.mark.parametrize("threshold", [Fixed(), ZClip(), AutoClip(), AdaGC()])
def test_nothing_reads_values_that_are_not_there(threshold, kind, monkeypatch):
    """Fake tensors have no values: whatever looked at one would raise. Nor do the references.

    Those of CUDA need no GPU; what they show is which device each tensor is on.
    """
    slow(monkeypatch)
    if kind != "cpu":
        monkeypatch.setattr(_library, "has_kernel", lambda tensor: False)
    if kind == "cuda":  # pinned memory and events do need one
        monkeypatch.setattr(step_report.Transfer, "__init__", lambda self, *tensors: None)
    with FakeTensorMode(), torch.device(kind.split()[0]):
        model = small_model()
        guard = GradGuard(model, 1.0, 10.0, threshold=threshold, max_lag=100)
        optimizer = fastguard.AdamW(model.parameters())
        for accumulated in (True, False, True):
            for _ in range(2 if accumulated else 1):
                for p in model.parameters():  # backward asks for CUDA streams
                    p.grad = torch.randn_like(p)
                loss = torch.randn(())
                if accumulated:
                    guard.accumulate(loss=loss)
            guard.step(optimizer, loss=loss)
            optimizer.zero_grad()


def test_reports_are_read_at_most_max_lag_steps_late(monkeypatch):
    slow(monkeypatch)
    parameters = [nn.Parameter(torch.zeros(10))]
    guard = GradGuard(parameters, max_lag=3)
    optimizer = fastguard.AdamW(parameters)
    looked = []
    result = step_report.PendingReport.result
    monkeypatch.setattr(
        step_report.PendingReport, "result", lambda self: looked.append(self.step) or result(self)
    )
    for step in range(6):
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)
        assert looked == list(range(step - 2))
    assert [r.step for r in guard.poll()] == [0, 1, 2]
    assert [r.step for r in guard.poll(wait=True)] == [3, 4, 5]
    assert guard.poll(wait=True) == []


def test_patience_works_with_the_lag(monkeypatch):
    slow(monkeypatch)
    parameters = [nn.Parameter(torch.ones(10))]
    before = parameters[0].detach().clone()
    guard = GradGuard(parameters, patience=4, max_lag=3)
    optimizer = fastguard.AdamW(parameters, lr=0.1)
    with pytest.raises(GradientExplosionError) as caught:
        for step in range(20):
            set_gradient_norms(parameters, math.nan)
            guard.step(optimizer, batch_id=step)
    assert step == 4 + 3 - 1
    assert [r.batch for r in caught.value.reports] == [0, 1, 2, 3]
    assert torch.equal(parameters[0].detach(), before)


def test_a_checkpoint_flushes_and_the_error_is_not_lost(monkeypatch):
    """pocket-tts rotated its good checkpoints away before it noticed that the weights were NaN."""
    slow(monkeypatch)
    parameters = [nn.Parameter(torch.ones(10))]
    guard = GradGuard(parameters, patience=3, max_lag=100)
    optimizer = fastguard.AdamW(parameters, lr=0.1)
    for _ in range(3):
        set_gradient_norms(parameters, math.inf)
        guard.step(optimizer)
    assert guard.state_dict()["budget"]["in_a_row"] == 3
    with pytest.raises(GradientExplosionError, match="3 steps in a row"):
        guard.poll()


def guarded_slowly(norms, **options):
    """The guard after steps with these norms, its reports on their way for three steps."""
    parameters = [nn.Parameter(torch.ones(10))]
    guard = GradGuard(parameters, max_lag=3, **options)
    optimizer = fastguard.AdamW(parameters, lr=0.1)
    weights = []
    for norm in norms:
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
        weights.append(parameters[0].detach().clone())
    return guard, optimizer, weights


def test_rollback_works_with_the_lag(monkeypatch, caplog):
    """Back to before the explosion, though copies were taken while it was on its way."""
    slow(monkeypatch)
    nan = math.nan
    guard, _, weights = guarded_slowly(
        [1.0, 1.0, nan, nan, nan, nan, nan],
        patience=2,
        on_patience="rollback",
        rollback=Rollback(every=1, keep=9),
    )
    assert guard.lr_factor == 0.5
    assert torch.equal(weights[-1], weights[1])
    assert "Rolled back to the state after step 2" in caplog.text
    # What was on its way was said, too, and counts for nothing after it.
    assert [r.step for r in guard.poll()] == [0, 1, 2, 3, 4, 5, 6]
    assert guard.state_dict()["budget"]["steps"] == []


def test_two_explosions_learnt_at_once_are_two(monkeypatch):
    slow(monkeypatch)
    nan = math.nan
    guard, *_ = guarded_slowly([1.0, nan, nan, 1.0], patience=2)
    with pytest.raises(GradientExplosionError) as caught:
        guard.poll(wait=True)
    assert [r.step for r in caught.value.reports] == [1, 2]
    assert [r.step for r in guard.poll(wait=True)] == [0, 1, 2, 3]


def test_reports_are_learnt_in_order(monkeypatch):
    """The newest is there, the oldest is not: nothing is looked at."""
    parameters = [nn.Parameter(torch.ones(10))]
    guard = GradGuard(parameters, max_lag=100)
    optimizer = fastguard.AdamW(parameters)
    late = []
    monkeypatch.setattr(
        step_report.Transfer, "ready", property(lambda self: self not in late and bool(late))
    )
    for _ in range(3):
        set_gradient_norms(parameters, 1.0)
        report = guard.step(optimizer)
        late.append(report._record) if not late else None
    assert guard.poll() == []
    late[:] = [None]
    assert [r.step for r in guard.poll()] == [0, 1, 2]


def test_a_loaded_state_forgets_what_was_on_its_way(monkeypatch):
    slow(monkeypatch)
    fresh = GradGuard([nn.Parameter(torch.ones(10))]).state_dict()
    guard, *_ = guarded_slowly([math.nan] * 3, patience=3)
    guard.load_state_dict(fresh)
    assert guard.poll(wait=True) == []


def test_a_report_is_a_step_report_that_waits():
    model = small_model()
    guard = GradGuard(model)
    report = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), guard, torch.ones(6, 4))
    assert report.ready
    assert report.verdict is Verdict.APPLY or report.verdict is Verdict.CLIP
    assert report.result().total_norm == report.total_norm
    assert set(report.norms()) == {name for name, _ in model.named_parameters()}
    assert math.hypot(*report.norms().values()) == pytest.approx(report.total_norm)
    assert "StepReport" in repr(report)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = report.no_such_thing
