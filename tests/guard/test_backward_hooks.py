"""Measuring during backward says what measuring at the step says."""

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict, ops
from fastguard.guard import backward_hooks
from tests.tensors import assert_same_bits

from .test_grad_guard import everything, small_model, train_step


def both(**kwargs):
    for mode in ("step", "backward"):
        model = small_model()
        yield (
            model,
            fastguard.AdamW(model.parameters(), lr=0.1),
            GradGuard(model, measure=mode, **kwargs),
        )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([None, None, math.nan, math.inf]), min_size=1, max_size=6))
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 22])
def test_the_same_steps(bucket_bytes, steps):
    before = backward_hooks._BUCKET_BYTES
    backward_hooks._BUCKET_BYTES = bucket_bytes
    try:
        outcomes = []
        for model, optimizer, guard in both(max_norm=0.05):
            reports = []
            for seed, bad in enumerate(steps):
                x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
                if bad is not None:
                    x[0, 0] = bad
                report = train_step(model, optimizer, guard, x)
                reports.append(
                    (
                        report.verdict,
                        report.nonfinite_parameters,
                        report.finite_ranges,
                        report.norms(),
                    )
                )
                reports.append(pytest.approx(report.total_norm, rel=1e-14, nan_ok=True))
            outcomes.append((reports, model, optimizer))
    finally:
        backward_hooks._BUCKET_BYTES = before
    (there, *reference), (here, *ours) = outcomes
    for a, b in zip(there[::2], here[::2], strict=True):
        assert repr(a) == repr(b)  # NaN is NaN there
    for a, b in zip(reference[0].parameters(), ours[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_gradients_are_read_in_buckets_and_not_again(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(10)])
    guard = GradGuard(model, measure="backward")
    monkeypatch.setattr(backward_hooks, "_BUCKET_BYTES", 3 * 64 * 64 * 4)
    calls = []
    real = ops.grad_norm
    monkeypatch.setattr(ops, "grad_norm", lambda grads: calls.append(len(grads)) or real(grads))
    model(torch.randn(2, 64)).sum().backward()
    during = list(calls)
    guard.step(fastguard.AdamW(model.parameters()))
    assert sum(calls) == 20  # each gradient once
    assert len(during) == 3
    assert len(calls) == 4


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 22])
@pytest.mark.parametrize("change", ["in place", "replaced", "accumulated", "dropped", "nan"])
def test_gradients_that_change_after_their_hook_are_measured_again(
    change, bucket_bytes, monkeypatch
):
    monkeypatch.setattr(backward_hooks, "_BUCKET_BYTES", bucket_bytes)
    model = small_model()
    guard = GradGuard(model, measure="backward", max_norm=math.inf)
    model(torch.randn(6, 4)).square().mean().backward()
    weight = model[0].weight
    if change == "in place":
        weight.grad.mul_(100)
    elif change == "replaced":
        weight.grad = torch.full_like(weight, 7.0)
    elif change == "accumulated":
        model(torch.randn(6, 4)).square().mean().backward()
    elif change == "dropped":
        weight.grad = None
    else:
        weight.grad[0, 0] = math.nan
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    expected = ops.grad_norm(grads).total_norm.item()
    report = guard.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert report.total_norm == pytest.approx(expected, rel=1e-14, nan_ok=True)
    assert report.skipped == (change == "nan")


def test_a_batch_that_never_came_to_the_step_is_forgotten():
    model = small_model()
    guard = GradGuard(model, measure="backward")
    optimizer = fastguard.AdamW(model.parameters())
    model(torch.full((6, 4), math.nan)).sum().backward()
    optimizer.zero_grad()  # the loop did `continue`
    model.load_state_dict({k: torch.nan_to_num(v, 0.0) for k, v in model.state_dict().items()})
    report = train_step(model, optimizer, guard, torch.randn(6, 4))
    assert not report.skipped


def test_parameters_that_come_later_and_sparse_ones():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 1)})
    guard = GradGuard(model, measure="backward", max_norm=math.inf)
    model["late"] = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        x = model["table"](torch.tensor([1, 1, 4]))
        model["late"](model["head"](x)).sum().backward()
        grads = [
            g.coalesce().values() if g.is_sparse else g for g in map(_grad, model.parameters())
        ]
        expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        assert guard.step(optimizer).total_norm == pytest.approx(expected)


def _grad(parameter):
    return parameter.grad


def test_a_guard_that_nobody_uses_goes_away():
    model = small_model()
    guard = GradGuard(model, measure="backward")
    model(torch.randn(6, 4)).sum().backward()
    gone = weakref.ref(guard)
    del guard
    gc.collect()
    assert gone() is None
    model(torch.randn(6, 4)).sum().backward()  # its hooks do nothing


def test_skips_leave_no_trace():
    for model, optimizer, guard in both():
        train_step(model, optimizer, guard, torch.randn(6, 4))
        before = everything(model, optimizer)
        report = train_step(model, optimizer, guard, torch.full((6, 4), math.inf))
        assert report.verdict is Verdict.SKIP_NONFINITE
        assert_same_bits(before, everything(model, optimizer))


def test_parameters_that_come_later_are_measured_in_backward_too(monkeypatch):
    model = small_model()
    guard = GradGuard(model, measure="backward")
    model.append(nn.Linear(1, 1))
    optimizer = fastguard.AdamW(model.parameters())
    train_step(model, optimizer, guard, torch.randn(6, 4))  # finds the new ones
    monkeypatch.setattr(backward_hooks, "_BUCKET_BYTES", 1)
    calls = []
    real = ops.grad_norm
    monkeypatch.setattr(ops, "grad_norm", lambda grads: calls.append(len(grads)) or real(grads))
    optimizer.zero_grad()
    model(torch.randn(6, 4)).sum().backward()
    assert len(calls) == 8


def test_complex_gradients():
    wave = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    guard = GradGuard([wave], measure="backward", max_norm=math.inf)
    (wave * (3 - 4j)).real.sum().backward()
    assert guard.step(torch.optim.SGD([wave], lr=1.0)).total_norm == 5.0


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 22])
def test_gradients_that_never_came_to_a_step_are_not_kept(bucket_bytes, monkeypatch):
    monkeypatch.setattr(backward_hooks, "_BUCKET_BYTES", bucket_bytes)
    model = small_model()
    guard = GradGuard(model, measure="backward")
    seen = []
    for _ in range(30):
        model.zero_grad()
        model(torch.randn(6, 4)).sum().backward()
        seen += [weakref.ref(p.grad) for p in model.parameters()]
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 6
    assert len(guard._decider.backward._norms) < 60


def test_another_hook_that_takes_the_gradient():
    weight = nn.Parameter(torch.ones(2))
    taken = []

    def take(parameter):
        taken.append(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(take)
    guard = GradGuard([weight], measure="backward")
    weight.sum().backward()
    assert guard.step(torch.optim.SGD([weight], lr=1.0)).total_norm == 0.0
    assert len(taken) == 1
