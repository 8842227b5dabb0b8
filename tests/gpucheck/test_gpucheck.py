"""The check of a GPU, tried on the CPU: it passes what is right and tells what is wrong."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch

from fastguard import ops
from fastguard.gpucheck import __main__ as gpucheck
from fastguard.gpucheck import checks, machine, timing
from fastguard.gpucheck.adamw import Options
from fastguard.gpucheck.cases import LAYOUTS, Grid, Spec, draw, place
from fastguard.gpucheck.checks import Case, Check, Compared, DeviceLost, largest_error, run_check
from fastguard.gpucheck.guarded import GUARDED
from fastguard.gpucheck.operators import OPERATORS
from fastguard.gpucheck.properties import PROPERTIES
from fastguard.gpucheck.report import Report
from fastguard.ops import _library
from fastguard.ops import attention as attention_ops
from tests.ops.test_ops import needs_kernel

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


# --- the report ---------------------------------------------------------------------------------


def test_one_part_does_not_lose_the_others(report):
    def raising():
        raise ValueError("something unforeseen")

    parts = [("One", raising), ("Two", lambda: report.line("the second part"))]
    assert gpucheck.check(report, CPU, parts) == 1
    assert "ValueError: something unforeseen" in written(report)
    assert "the second part" in written(report)
    assert "FAILED: One" in written(report)
    assert str(report.path) in written(report).splitlines()[-1]


def test_a_broken_context_ends_the_check_but_not_the_report(report, monkeypatch):
    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checks, "lost_device", lambda device: "CUDA error: illegal memory access")
    check = Check("adamw_", lambda device, grid: iter([Case("65 floats", illegal)] * 2))
    with pytest.raises(DeviceLost):
        run_check(check, CPU, TINY, report)
    parts = [("One", lambda: run_check(check, CPU, TINY, report)), ("Two", illegal)]
    assert gpucheck.check(report, CPU, parts) == 1
    assert "== Two ==" not in written(report)
    assert "context is broken, in adamw_, 65 floats: CUDA error" in written(report)
    assert "attach it to an issue" in written(report).splitlines()[-1]


def test_ctrl_c_leaves_a_report_of_what_was_done(report):
    def stopped():
        report.line("half of it")
        raise KeyboardInterrupt

    assert gpucheck.check(report, CPU, [("One", stopped), ("Two", stopped)]) == 130
    assert "half of it" in written(report)
    assert "stopped by Ctrl-C" in written(report)
    assert "== Two ==" not in written(report)


# --- the machine --------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_one_line_and_nothing_else(no_cuda, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "build", lambda log: pytest.fail("built without a GPU"))
    assert gpucheck.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no CUDA device: nothing to check here; run ")
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--device", "xyz"], ["--device", "meta"]])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        gpucheck.main(wrong)
    assert caught.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """The file holds what was printed, and everything has its place in it."""
    monkeypatch.setattr(gpucheck, "QUICK", TINY)
    monkeypatch.setattr(timing, "WORKLOADS", [timing.Workload("20 tensors", [100] * 20)])
    monkeypatch.setattr(timing.measure, "__defaults__", (None, 1 << 20))
    path = tmp_path / "report.txt"
    status = gpucheck.main(["--device", "cpu", "--quick", "--repeats", "1", "--output", str(path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert path.read_text() == printed
    titles = re.findall(r"^== (\w+)", printed, re.MULTILINE)
    assert titles == ["Environment", "Operators", "Operators", "Guarded", "Times", "Result"]
    for name in ALL:
        assert f"\n{name} " in printed
    for row in ("torch get_total_norm", "guard.step(fastguard.AdamW)", "clip_grad_norm_ + AdamW()"):
        assert re.search(rf"^{re.escape(row)} +\d", printed, re.MULTILINE)
    assert torch.__version__ in printed


def test_a_report_that_can_not_be_written(tmp_path, capsys):
    path = tmp_path / "no" / "such" / "folder"
    assert gpucheck.main(["--device", "cpu", "--output", str(path)]) == 2
    assert "can not write the report" in capsys.readouterr().err


def test_a_missing_library_is_built_and_the_check_starts_again(monkeypatch, capsys):
    """In a process of its own, which does not try to build once more."""
    ran = []

    def run(command, **options):
        ran.append(command)
        if "--built" in command:
            assert gpucheck.parse(command[3:]).built is not None
        return subprocess.CompletedProcess(command, 1 if "--built" in command else 0)

    monkeypatch.setattr(machine, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "can_build", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpucheck.main(["--quick"]) == 1
    build, again = ran
    assert build[1:] == ["setup.py", "build_ext", "--inplace"]
    assert again[1:4] == ["-m", "fastguard.gpucheck", "--quick"]
    assert "building it" in capsys.readouterr().out


@pytest.mark.parametrize("problem", [None, "_cuda.so was not built"])
def test_what_came_of_a_build(problem, report, tmp_path, monkeypatch):
    log = tmp_path / "build.log"
    log.write_text("nvcc fatal: unsupported gpu architecture\n")
    monkeypatch.setattr(_library, "cuda_problem", problem)
    machine.say_built(report, log)
    assert ("nvcc fatal" in written(report)) == (problem is not None)
    assert ("this command built it" in written(report)) == (problem is None)


@pytest.mark.parametrize("sources", [True, False])
def test_what_to_do_about_a_library_that_does_not_load(sources, report, tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "cuda_problem", "_cuda.so does not load: undefined symbol")
    monkeypatch.setattr(machine, "describe", lambda device: {})
    monkeypatch.setattr(machine, "find_nvcc", lambda: None)
    if not sources:
        monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert not machine.can_build()
    machine.environment(report, torch.device("cuda"))
    assert report.failed == ["CUDA library"]
    assert "undefined symbol" in written(report)
    command = "python setup.py build_ext --inplace" if sources else "pip install -v -e ."
    assert command in written(report)


@pytest.mark.parametrize(("body", "failed"), [("pass", []), ("assert 0", ["pytest -m cuda"])])
def test_the_tests_of_the_checkout_are_run(body, failed, report, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    machine.tests(report)
    assert "no tests/ beside it" in written(report)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").touch()
    (tmp_path / "tests" / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.cuda\ndef test_a(): {body}\ndef test_b(): assert 0\n"
    )
    machine.tests(report)
    assert report.failed == failed
    assert "1 deselected" in written(report)


# --- times --------------------------------------------------------------------------------------

SMALL = [timing.Workload("small", [100] * 20), timing.Workload("bf16", [9] * 3, torch.bfloat16)]


def measure(report):
    timing.measure(report, CPU, 1, SMALL, copy_size=1 << 20)


def test_a_workload_too_large_for_the_memory_is_passed_over(report, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: SMALL[0].needed - 1)
    measure(report)
    assert "small: passed over, needs about" in written(report)
    assert "bf16: step" in written(report)
    assert not report.failed


def test_out_of_memory_is_said_and_passed_over(report, monkeypatch):
    real = timing.step_rows

    def rows(workload, parameters):
        if workload is SMALL[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
        return real(workload, parameters)

    monkeypatch.setattr(timing, "step_rows", rows)
    measure(report)
    assert "small: norm" in written(report)
    assert "small: passed over, out of memory: CUDA out of memory. Tried" in written(report)
    assert "bf16: step" in written(report)
    assert not report.failed


def test_bytes_are_those_of_the_readme():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.ones(3)
    rows = timing.step_rows(SMALL[0], parameters)
    assert [row.bytes for row in rows.values()] == [32, 40, 92]


def test_help_says_what_it_does():
    run = subprocess.run(
        [sys.executable, "-m", "fastguard.gpucheck", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    for word in ("--output", "--quick", "--repeats", "--no-tests", "--device", "Exit status: 0"):
        assert word in run.stdout
    assert "--built" not in run.stdout
