"""What the guard remembers of each parameter's norm, and which parameters a report names."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Rollback, Verdict
from fastguard.guard.report import Risen
from fastguard.guard.statistics import TensorNorms
from fastguard.thresholds import AdaGC

from .test_guard_device import slow


class Named:
    """A guard of parameters a, b, c ... whose gradients have the norms that they are given."""

    def __init__(self, names="ab", **kwargs):
        self.parameters = {name: nn.Parameter(torch.zeros(4)) for name in names}
        self.optimizer = fastguard.AdamW(self.parameters.values(), lr=0.0)
        self.guard = GradGuard(self.parameters.items(), **{"patience": 1000, **kwargs})

    def step(self, **norms):
        for name, parameter in self.parameters.items():
            norm = norms.get(name)
            parameter.grad = None if norm is None else torch.full((4,), norm / 2)
        return self.guard.step(self.optimizer)

    def usual(self):
        return self.guard.state_dict()["usual_norms"]


def test_the_usual_norm_is_kept_by_name_while_parameters_come_and_go():
    named = Named("abc")
    named.step(a=1.0, b=2.0)
    named.step(c=3.0)
    assert named.usual() == {"a": 1.0, "b": 2.0, "c": 3.0}
    named.step(b=2.0)  # as many, and others
    assert named.usual() == {"a": 1.0, "b": 2.0, "c": 3.0}
    named.step(c=3.0, b=2.5, a=0.5)
    named.step(b=2.0)
    named.step()
    expected = {"a": 0.98 + 0.01, "b": (1.96 + 0.05) * 0.98 + 0.04, "c": 3.0}
    assert named.usual() == pytest.approx(expected)


def test_the_same_tensor_serves_while_the_parameters_are_the_same():
    named = Named()
    named.step(a=1.0, b=1.0)
    held = named.guard._decider.memory.statistics.per_tensor
    named.step(a=1.0, b=1.0)
    assert named.guard._decider.memory.statistics.per_tensor is held


def test_a_report_names_what_rose_and_since_when():
    named = Named("abcdefg", skip_norm=10.0)
    for _ in range(30):
        named.step(a=1.0, b=0.1, c=1.0, d=1.0, e=1.0, f=1.0, g=1.0)
    assert named.step(a=1.0, b=0.39, c=3.9).risen() == []
    named.step(a=1.0, b=1.0, c=1.0)
    report = named.step(a=100.0, b=90.0, c=1.0, d=4.1)
    assert report.verdict is Verdict.SKIP_OUTLIER
    b, a, d = report.risen()
    assert (b.name, b.norm, b.since_step) == ("b", pytest.approx(90.0), 31)
    assert (a.name, a.norm, a.since_step) == ("a", pytest.approx(100.0), 32)
    assert a.usual_norm == pytest.approx(1.0)  # as it was before this step
    assert a.ratio == pytest.approx(100.0)
    assert d == Risen("d", pytest.approx(4.1), pytest.approx(1.0), 32)
    report = named.step(**dict.fromkeys("abcdefg", 1000.0))
    names = [each.name for each in report.risen()]
    assert len(names) == 5
    assert names[0] == "b"


def test_a_run_of_risen_norms_is_interrupted_by_an_ordinary_one_only():
    named = Named()
    for norm in [1.0] * 20 + [8.0, math.nan, 8.0, 0.0, 8.0]:
        report = named.step(a=norm, b=1.0)
    assert [each.since_step for each in report.risen()] == [20]
    named.step(a=1.0, b=1.0)
    assert [each.since_step for each in named.step(a=9.0, b=1.0).risen()] == [26]


def test_what_is_not_finite_or_was_never_seen_has_not_risen():
    named = Named("abc")
    named.step(a=1.0, b=1.0)
    report = named.step(a=math.inf, b=50.0, c=1e6)
    assert [each.name for each in report.risen()] == ["b"]


def test_a_report_that_is_read_late_has_the_norms_of_its_own_step(monkeypatch):
    slow(monkeypatch)
    named = Named(max_lag=100)
    for _ in range(20):
        named.step(a=1.0, b=1.0)
    report = named.step(a=50.0, b=1.0)
    for _ in range(40):
        named.step(a=50.0, b=1.0)
    (risen,) = report.risen()
    assert risen == Risen("a", pytest.approx(50.0), pytest.approx(1.0), 20)


def test_micro_batches_have_no_usual_norms():
    named = Named()
    named.step(a=1.0, b=1.0)
    before = named.usual()
    for _ in range(3):
        for parameter in named.parameters.values():
            parameter.grad = torch.full((4,), 50.0)
        assert named.guard.accumulate().risen() == []
    assert named.usual() == before
    assert [each.name for each in named.guard.step(named.optimizer).risen()] == ["a", "b"]


def test_an_optimizer_that_raises_leaves_them_as_they_were():
    named = Named("abc", threshold=AdaGC(warmup=1))
    for _ in range(3):
        named.step(a=1.0, b=2.0)
    before = named.guard.state_dict()

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    named.optimizer.register_step_pre_hook(broken)
    for norms in ({"a": 3.0, "b": 1.0}, {"b": 3.0, "c": 1.0}):
        with pytest.raises(ZeroDivisionError):
            named.step(**norms)
    assert named.guard.state_dict() == before


def test_a_rollback_brings_them_back():
    named = Named(patience=2, on_patience="rollback", rollback=Rollback(every=3))
    for i in range(5):
        named.step(a=1.0 + i, b=2.0)
        if i == 3:
            before = named.usual()
    for _ in range(2):
        named.step(b=math.nan)
    assert named.usual() == before


@pytest.mark.parametrize(
    "again",
    [
        lambda guard: guard.state_dict(),
        lambda guard: json.loads(json.dumps(guard.state_dict())),
        lambda guard: pickle.loads(pickle.dumps(guard.state_dict())),
    ],
)
def test_a_resumed_guard_has_them(again):
    def run(named, steps):
        reports = []
        for i in steps:
            a = 40.0 if i > 25 else 1.0 + i % 5
            reports.append(named.step(a=a, b=2.0, c=None if i % 3 else 1.0).risen())
        return reports

    first = Named("abc", threshold=AdaGC(warmup=5))
    run(first, range(28))
    second = Named("abc", threshold=AdaGC(warmup=5))
    second.guard.load_state_dict(again(first.guard))
    assert second.guard.state_dict() == first.guard.state_dict()
    assert run(second, range(28, 60)) == run(first, range(28, 60))
    assert second.guard.state_dict() == first.guard.state_dict()
    assert "a" in first.guard.state_dict()["clipped_since"]


def test_copies_do_not_share_them():
    named = Named("ab")
    named.step(a=1.0)
    other = (
        copy.deepcopy(named.guard._decider.memory.tensor_norms),
        copy.deepcopy(named.guard._decider.memory.statistics),
    )
    named.step(a=3.0, b=1.0)
    assert other[0].as_plain(other[1].per_tensor)["usual_norms"] == {"a": 1.0}


@pytest.mark.parametrize("row", ["ema_norms", "clipped_since", "usual_norms", "risen_since"])
@pytest.mark.parametrize("wrong", [{"a": -1.0}, {"a": math.nan}, {"a": math.inf}, {"a": "x"}, [1]])
def test_a_state_that_is_none_is_refused(row, wrong):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        TensorNorms.from_plain({row: wrong}, torch.device("cpu"))
