"""200 steps under fire: the survivors' weights are those of a run that was never shot at."""

import math
import random

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard
from fastguard.thresholds import AdaGC, Fixed, RunningMedian, ZClip
from tests.tensors import assert_same_bits

from .test_grad_guard import everything

STEPS = 200
#: Of these a batch must not be let through. 1e30 is finite: an outlier, once 16 norms were seen.
BAD = (math.nan, math.inf, -math.inf, 1e30)
#: This one is small, not bad: it belongs to the batch, in both runs.
DENORMAL = 1e-40


def is_bad(value):
    return value is not None and value != DENORMAL


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3)
    ).to(dtype)


def fault_plan():
    """For each step its micro-batches: which parameter is hit, where, and by what (or None)."""
    rng = random.Random(1)
    plan = []
    for step in range(STEPS):
        window = []
        for _ in range(rng.choice([1, 1, 2, 3, 4])):
            value = None
            if rng.random() < 0.25:
                value = rng.choice([*(BAD if step > 30 else BAD[:3]), DENORMAL])
            window.append((rng.randrange(6), rng.random(), value))
        plan.append(window)
    return plan


def run(optimizer_of, dtype, plan, under_fire, **kwargs):
    model = net(dtype)
    optimizer = optimizer_of(model.parameters())
    guard = GradGuard(model, max_norm=0.5, skip_norm=50.0, **kwargs)
    reports = []
    for step, window in enumerate(plan):
        optimizer.zero_grad()
        taken = 0
        for i, (place, where, value) in enumerate(window):
            if is_bad(value) and not under_fire:
                continue
            torch.manual_seed(1000 * step + i)  # dropout and data are the batch's own
            x, y = torch.randn(8, 6, dtype=dtype), torch.randint(3, (8,))
            nn.functional.cross_entropy(model(x).float(), y).backward()
            if value is not None:
                grad = list(model.parameters())[place].grad.view(-1)
                grad[int(where * len(grad))] = value
            taken += 1
            if len(window) > 1:
                guard.accumulate(batch_id=f"{step}.{i}")
        if taken:
            reports.append(guard.step(optimizer, batch_id=step).result())
    return everything(model, optimizer), reports, guard.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer_of", "options"),
    [
        (lambda p: fastguard.AdamW(p, lr=0.01), {"threshold": Fixed()}),
        (lambda p: fastguard.AdamW(p, lr=0.01, amsgrad=True), {"threshold": ZClip()}),
        (lambda p: fastguard.AdamW(p, lr=0.01), {"threshold": AdaGC(warmup=20)}),
        (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), {"threshold": RunningMedian()}),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), {}),
    ],
    ids=["AdamW", "amsgrad-zclip", "adagc", "torch-fused", "sgd"],
)
def test_bad_batches_and_micro_batches_leave_no_trace(optimizer_of, options, dtype):
    plan = fault_plan()
    shot, reports, state = run(optimizer_of, dtype, plan, True, **options)
    spared, spared_reports, spared_state = run(optimizer_of, dtype, plan, False, **options)
    bad = [any(is_bad(value) for _, _, value in window) for window in plan]
    noticed = [r.skipped or bool(r.skipped_micro_batches) for r in reports]
    assert noticed == bad
    assert sum(noticed) > 40
    assert not any(r.skipped or r.skipped_micro_batches for r in spared_reports)
    assert_same_bits(shot, spared)
    assert state["ema_norms"] == spared_state["ema_norms"]
    for name in ("accepted", "mean", "variance", "accepted_norms"):
        assert state["statistics"][name] == spared_state["statistics"][name]
