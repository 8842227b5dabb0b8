"""GradGuard(on_skip=...): each skipped step is told once, in order, when the books are closed."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, StepReport, Verdict

from .test_guard_device import slow


class Loop:
    def __init__(self, on_skip, **options):
        self.weight = nn.Parameter(torch.zeros(2))
        self.optimizer = fastguard.AdamW([self.weight], lr=0.1)
        self.guard = GradGuard([("weight", self.weight)], on_skip=on_skip, **options)

    def step(self, value, **kwargs):
        self.weight.grad = torch.full((2,), value)
        return self.guard.step(self.optimizer, **kwargs)

    def accumulate(self, value, **kwargs):
        self.weight.grad = torch.full((2,), value)
        return self.guard.accumulate(**kwargs)


told = []


def remember(report):
    told.append(report)


@pytest.fixture(autouse=True)
def _nothing_told():
    told.clear()


def test_each_skip_is_told_once_and_in_order():
    loop = Loop(remember, patience=10)
    for i, value in enumerate((1.0, math.nan, 1.0, math.inf, math.nan)):
        loop.step(value, batch_id=f"b{i}")
        assert [r.batch for r in told] == [b for b in ("b1", "b3", "b4") if int(b[1]) <= i]
    assert all(type(report) is StepReport for report in told)
    loop.guard.poll(wait=True)
    assert len(told) == 3


def test_micro_batches_come_before_their_step():
    loop = Loop(remember)
    for value in (1.0, math.inf, math.nan):
        loop.accumulate(value)
    loop.guard.step(loop.optimizer)
    loop.accumulate(math.nan, batch_id="b")
    loop.guard.step(loop.optimizer)
    assert [(r.step, r.micro_batch, r.batch) for r in told] == [
        (0, 1, "micro-batch 1"),
        (0, 2, "micro-batch 2"),
        (1, 0, "b"),
        (1, None, 1),
    ]


def test_what_is_on_its_way_is_told_by_poll_and_state_dict(monkeypatch):
    slow(monkeypatch)
    loop = Loop(remember)
    loop.step(math.nan)
    loop.step(1.0)
    assert told == []
    loop.guard.poll(wait=True)
    assert [r.step for r in told] == [0]
    loop.step(math.nan)
    loop.guard.state_dict()
    assert [r.step for r in told] == [0, 2]


def test_nothing_is_told_again_after_a_resume(monkeypatch):
    loop = Loop(remember, patience=3)
    loop.step(math.nan)
    state = json.loads(json.dumps(loop.guard.state_dict()))
    again = Loop(remember, patience=3)
    again.guard.load_state_dict(state)
    again.guard.poll(wait=True)
    again.step(math.nan)
    assert [r.step for r in told] == [0, 1]
    with pytest.raises(GradientExplosionError):  # the one from before the resume counts
        again.step(math.nan)
    assert [r.step for r in told] == [0, 1, 2]


class Stop(Exception):
    pass


def test_what_a_callback_raises_comes_after_the_books_are_closed():
    def stop(report):
        told.append(report.step)
        raise Stop

    loop = Loop(stop, patience=3)
    loop.step(1.0)
    before = loop.weight.detach().clone()
    with pytest.raises(Stop):
        loop.step(math.nan)
    assert torch.equal(loop.weight, before)
    assert loop.guard.last_report.step == 1
    assert loop.guard.state_dict()["steps"] == 2
    loop.step(1.0)
    assert told == [1]
    for _ in (3, 4):
        with pytest.raises(Stop):
            loop.step(math.nan)
    with pytest.raises(Stop):
        loop.step(math.nan)
    assert told == [1, 3, 4, 5]
    with pytest.raises(GradientExplosionError) as caught:  # the patience stays spent
        loop.guard.poll()
    assert [r.step for r in caught.value.reports] == [3, 4, 5]


def test_several_that_arrive_together_and_a_callback_that_raises_once(monkeypatch):
    slow(monkeypatch)

    def stop(report):
        told.append(report.step)
        if len(told) == 1:
            raise Stop

    loop = Loop(stop)
    for _ in range(3):
        loop.step(math.nan)
    with pytest.raises(Stop):
        loop.guard.poll(wait=True)
    assert [r.step for r in loop.guard.poll()] == [0, 1, 2]
    assert told == [0, 1, 2]


def test_a_loaded_state_ends_what_was_still_to_be_told(monkeypatch):
    slow(monkeypatch)

    def stop(report):
        told.append(report.step)
        raise Stop

    loop = Loop(stop)
    state = loop.guard.state_dict()
    for _ in range(2):
        loop.step(math.nan)
    with pytest.raises(Stop):
        loop.guard.poll(wait=True)
    loop.guard.load_state_dict(state)
    loop.guard.poll(wait=True)
    assert told == [0]


def test_the_last_skip_is_told_before_the_error():
    loop = Loop(remember, patience=2)
    loop.step(math.nan)
    with pytest.raises(GradientExplosionError):
        loop.step(math.nan)
    assert [r.step for r in told] == [0, 1]


def test_a_rollback_is_complete_when_undone_skips_are_told(monkeypatch):
    slow(monkeypatch)
    weights = []

    def stop(report):
        told.append((report.step, report.verdict))
        weights.append(loop.weight.tolist())
        if report.step == 3:
            raise Stop

    options = {"on_patience": "rollback", "rollback": Rollback(skip_batches=1), "max_lag": 3}
    loop = Loop(stop, patience=2, **options)
    loop.step(1.0)
    good = loop.weight.tolist()
    for _ in range(4):
        loop.step(math.nan)
    with torch.no_grad():
        loop.weight.fill_(5.0)
    with pytest.raises(Stop):
        loop.guard.poll(wait=True)
    assert loop.weight.tolist() == good
    loop.step(1.0)
    loop.guard.poll(wait=True)
    bad = Verdict.SKIP_NONFINITE
    assert told == [(1, bad), (2, bad), (3, bad), (4, bad), (5, Verdict.SKIP_ROLLBACK)]
    assert weights[2] == good


def test_a_callback_may_call_the_guard():
    polled = []
    loop = Loop(lambda report: polled.extend(loop.guard.poll()), patience=2)
    loop.step(1.0)
    loop.step(math.nan)
    assert [r.step for r in polled] == [0, 1]
    with pytest.raises(GradientExplosionError):
        loop.step(math.nan)
    loop.guard.poll()  # raised once, not twice


def test_copies_and_pickles(monkeypatch):
    slow(monkeypatch)
    loop = Loop(remember)
    loop.step(math.nan)
    for again in (
        pickle.loads(pickle.dumps(loop.guard)),
        copy.deepcopy(loop.guard),
        copy.copy(loop.guard),
    ):
        again.poll(wait=True)
        assert told == []  # the original has still to tell
    loop.guard.poll()
    assert [r.step for r in told] == [0]
    weight, optimizer, again = copy.deepcopy((loop.weight, loop.optimizer, loop.guard))
    weight.grad = torch.full((2,), math.nan)
    again.step(optimizer)
    again.poll(wait=True)
    assert [r.step for r in told] == [0, 1]


def test_a_lambda_can_be_copied_but_not_pickled():
    guard = Loop(lambda report: None).guard
    copy.deepcopy(guard)
    with pytest.raises(TypeError, match=r"on_skip=.*<lambda> cannot be pickled: pickle finds"):
        pickle.dumps(guard)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="on_skip must be a function of a StepReport, got 'warn'"):
        Loop("warn")
