"""gpucheck: the report, the machine, the times."""

import re
import subprocess
import sys

import pytest
import torch

from fastguard.gpucheck import __main__ as gpucheck
from fastguard.gpucheck import checks, machine, timing
from fastguard.gpucheck.checks import Case, Check, DeviceLost, run_check
from fastguard.ops import _library

from . import test_gpucheck
from .test_gpucheck import ALL, CPU, TINY, written

report = test_gpucheck.report  # a fixture

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
    assert "cannot write the report" in capsys.readouterr().err


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
