"""The check of a GPU, tried on the CPU: it passes what is right and tells what is wrong."""

import dataclasses
import math
import re

import pytest
import torch

from fastguard import ops
from fastguard.gpucheck.adamw import Options
from fastguard.gpucheck.cases import LAYOUTS, Grid, Spec, draw, place
from fastguard.gpucheck.checks import Compared, largest_error, run_check
from fastguard.gpucheck.guarded import GUARDED
from fastguard.gpucheck.operators import OPERATORS
from fastguard.gpucheck.properties import PROPERTIES
from fastguard.gpucheck.report import Report
from fastguard.ops import _library
from fastguard.ops import attention as attention_ops
from tests.native import needs_kernel

CPU = torch.device("cpu")
TINY = Grid(sizes=(0, 1, 65, 300), many=12, rounds=1, repeats=3)
ALL = {check.name: check for check in OPERATORS + PROPERTIES + GUARDED}


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "report.txt")
    yield report
    report.close()


def written(report):
    return report.path.read_text()


# --- the checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ALL)
def test_what_is_right_passes(name, device, report):
    run_check(ALL[name], torch.device(device), TINY, report)
    assert not report.failed, written(report)
    assert re.search(r" cases .* OK$|passed over: needs a CUDA device$", written(report).strip())


def test_every_operator_has_a_check():
    """A new one is a function and a line in OPERATORS."""
    pairs = (re.fullmatch(r"([a-z]\w*)_ref(_?)", name) for name in vars(ops))
    operators = {m[1] + m[2] for m in pairs if m} | {"attention"}  # with its backward
    assert operators == {check.name for check in OPERATORS}


def off_by_a_millionth(real):
    def grad_norm(grads):
        found = real(grads)
        wrong = len(grads) == 1 and grads[0].numel() == 65
        return found._replace(total_norm=found.total_norm * (1 + 1e-6)) if wrong else found

    return grad_norm


def last_element_forgotten(real):
    def scale_(grads, coef):
        ends = [grad.view(-1)[-1:].clone() if grad.is_contiguous() else None for grad in grads]
        real(grads, coef)
        for grad, end in zip(grads, ends, strict=True):
            if end is not None:
                grad.view(-1)[-1:] = end

    return scale_


def beside_the_tensor(real):
    def scale_(grads, coef):
        real(grads, coef)
        for grad in grads:
            if grad.storage_offset() > 0:
                grad.as_strided((1,), (1,), grad.storage_offset() - 1).mul_(0.5)

    return scale_


def deaf_to_the_verdict(real):
    def adamw_(params, grads, m, v, v_max, steps, coef, verdict, *options):
        real(params, grads, m, v, v_max, steps, coef, torch.zeros_like(verdict), *options)

    return adamw_


def without(option):
    names = [field.name for field in dataclasses.fields(Options)]
    neutral = {"weight_decay": 0.0, "eps": 1e-7, "maximize": False, "decoupled_weight_decay": True}

    def wrapped(real):
        def adamw_(*arguments):
            state, options = arguments[:8], list(arguments[8:])
            options[names.index(option)] = neutral[option]
            real(*state, *options)

        return adamw_

    return wrapped


def never_counts(real):
    return lambda sums, grads, verdict, window, weight: real(
        sums, grads, verdict, window.clone().clamp(min=1), weight
    )


def does_nothing(real):
    return lambda buffers, *_: torch.zeros(2 * len(buffers), dtype=torch.int32)


def clips_at_the_limit(real):
    def decide(norm, max_norm, skip_norm):
        coef, verdict = real(norm, max_norm, skip_norm)
        return ops.Decision(coef, torch.where(norm == max_norm, 0, verdict))

    return decide


def keeps_no(window):
    def plant(real):
        def guard_decide_(measured, unscale, loss, statistics, *rest):
            norms = getattr(statistics, window)
            before = norms.clone()
            decided = real(measured, unscale, loss, statistics, *rest)
            norms.copy_(before)
            return decided

        return guard_decide_

    return plant


def never_the_same_twice(real):
    def grad_norm(grads):
        found = real(grads)
        return found._replace(norms=found.norms * (1 + torch.randn(()).double() * 1e-13))

    return grad_norm


def other_dropout(real):
    def attention(*arguments):
        return real(*arguments[:7], arguments[7] / 2, *arguments[8:])

    return attention


def test_what_is_wrong_with_attention_is_told(report, monkeypatch):
    wrong = other_dropout(attention_ops.attention)
    reference = attention_ops.attention_ref
    monkeypatch.setattr(
        attention_ops,
        "attention",
        lambda *args: (reference if args[0].dtype == torch.float64 else wrong)(*args),
    )
    run_check(ALL["attention"], CPU, TINY, report)
    assert re.search(r"float32 .*dropout_p=0\.5.*\n.*output: element", written(report))


@pytest.mark.parametrize(
    ("name", "op", "plant", "told"),
    [
        ("grad_norm", "grad_norm", off_by_a_millionth, r"float32 \[65\]\n.*total_norm: element 0"),
        (
            "scale_",
            "scale_",
            last_element_forgotten,
            r"float32 \[1\]; coefficient 0.3\n.*element 0 of",
        ),
        ("scale_", "scale_", beside_the_tensor, r"memory around tensor 0.*expected 77.0"),
        ("adamw_", "adamw_", deaf_to_the_verdict, r"a skip; .*verdict=2\n"),
        ("adamw_", "adamw_", without("weight_decay"), r"parameter 0, float32"),
        ("adamw_", "adamw_", without("maximize"), r"maximize=True.*\n.*exp_avg of"),
        ("adamw_", "adamw_", without("decoupled_weight_decay"), r"exp_avg of parameter"),
        ("accumulate_", "accumulate_", never_counts, r"window: element"),
        ("settle_", "settle_", does_nothing, r"Verdict.APPLY.*\n.*saved copy"),
        ("decide", "decide", clips_at_the_limit, r"norm 0.0, max_norm 0.0.*\n.*verdict: element"),
        ("guard_decide_", "guard_decide_", keeps_no("seen_norms"), r"seen_norms of step \d"),
        ("guard_decide_", "guard_decide_", keeps_no("accepted_norms"), r"accepted_norms of step"),
        ("same input, same bits", "grad_norm", never_the_same_twice, r"time 1, tensor"),
        ("bad batches leave no trace", "adamw_", deaf_to_the_verdict, r"skipped steps: element 5"),
    ],
)
def test_what_is_wrong_is_told_with_its_case(name, op, plant, told, report, monkeypatch):
    monkeypatch.setattr(ops, op, plant(getattr(ops, op)))
    run_check(ALL[name], CPU, TINY, report)
    assert report.failed == [name]
    assert re.search(told, written(report)), written(report)
    assert "FAILED" in written(report)


def test_an_operator_that_raises_is_told_and_the_next_is_run(report, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(ops, "decide", broken)
    for name in ("decide", "settle_"):
        run_check(ALL[name], CPU, TINY, report)
    assert report.failed == ["decide"]
    assert "raised RuntimeError: no kernel image is available" in written(report)
    assert re.search(r"settle_ .* OK", written(report))


@needs_kernel
def test_who_served_is_told(report, monkeypatch):
    run_check(ALL["decide"], CPU, TINY, report)
    monkeypatch.setattr(_library, "has_kernel", lambda tensor: False)
    run_check(ALL["decide"], CPU, TINY, report)
    kernel, reference = written(report).splitlines()
    assert " kernel " in kernel
    assert " reference " in reference


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), [1.0, 2.0 + 2**-22], 1.0),  # in float32's ulps
        (torch.tensor([math.nan, math.inf]), [math.nan, math.inf], 0.0),
        (torch.tensor([1.0, math.nan]), [1.0, 2.0], math.inf),
        (torch.tensor([math.inf]), [-math.inf], math.inf),
        (torch.tensor([3, 4]), [3, 5], math.inf),
        (torch.tensor([2.0**-149]), [0.0], 1.0),
        (torch.zeros(0), [], 0.0),
        (torch.zeros(2), [0.0], math.inf),
    ],
)
def test_errors_are_in_ulps(found, expected, error):
    expected = torch.tensor(expected, dtype=torch.float64)
    worst, problem = largest_error(Compared("it", found, expected))
    assert worst == pytest.approx(error, rel=1e-5)
    assert (problem is None) == (error == 0)


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_a_layout_holds_the_values_amid_the_sentinel(layout):
    for shape in LAYOUTS.get(layout, [(0,), (5,)]):
        values = draw(Spec(shape, torch.float32), torch.Generator().manual_seed(0))
        part = place(values, layout, CPU)
        assert torch.equal(
            part.tensor, values[:1].expand(shape) if layout == "expanded" else values
        )
        assert (part.around() == 77.0).all()
        misaligned = part.tensor.data_ptr() % 16 != 0
        assert misaligned == (layout == "offset")
