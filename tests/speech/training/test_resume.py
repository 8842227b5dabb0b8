"""A run that was killed and started again gives the losses of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastguard.speech.cli.train import main
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.trainer import Trainer
from tests.recordings import tones

from .test_train import metrics

REPOSITORY = Path(__file__).resolve().parents[3]
OPTIONS = [
    "--model", "baseline", "--stable", "--batch-size", "1", "--epochs", "2",
    "--augment.speeds", "[0.9,1.0,1.1]", "--optim.schedule", "cosine", "--optim.warmup", "3",
    "--checkpoint.steps", "1",
]  # fmt: skip


class Killed(BaseException):
    """In place of SIGKILL: nothing is written on the way out."""


def kill_at(monkeypatch, step):
    """Die in the middle of this step (from 0); a negative one counts evaluations."""
    train, evaluate = Trainer._train_step, Trainer._close_epoch

    def dying_step(self, *args):
        if self.progress.step == step:
            raise Killed
        return train(self, *args)

    def dying_evaluation(self):
        if self.progress.epoch == -step:
            raise Killed
        return evaluate(self)

    monkeypatch.setattr(Trainer, "_train_step", dying_step)
    monkeypatch.setattr(Trainer, "_close_epoch", dying_evaluation)


def run(folder, *options):
    return main([*OPTIONS, "--run-dir", str(folder), *options])


def story(folder):
    """What a run tells, but for the time it took."""
    without = ("seconds",)
    lines = metrics(folder, "step") + metrics(folder, "epoch")
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "fp32", "--ema", "0.9"),
        ("--precision", "bf16", "--num-workers", "2"),
        ("--precision", "fp32", "--grad-accumulation", "3", "--guard.threshold", "zclip"),
        pytest.param(("--precision", "fp16"), marks=pytest.mark.slow),
        pytest.param(
            ("--model", "teacher", "--network.attention_dropout", "0.3"), marks=pytest.mark.slow
        ),
    ],
    ids=["fp32", "bf16-workers", "accumulation", "fp16", "teacher"],
)
def test_killed_in_a_step_and_in_an_evaluation(tmp_path, monkeypatch, options):
    options = ("--data", tones(tmp_path), *options)
    assert run(tmp_path / "whole", *options) == 0
    steps = len(metrics(tmp_path / "whole", "step")) // 2
    for step in (0, 1, -1, steps, -2):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                run(tmp_path / "killed", *options)
    assert run(tmp_path / "killed", *options) == 0
    assert story(tmp_path / "killed") == story(tmp_path / "whole")
    assert len(metrics(tmp_path / "whole", "epoch")) == 2


def test_stopped_after_the_last_batch_of_an_epoch_and_in_its_evaluation(tmp_path, monkeypatch):
    options = ("--data", tones(tmp_path), "--precision", "fp32", "--num-workers", "2")
    assert run(tmp_path / "whole", *options) == 0
    steps = len(metrics(tmp_path / "whole", "step")) // 2
    train, evaluate = Trainer._train_step, Trainer.evaluate

    def stopped_step(self, *args):
        loss = train(self, *args)
        if self.progress.step == steps:
            signal.raise_signal(signal.SIGTERM)
        return loss

    def stopped_evaluation(self, model):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, model)

    for name, stopped in (("_train_step", stopped_step), ("evaluate", stopped_evaluation)):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, name, stopped)
            assert run(tmp_path / "stopped", *options) == 130
        assert metrics(tmp_path / "stopped", "epoch") == []
        assert checkpoint.load(tmp_path / "stopped" / "last.pt")["step"] == steps
    assert run(tmp_path / "stopped", *options) == 0
    assert story(tmp_path / "stopped") == story(tmp_path / "whole")


def test_a_run_that_is_past_max_steps_ends(tmp_path):
    options = ("--data", tones(tmp_path), "--precision", "fp32")
    assert run(tmp_path / "run", *options, "--max-steps", "2") == 0
    assert run(tmp_path / "run", *options, "--max-steps", "1") == 0
    assert len(metrics(tmp_path / "run", "step")) == 2


def test_a_finished_run_stays_as_it_is(tmp_path, capsys):
    options = ("--data", tones(tmp_path), "--precision", "fp32", "--max-steps", "2")
    assert run(tmp_path / "run", *options) == 0
    before = story(tmp_path / "run")
    assert run(tmp_path / "run", *options) == 0
    assert story(tmp_path / "run") == before
    error = capsys.readouterr().err
    assert "Nothing is left to train: 2 steps are done, and max_steps=2" in error
    assert "Finished at step 2" in error


def test_more_epochs_go_on_from_the_end(tmp_path):
    options = ("--data", tones(tmp_path), "--precision", "fp32", "--optim.schedule", "constant")
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--epochs", "1") == 0
    assert run(tmp_path / "parts", *options) == 0
    assert story(tmp_path / "parts") == story(tmp_path / "whole")
    # In a new folder too.
    assert run(tmp_path / "first", *options, "--epochs", "1") == 0
    assert run(tmp_path / "second", *options, "--resume", str(tmp_path / "first")) == 0
    whole = metrics(tmp_path / "whole", "step")
    losses = [step["loss"] for step in whole if step["epoch"] == 2]
    assert [step["loss"] for step in metrics(tmp_path / "second", "step")] == losses


def test_another_folder_goes_on_from_a_state_with_other_settings(tmp_path):
    data = ("--data", tones(tmp_path), "--precision", "fp32")
    assert run(tmp_path / "first", *data, "--epochs", "1") == 0
    second = ("--resume", str(tmp_path / "first"), "--optim.lr", "1e-4",
              "--optim.weight_decay", "0.3")  # fmt: skip
    assert run(tmp_path / "second", *data, *second) == 0
    steps = metrics(tmp_path / "second", "step")
    assert [step["step"] for step in steps] == [5, 6, 7, 8]
    group = checkpoint.load(tmp_path / "second" / "last.pt")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.3
    assert steps[-1]["lr"] > metrics(tmp_path / "first", "step")[-1]["lr"]


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path):
    """With a state of 180 MB after each step, many moments fall into the writing of one."""
    options = ["--data", tones(tmp_path, 8), "--precision", "fp32", "--epochs", "4"]
    command = [sys.executable, "-m", "fastguard.train", *OPTIONS, *options, "--run-dir"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], check=True, env=environment, cwd=tmp_path)
    seconds = time.monotonic() - start
    draw = random.Random(6)
    half_written = 0
    for _ in range(20):
        process = subprocess.Popen(
            [*command, tmp_path / "killed"],
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = next((line for line in process.stderr if line.startswith("run folder")), None)
        assert until, "the run ended before it began"
        try:
            process.communicate(timeout=draw.uniform(0, seconds / 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        half_written += bool(list((tmp_path / "killed").rglob("*.tmp")))
    subprocess.run([*command, tmp_path / "killed"], check=True, env=environment, cwd=tmp_path)
    assert story(tmp_path / "killed") == story(tmp_path / "whole")
    assert half_written > 0, "no kill fell into the writing of a state: the test shows too little"
