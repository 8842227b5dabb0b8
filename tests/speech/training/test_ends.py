"""How a run ends that cannot go on: soon, with a status, a state, and a line on the cause."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastguard._io import failures
from fastguard.guard import GradGuard
from fastguard.speech.cli import train as cli
from fastguard.speech.cli.train import main
from fastguard.speech.data.batching import LoadError
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.learner import Learner
from fastguard.speech.training.trainer import Trainer
from tests import faults
from tests.recordings import tones

from .test_resume import story
from .test_train import metrics

REPOSITORY = Path(__file__).resolve().parents[3]
OPTIONS = [
    "--model", "baseline", "--stable", "--precision", "fp32", "--batch-size", "1", "--epochs", "2",
    "--augment.speeds", "[0.9,1.0,1.1]", "--optim.schedule", "noam", "--optim.warmup", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """What a run of two epochs of four steps tells that nothing disturbed, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, data) == 0
    return result(folder)


def result(folder):
    """The buffers of the model may differ, and the losses not: these do not depend on them."""
    model = checkpoint.load(folder / "last.pt")["model"]
    return story(folder), {name: value.double().sum().item() for name, value in model.items()}


def run(folder, data, *options):
    return main([*OPTIONS, "--data", data, "--run-dir", str(folder), *options])


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


SLOW = pytest.mark.slow
FAULTS = [
    ("memory", "load", "0", "tone2.wav could not be loaded: out of memory"),
    pytest.param("memory", "load", "2", "tone2.wav could not be loaded: out", marks=SLOW),
    pytest.param("error", "load", "2", "loaded: ZeroDivisionError: a fault of the", marks=SLOW),
    ("killed", "load", "2", "DataLoader worker (pid"),
    ("memory", "step", "0", "out of memory: make batches smaller"),
    pytest.param("error", "step", "2", "ZeroDivisionError: a fault of the program", marks=SLOW),
    ("memory", "evaluation", "2", "out of memory: make batches smaller"),
]


@pytest.mark.parametrize("what, where, workers, cause", FAULTS)
def test_a_fault_ends_the_run_with_its_last_step_as_a_state(
    tmp_path, data, whole, monkeypatch, capsys, what, where, workers, cause
):
    with monkeypatch.context() as patch:
        faults.put_in(patch.setattr, what, where)
        assert run(tmp_path, data, "--num-workers", workers) == 1
    error = last_line(capsys)
    steps = len(metrics(tmp_path, "step"))
    assert steps < 8
    assert error.startswith("ERROR - ")
    assert cause in error
    if steps or where != "load":
        assert error.endswith(f"--run-dir {tmp_path} continues from the state of step {steps}")
        assert checkpoint.load(tmp_path / "last.pt")["step"] == steps
    assert run(tmp_path, data) == 0
    assert result(tmp_path) == whole


@pytest.mark.parametrize("workers", ["0", "2"])
def test_stopped_inside_an_epoch(tmp_path, data, whole, monkeypatch, workers):
    """The batches that were read by then, and not trained on, come after."""
    step = Trainer._train_step

    def stopped(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        assert run(tmp_path, data, "--num-workers", workers) == 130
    assert checkpoint.load(tmp_path / "last.pt")["batches"] == 1
    assert run(tmp_path, data) == 0
    assert result(tmp_path) == whole


def test_the_log_file_alone_has_the_traceback(tmp_path, data, monkeypatch, capsys):
    faults.put_in(monkeypatch.setattr, "error", "step")
    assert run(tmp_path, data) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_sigterm_does_not_keep_a_run_from_saying_why_it_ends(tmp_path, data, monkeypatch, capsys):
    """torchrun sends it to a process as soon as another one is gone."""

    def unexpected(signum, frame):
        pytest.fail("the signal ended the run before its cause was logged")

    before, tell = signal.signal(signal.SIGTERM, unexpected), cli._tell

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        tell(*args, **options)
        signal.raise_signal(signal.SIGTERM)

    faults.put_in(monkeypatch.setattr, "error", "step")
    monkeypatch.setattr(cli, "_tell", interrupted)
    try:
        assert run(tmp_path, data) == 1
        assert signal.getsignal(signal.SIGTERM) is unexpected
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ERROR - ZeroDivisionError: a fault of the program" in capsys.readouterr().err


def test_sigterm_ends_a_run_that_has_not_begun(tmp_path, data):
    """As it ends any program: the handler is for the end of a run only."""
    code = (
        "import os, signal, sys\n"
        "from fastguard.speech.cli import train\n"
        "train.RunFolder.begin = lambda self: os.kill(os.getpid(), signal.SIGTERM)\n"
        "train.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *OPTIONS, "--data", data, "--run-dir", str(tmp_path)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGTERM


def test_a_fault_in_the_second_batch_of_a_step(tmp_path, data, monkeypatch):
    """What the first one added up, and its statistics, are undone with it."""
    options = ("--grad-accumulation", "2")
    assert run(tmp_path / "whole", data, *options) == 0
    loss = Learner.loss
    calls = []

    def faulty(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise MemoryError
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss", faulty)
        assert run(tmp_path / "run", data, *options) == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["batches"] == 2
    assert run(tmp_path / "run", data, *options) == 0
    assert story(tmp_path / "run") == story(tmp_path / "whole")


def test_a_fault_in_the_optimizers_step_writes_no_state(tmp_path, data, monkeypatch, capsys):
    """Half of the parameters may have been written: the state before that is named."""
    step = GradGuard.step

    def faulty(self, *args, **options):
        report = step(self, *args, **options)
        if report.step == 2:
            raise MemoryError
        return report

    monkeypatch.setattr(GradGuard, "step", faulty)
    assert run(tmp_path, data, "--checkpoint.steps", "1") == 1
    assert last_line(capsys).endswith("continues from the state of step 2")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


def test_a_fault_while_a_state_is_written(tmp_path, data, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        faults.put_in(patch.setattr, "memory", "save")
        assert run(tmp_path, data, "--checkpoint.steps", "1") == 1
    assert "ERROR - out of memory" in (error := last_line(capsys))
    # The second state fails, and is written after all when the run ends.
    assert error.endswith("continues from the state of step 2")
    assert run(tmp_path, data) == 0
    assert result(tmp_path) == whole


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_last_state_does_not_hide_the_cause(tmp_path, data, monkeypatch, capsys):
    def faulty(self):
        raise MemoryError

    faults.put_in(monkeypatch.setattr, "error", "step")
    monkeypatch.setattr(Trainer, "_save", faulty)
    assert run(tmp_path, data) == 1
    *_, warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("WARNING - No checkpoint at step 2: out of memory")
    assert error.startswith("ERROR - ZeroDivisionError: a fault of the program")
    assert error.endswith("no state was written: the same command starts again from the beginning")


@pytest.mark.parametrize("options", [(), ("--max-steps", "3")], ids=["epochs", "steps"])
def test_a_run_that_could_save_nothing_says_so_last(tmp_path, data, monkeypatch, capsys, options):
    monkeypatch.setattr(checkpoint, "save", full_disk)
    assert run(tmp_path, data, "--epochs", "1", *options) == 1
    error = last_line(capsys)
    assert error.startswith("ERROR - Finished at step ")
    assert "not all could be written" in error
    assert "no state: [Errno 28] No space left on device" in error
    assert error.endswith("no state was written: the same command starts again from the beginning")


def test_a_run_whose_folder_is_deleted_says_so_last(tmp_path, data, monkeypatch, capsys):
    step = Trainer._train_step

    def faulty(self, *args):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", faulty)
    assert run(tmp_path / "run", data, "--epochs", "1") == 1
    assert "ERROR - Finished at step 4, but not all could be written" in last_line(capsys)


def test_a_disk_that_is_full_for_a_while_costs_nothing_in_the_end(tmp_path, data, monkeypatch):
    save, calls = checkpoint.save, []

    def faulty(path, state):
        calls.append(path)
        if len(calls) < 3:
            full_disk()
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", faulty)
    assert run(tmp_path, data, "--checkpoint.steps", "1") == 0
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 8


@pytest.mark.parametrize("fault", ["patience", pytest.param("killed:load:0", marks=SLOW)])
def test_the_process_ends_whatever_its_workers_do(tmp_path, data, fault):
    """They ignore the SIGTERM of a scheduler, and must not ignore that of their parent."""
    command = ["-m", "fastguard.train"] if fault == "patience" else ["-m", "tests.faults", fault]
    options = [*OPTIONS, "--num-workers", "2", "--optim.lr", "1e20", "--guard.patience", "2"]
    done = subprocess.run(
        [sys.executable, *command, *options, "--data", data, "--run-dir", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    cause = "2 steps in a row were skipped" if fault == "patience" else "DataLoader worker (pid"
    assert f"ERROR - {cause}" in done.stderr


@pytest.mark.parametrize(
    "error, line",
    [
        (ZeroDivisionError("one\ntwo"), "ZeroDivisionError: one"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError(errno.ENOSPC, "full", "a"), "[Errno 28] full: 'a'"),
        (OSError(errno.ENOMEM, "fork"), "out of memory ([Errno 12] fork): make batches smaller"),
        (LoadError("a could not be loaded"), "a could not be loaded"),
        (LoadError(), "LoadError"),
        (
            LoadError(
                "Caught LoadError in DataLoader worker process 0.\nOriginal Traceback (most\n"
                "fastguard.speech.data.batching.LoadError: a could not be loaded: b\n"
            ),
            "a could not be loaded: b",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you\nframes"),
            "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you)",
        ),
    ],
)
def test_an_error_in_a_line(error, line):
    found = failures.in_a_line(error)
    assert found.startswith(line)
    assert found == line or failures.out_of_memory(error)


# --- in the middle of an epoch --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, first",
    [
        ((), 3),
        (("--num-workers", "2"), 1),
        ((), 4),  # the end of the epoch
        (("--grad-accumulation", "3"), 1),
    ],
    ids=["middle", "workers", "end", "accumulation"],
)
def test_max_steps_goes_on_in_its_epoch(tmp_path, data, whole, options, first):
    if "--grad-accumulation" in options:
        assert run(tmp_path / "whole", data, *options) == 0
        whole = result(tmp_path / "whole")
    assert run(tmp_path / "run", data, *options, "--max-steps", str(first)) == 0
    ended = metrics(tmp_path / "run", "epoch")
    assert [(epoch["epoch"], epoch["step"]) for epoch in ended] == [(1, first)]
    assert (tmp_path / "run" / "best.pt").exists()
    assert run(tmp_path / "run", data, *options, "--max-steps", "8") == 0
    assert result(tmp_path / "run") == whole


def test_the_state_is_that_of_a_run_without_a_stop(tmp_path, data):
    """The random numbers of all that draws some, and the place in the order, too."""
    for folder, stops in (("parts", ("3", "6")), ("straight", ("6",))):
        for stop in stops:
            assert run(tmp_path / folder, data, "--max-steps", stop) == 0
    parts, straight = (checkpoint.load(tmp_path / f / "last.pt") for f in ("parts", "straight"))
    for key in ("random", "loader", "batches", "step", "guard"):
        assert str(parts[key]) == str(straight[key]), key
    for name, value in straight["model"].items():
        assert torch.equal(parts["model"][name], value)
