"""The lines of the log: which steps have one, and what it says."""

import re

import pytest

from tests.recordings import tones

from .test_train import metrics, poison, train

LINE = re.compile(
    r"Batch (?P<batch>\d+): loss=(?P<loss>\S+), grad_norm=(?P<norm>\S+), verdict=(?P<verdict>\w+), "
    r"lr=(?P<lr>\S+), epoch=(?P<epoch>\d+/\d+), step=(?P<step>\d+/\d+), seconds=\d+\.\d\d, "
    r"eta=\d+:\d\d:\d\d"
)


def lines(run_dir):
    log = (run_dir / "train.log").read_text(encoding="utf-8").splitlines()
    return [LINE.fullmatch(line) for line in log if line.startswith("Batch ")]


def run(folder, *options):
    """The lines of a run with four batches an epoch."""
    given = ["--stable", "--precision", "fp32", "--batch-size", "1", *options]
    assert train(folder / "run", tones(folder), *given) == 0
    found = lines(folder / "run")
    assert all(found)
    return found


def test_a_line_says_what_metrics_jsonl_says(tmp_path):
    found = run(tmp_path, "--epochs", "2", "--log-every", "1")
    steps = metrics(tmp_path / "run", "step")
    assert len(found) == len(steps) == 8
    for line, step in zip(found, steps, strict=True):
        assert int(line["batch"]) == step["batch"]
        assert float(line["loss"]) == pytest.approx(step["loss"], abs=0.005)
        assert float(line["norm"]) == pytest.approx(step["grad_norm"], abs=0.005)
        assert line["verdict"] == step["verdict"] == "clip"
        assert float(line["lr"]) == step["lr"]
        assert line["epoch"] == f"{step['epoch']}/2"
        assert line["step"] == f"{step['step']}/8"
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(
        r"^Epoch 1: loss=\S+, grad_norm=\S+, wer=\S+, cer=\S+ on dev, skipped=", log, re.M
    )
    assert "log_every: 1\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_every_n_steps_the_first_of_an_epoch_the_last_and_each_skip(tmp_path, monkeypatch):
    poison(monkeypatch, {"tone2.wav"})
    found = run(tmp_path, "--epochs", "3", "--log-every", "7", "--max-steps", "11")
    steps = metrics(tmp_path / "run", "step")
    skipped = {step["step"] for step in steps if step["verdict"] == "skip_nonfinite"}
    assert len(skipped) in (2, 3)
    logged = [int(line["step"].removesuffix("/11")) for line in found]
    assert logged == sorted({1, 5, 7, 9, 11} | skipped)
    assert {int(line["step"].split("/")[0]) for line in found if line["norm"] == "nan"} == skipped
    for line in found:
        number = int(line["step"].split("/")[0])
        assert line["verdict"] == ("skip_nonfinite" if number in skipped else "clip")


def test_a_run_that_goes_on_logs_its_first_step(tmp_path):
    run(tmp_path, "--max-steps", "2")
    found = run(tmp_path, "--max-steps", "4")
    assert [line["step"] for line in found] == ["1/2", "2/2", "3/4", "4/4"]


def test_a_search_for_a_loss_scale_is_not_called_an_explosion(tmp_path):
    found = run(tmp_path, "--max-steps", "2", "--precision", "fp16", "--log-every", "1")
    searching = [step.get("scale_search", False) for step in metrics(tmp_path / "run", "step")]
    assert [line["verdict"] == "scale_search" for line in found] == searching
