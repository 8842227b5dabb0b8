"""Curves for wandb and MLflow, with the real packages and without a network."""

import json
import struct

import pytest

from fastguard.speech.training.tracker_ids import keep_id, known_id
from fastguard.speech.training.tracking import Tracker
from tests.recordings import tones

from .test_train import metrics, train

OPTIONS = ["--stable", "--precision", "fp32", "--batch-size", "2"]
CURVES = {
    "train/loss": "loss",
    "train/norm_before_clip": "grad_norm",
    "train/clip_coef": "clip_coef",
    "train/lr": "lr",
    "train/seconds_per_step": "seconds",
}


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def records(path):
    """The records of a file of wandb: blocks of 32 KiB with pieces of records, as in LevelDB's log.

    A piece has a checksum (4 bytes), a length (2) and a place: 1 whole, 2 first, 3 middle, 4 last.
    """
    data, at, parts = path.read_bytes(), 7, []  # after the file's header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, place = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if place in (1, 4):
            yield b"".join(parts)
            parts = []


def history_of(folder):
    """The points in the files that wandb wrote, and its settings: {name: [(step, value), ...]}."""
    from wandb.proto import wandb_internal_pb2

    points, settings, ids = {}, {}, set()
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                settings |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("history"):
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    value = json.loads(item.value_json)
                    points.setdefault(name, []).append((record.history.step.num, value))
    return points, settings, ids


def test_wandb_gets_what_metrics_jsonl_gets_and_a_resumed_run_continues_it(tmp_path, capsys):
    run = tmp_path / "run"
    options = [*OPTIONS, "--loggers", "wandb"]
    assert train(run, tones(tmp_path), *options, "--max-steps", "3") == 0
    assert train(run, tones(tmp_path), *options, "--max-steps", "5") == 0
    points, settings, ids = history_of(run / "wandb")
    steps = metrics(run, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    for name, key in CURVES.items():
        assert points[name] == [(s["step"], pytest.approx(float(s[key]))) for s in steps]
    rates = {e["step"]: e["wer"] for e in metrics(run, "epoch")}
    assert dict(points["epoch/wer"]).items() >= rates.items()
    assert settings["optim"]["lr"] == 1e-5
    assert ids == {known_id(run, "wandb")}
    assert not (run / "tensorboard").exists()
    said = capsys.readouterr()
    assert said.out == ""
    assert "wandb:" not in said.err


def test_mlflow_gets_what_metrics_jsonl_gets_and_a_resumed_run_continues_it(tmp_path):
    from mlflow import MlflowClient

    run = tmp_path / "run"
    options = [*OPTIONS, "--loggers", "mlflow,tensorboard"]
    assert train(run, tones(tmp_path), *options, "--max-steps", "3") == 0
    assert train(run, tones(tmp_path), *options, "--max-steps", "5") == 0
    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fastguard").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.run_id == known_id(run, "mlflow")
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "1e-05"
    steps = metrics(run, "step")
    for name, key in CURVES.items():
        points = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert points == [(s["step"], pytest.approx(float(s[key]))) for s in steps]
    assert client.get_metric_history(found.info.run_id, "epoch/wer")
    assert (run / "tensorboard").is_dir()


def test_a_server_that_is_away_costs_curves_and_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tmp_path / "run"
    assert train(run, tones(tmp_path), *OPTIONS, "--loggers", "mlflow", "--max-steps", "2") == 0
    log = (run / "train.log").read_text()
    assert log.count("WARNING - No more curves for MLflow: ") == 1
    assert len(metrics(run, "step")) == 2
    assert not (run / "mlruns").exists()


def test_without_loggers_there_are_no_curves(tmp_path):
    run = tmp_path / "run"
    assert train(run, tones(tmp_path), *OPTIONS, "--loggers", "none", "--max-steps", "1") == 0
    left = {path.name for path in run.iterdir()}
    assert not left & {"tensorboard", "wandb", "mlruns", "loggers.json"}
    assert "loggers: none\n" in (run / "config.yaml").read_text()


def test_a_run_that_fails_says_so(make):
    ends = []

    class Recorder(Tracker):
        title = "Recorder"

        def _send(self, values, step):
            raise ValueError("full")

        def _end(self, failed):
            ends.append(failed)

    made = make("--loggers", "none")
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with made.journal.writing_to(made.folder.path, made.progress):
                made.journal._trackers.append(Recorder(0))
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error
    assert ends == [False, True, True]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"wandb": 3}', '{"wandb": "../x"}', '{"wandb": "a b"}', "\0"]
)
def test_ids_that_are_none(tmp_path, content):
    (tmp_path / "loggers.json").write_text(content)
    assert known_id(tmp_path, "wandb") is None
    keep_id(tmp_path, "wandb", "abc-1")
    keep_id(tmp_path, "mlflow", "0f")
    assert (known_id(tmp_path, "wandb"), known_id(tmp_path, "mlflow")) == ("abc-1", "0f")
