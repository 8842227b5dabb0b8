"""An Inf under a GradScaler is the search for its scale first, and an explosion only after that."""

import json
import logging
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, StepReport, Verdict
from fastguard.guard.grad_scaler import LossScale, Searches, is_search
from fastguard.guard.report import PendingReport
from fastguard.ops import GradNorm

from .test_guard_device import slow
from .test_outliers import old_state

LARGEST_FP16 = torch.finfo(torch.float16).max


class ThroughFP16(torch.autograd.Function):
    """An activation whose gradient is computed in fp16, as under autocast."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().float()


class Loop:
    """A training whose unscaled gradients are ``size``: they overflow at scales of 65520 / size."""

    def __init__(self, scale, size=1.0, patience=25, attached=False, unscale=False, **options):
        self.weight = nn.Parameter(torch.zeros(4))
        self.optimizer = fastguard.AdamW([self.weight], lr=0.1)
        self.guard = GradGuard([("weight", self.weight)], patience=patience, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.size, self.attached, self.unscale = size, attached, unscale
        if attached:
            self.guard.attach(self.optimizer)

    def backward(self, factor=1.0):
        loss = ThroughFP16.apply(self.weight).sum() * self.size * factor
        self.scaler.scale(loss).backward()

    def step(self, loss=None, factor=1.0, batch_id=None):
        self.optimizer.zero_grad()
        self.backward(factor)
        if self.unscale:
            self.scaler.unscale_(self.optimizer)
        if not self.attached:
            return self.guard.step(self.optimizer, scaler=self.scaler, loss=loss, batch_id=batch_id)
        self.guard.describe(loss=loss, batch_id=batch_id)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.guard.last_report


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "fastguard.guard.report_files")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("loss", [None, 12.82])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_scaler_finds_its_scale_at_no_cost_to_the_patience(attached, loss, size, warnings):
    loop = Loop(2.0**40, size, attached=attached)
    for number in range(60):
        scale = loop.scaler.get_scale()
        report = loop.step(loss, batch_id=f"b{number}")
        assert report.loss_scale == scale
        assert report.scale_search == report.skipped
        if not report.skipped:
            break
        assert loop.scaler.get_scale() == scale / 2
    # 2^k times the size rounds to Inf in fp16 above 65520.
    searched = sum(size * 2.0**k >= 65520 for k in range(41))
    assert number == searched
    assert searched == (25 if size == 1.0 else 5)
    known = "the loss was not given" if loss is None else "the loss is 12.82"
    assert warnings() == [
        f"Gradient overflow at GradScaler scale {2.0 ** (40 - i):g}, skipping batch b{i}: "
        f"the scaler is searching for its scale, {known}"
        for i in range(searched)
    ]
    assert loop.weight.ne(0).all()


def test_the_log_of_a_deep_model_in_fp16(warnings):
    """DESIGN.md's original log: `grad_norm=inf` at batches 0, 1, 2, ..., and a true norm of 555."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    optimizer = fastguard.AdamW(model.parameters(), lr=0.01)
    guard = GradGuard(model, 0.5, 10.0, patience=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x, losses, norms = torch.randn(16, 8), [], []
    for batch in range(60):
        optimizer.zero_grad()
        loss = (ThroughFP16.apply(model(x)) - 0.5).square().sum() * 100
        scaler.scale(loss).backward()
        norms.append(guard.step(optimizer, scaler=scaler, loss=loss, batch_id=batch).total_norm)
        losses.append(loss.item())
    searched = sum(map(math.isinf, norms)) + sum(map(math.isnan, norms))
    assert 4 < searched < 16
    assert warnings()[0].startswith(
        "Gradient overflow at GradScaler scale 65536, skipping batch 0: the scaler is searching "
        "for its scale, the loss is "
    )
    assert len(warnings()) == searched
    assert 100 < norms[searched] < 1e4
    assert losses[searched] == losses[0]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_run_that_overflows_for_ever_ends(attached, unscale, warnings):
    """From 2^40 down to 1 are 40 searches; what overflows at 1 and below spends the patience."""
    loop = Loop(2.0**40, math.inf, patience=5, attached=attached, unscale=unscale)
    with pytest.raises(GradientExplosionError) as caught:
        for _ in range(100):
            loop.step(loss=3.0)
    assert loop.guard.state_dict()["steps"] == 45
    known = not (attached and unscale)  # the optimizer is handed no scale after unscale_
    assert [r.step for r in caught.value.reports] == list(range(40, 45))
    assert caught.value.reports[0].loss_scale == (1.0 if known else None)
    message = str(caught.value)
    scales = "1, 0.5, 0.25, 0.125, 0.0625" if known else "unknown"
    assert (
        "5 had an Inf gradient, first at weight[0], while no loss is known to be bad, under a "
        f"GradScaler at scale {scales}" in message
    )
    assert "run in bf16 or fp32" in message
    assert "corrupt" not in message
    searches = [w for w in warnings() if "searching" in w]
    assert len(searches) == (40 if known else 45)
    if known:
        assert warnings()[40].startswith("Infinite gradient, skipping batch 40 (norm ")


def test_a_scale_that_does_not_fall_does_not_skip_for_ever():
    class AtLeast(torch.amp.GradScaler):
        def update(self, new_scale=None):
            super().update(max(self.get_scale() / 2, 128.0))

    loop = Loop(256.0, math.inf, patience=3)
    loop.scaler = AtLeast("cpu", init_scale=256.0)
    with pytest.raises(GradientExplosionError, match=r"a GradScaler at scale 128\."):
        for _ in range(100):
            loop.step()
    assert loop.guard.state_dict()["steps"] == 43


def test_searches_are_free_again_later():
    searches = Searches()
    assert all(searches.is_free(step) for step in range(40))
    assert not searches.is_free(1999)
    assert searches.is_free(2000)
    assert not Searches(searches.state_dict()).is_free(2000)
    assert Searches(searches.state_dict()).is_free(2001)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "loss, factor",
    [(None, math.nan), (1.0, math.nan), (math.inf, math.inf), (math.nan, 1e9), (-math.inf, 1.0)],
)
def test_what_is_no_search(attached, loss, factor, warnings):
    """NaNs alone, and a loss that is not finite."""
    loop = Loop(1024.0, patience=2, attached=attached)
    report = loop.step(loss, factor)
    assert report.verdict is Verdict.SKIP_NONFINITE
    assert not report.scale_search
    assert report.loss_scale == 1024.0
    assert warnings()[0].startswith(("Infinite gradient, skipping", "Infinite loss, skipping"))
    with pytest.raises(GradientExplosionError, match="corrupt or silent inputs"):
        loop.step(loss, factor)


def test_the_words_of_the_definition():
    verdict = Verdict.SKIP_NONFINITE
    assert is_search(verdict, True, 2.0, True, False)
    assert is_search(verdict, True, None, True, False)
    assert not is_search(verdict, True, 1.0, True, False)
    assert not is_search(verdict, True, 2.0, False, False)
    assert not is_search(verdict, True, 2.0, True, True)
    assert not is_search(verdict, False, None, True, False)
    assert not is_search(Verdict.SKIP_ROLLBACK, True, 2.0, True, False)


def test_an_inf_without_a_scaler_or_with_a_disabled_one_is_none():
    weight = nn.Parameter(torch.zeros(2))
    guard, optimizer = GradGuard([weight]), torch.optim.SGD([weight], lr=1.0)
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        weight.grad = torch.full((2,), math.inf)
        report = guard.step(optimizer, scaler=scaler)
        assert (report.scale_search, report.loss_scale) == (False, None)


def test_a_nan_beside_the_inf_is_still_a_search():
    """Inf - Inf, or Inf times 0: what an overflow becomes on its way through backward."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    guard, scaler = GradGuard([first, second]), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale((first + second).sum()).backward()
    first.grad, second.grad = torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0])
    report = guard.step(torch.optim.SGD([first, second], lr=1.0), scaler=scaler)
    assert report.scale_search
    assert math.isnan(report.total_norm)


def test_other_skips_between_searches_spend_the_patience_as_if_those_were_not():
    loop = Loop(2.0**40, patience=2)
    loop.step(factor=math.nan)
    for _ in range(3):
        assert loop.step(factor=math.inf).scale_search
    with pytest.raises(GradientExplosionError) as caught:
        loop.step(factor=math.nan)
    assert [r.step for r in caught.value.reports] == [0, 4]
    assert "GradScaler" not in str(caught.value)


def window(loop, factors, losses=None):
    loop.optimizer.zero_grad()
    for i, factor in enumerate(factors):
        loop.backward(factor)
        loop.guard.accumulate(scaler=loop.scaler, loss=None if losses is None else losses[i])
    return loop.guard.step(loop.optimizer, scaler=loop.scaler)


def test_micro_batches(warnings):
    loop = Loop(1024.0, patience=2)
    report = window(loop, [1.0, 1e9, math.nan])
    assert not report.skipped and not report.scale_search
    assert [(q.micro_batch, q.scale_search) for q in report.skipped_micro_batches] == [
        (1, True),
        (2, False),
    ]
    assert report.micro_batch is None
    assert loop.scaler.get_scale() == 512.0
    for k in range(9):
        report = window(loop, [1e9, 1e9], [1.0, None])
        assert report.skipped and report.scale_search
        assert report.loss_scale == 512.0 / 2**k
    assert warnings()[0] == (
        "Gradient overflow at GradScaler scale 1024, skipping batch micro-batch 1: the scaler is "
        "searching for its scale, the loss was not given"
    )
    assert warnings()[4] == (
        "Gradient overflow at GradScaler scale 512, skipping batch 1: the scaler is searching for "
        "its scale, the loss was not given"
    )


def test_a_window_with_a_nan_is_no_search():
    loop = Loop(1024.0, patience=1)
    with pytest.raises(GradientExplosionError, match="1 had a NaN or Inf gradient") as caught:
        window(loop, [1e9, math.nan])
    assert "under a GradScaler at scale 1024" in str(caught.value)


def test_searches_leave_no_files(tmp_path):
    loop = Loop(4.0, math.inf, report_dir=tmp_path)
    for _ in range(3):
        loop.step()
    window(loop, [1e9])
    window(Loop(4.0, report_dir=tmp_path), [1e9, 1.0])
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["bad_step_000002.json", "bad_step_000003.json"]
    found = json.loads((tmp_path / names[0]).read_text())
    assert (found["loss_scale"], found["scale_search"]) == (1.0, False)


@pytest.mark.parametrize("again", ["state_dict", "pickle"])
def test_a_resumed_guard_knows_what_was_free(again):
    loop = Loop(2.0**30, math.inf, patience=5)
    for _ in range(34):
        loop.step()
    if again == "state_dict":
        state = json.loads(json.dumps(loop.guard.state_dict()))
        loop.guard = GradGuard([("weight", loop.weight)], patience=5)
        loop.guard.load_state_dict(state)
    else:
        loop.guard, loop.weight, loop.optimizer = pickle.loads(
            pickle.dumps((loop.guard, loop.weight, loop.optimizer))
        )
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(10):  # 30 were free and these are; 4 were not, and the next is not
        loop.step()
    with pytest.raises(GradientExplosionError, match="5 steps"):
        loop.step()


def test_a_state_from_before_there_were_searches():
    loop = Loop(2.0)
    loop.guard.load_state_dict(old_state(loop.guard.state_dict()))
    assert loop.step(factor=math.inf).scale_search


def test_the_report_has_the_scale_of_its_own_step(monkeypatch):
    """Also where the host learns of it after the scaler's update."""
    slow(monkeypatch)
    loop = Loop(2.0**20)
    reports = [loop.step(factor=math.inf) for _ in range(3)]
    assert [report.loss_scale for report in reports] == [2.0**20, 2.0**19, 2.0**18]


def test_reports_of_an_older_fastguard():
    loop = Loop(2.0)
    values = loop.step(factor=math.inf).result().to_dict()
    assert StepReport.from_dict(json.loads(json.dumps(values))).scale_search
    for name in ("loss_scale", "scale_search", "micro_batch"):
        del values[name]
    report = StepReport.from_dict(values)
    assert (report.loss_scale, report.scale_search, report.micro_batch) == (None, False, None)


@pytest.mark.parametrize("loss", [1.0, math.inf, math.nan])
def test_among_ranks_that_decide_together_the_loss_of_another_counts(loss):
    """All must come to the same answer, or one would run out of patience before the others."""
    one = torch.ones((), dtype=torch.float64)
    record = torch.tensor([2, 1, math.inf, 1, loss, math.inf])
    measured = GradNorm(one * math.inf, one[None] * math.inf, torch.tensor([[0, 1, 0]]))
    arguments = 0, None, record.double(), measured, one / 8, ["weight"], None
    scaled = LossScale(one * 8, None, one * 8)
    report = PendingReport(*arguments, scaled=scaled, loss_counts=True)
    assert report.loss is None
    assert report.scale_search == math.isfinite(loss)
    assert PendingReport(*arguments, scaled=scaled).scale_search  # here nobody gave one
