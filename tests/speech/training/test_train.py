"""The trainer end to end, as its user meets it: ``python -m fastguard.train``."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.speech.cli.train import main
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.data import Data
from fastguard.speech.training.options import parse
from tests.recordings import asterisk_or_skip, tones

REPOSITORY = Path(__file__).resolve().parents[3]


def metrics(run_dir, kind):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(run_dir):
    return [float(line["loss"]) for line in metrics(run_dir, "step")]


def train(run_dir, data, *options):
    return main(
        [
            "--model",
            "baseline",
            "--data",
            data,
            "--run-dir",
            str(run_dir),
            "--batch-size",
            "2",
            *options,
        ]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_seed_gives_one_run(tmp_path, precision):
    data = tones(tmp_path)
    runs = {}
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        assert (
            train(
                tmp_path / name,
                data,
                "--stable",
                "--precision",
                precision,
                "--seed",
                seed,
                "--epochs",
                "2",
            )
            == 0
        )
        runs[name] = losses(tmp_path / name)
    assert len(runs["first"]) == 4
    assert all(map(math.isfinite, runs["first"]))
    assert runs["first"] == runs["again"]
    assert runs["first"] != runs["other"]


def test_what_a_run_leaves_behind(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert (
        train(run_dir, tones(tmp_path), "--stable", "--max-steps", "3", "--precision", "fp32") == 0
    )
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "last.pt",
        "best.pt",
        "averaged.pt",
        "checkpoints",
        "tensorboard",
        "hypotheses.jsonl",
        "alignments.txt",
        "rates.json",
        "left_out.jsonl",
        "changed_labels.jsonl",
    }
    steps, epochs = metrics(run_dir, "step"), metrics(run_dir, "epoch")
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert [s["epoch"] for s in steps] == [1, 1, 2]
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert all(s["verdict"] in ("apply", "clip") for s in steps)
    log = (run_dir / "train.log").read_text()
    assert f"Batch 0: loss={steps[0]['loss']:.2f}, grad_norm={steps[0]['grad_norm']:.2f}" in log
    assert f"Epoch 1: loss={epochs[0]['loss']:.3f}, grad_norm={epochs[0]['grad_norm']:.2f}" in log
    assert "stable start" in log
    assert log in capsys.readouterr().err
    assert parse(["--config", str(run_dir / "config.yaml")]).max_steps == 3
    state = checkpoint.load(run_dir / "last.pt")
    assert state["step"] == 3
    assert state["tokenizer"]["symbols"][0] == "<blank>"


@pytest.mark.parametrize(
    "kind, size, bound", [("bpe", "5000", "pieces"), ("unigram", "3", "alone need")]
)
def test_a_vocabulary_that_the_texts_do_not_give(kind, size, bound, tmp_path, capsys):
    options = ["--tokenizer.kind", kind, "--tokenizer.vocab_size", size]
    assert train(tmp_path / "run", tones(tmp_path), *options) == 1
    error = capsys.readouterr().err
    assert f"ERROR - no tokenizer of kind {kind}: vocab_size is {size}" in error
    assert bound in error


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious")
    assert train(tmp_path, "synthetic") == 2
    assert "choose another --run-dir" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_a_run_folder_that_can_not_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(tmp_path / "file" / "run", "synthetic") == 2
    assert "cannot write the run folder" in capsys.readouterr().err


def test_a_corpus_that_is_not_there(tmp_path, capsys):
    assert train(tmp_path / "run", f"manifest:{tmp_path}/absent.jsonl") == 1
    error = capsys.readouterr().err
    assert "ERROR - the manifest" in error
    assert "Traceback" not in error


def poison(monkeypatch, bad_ids):
    """Features of these utterances turn NaN on the way into the model, as from a corrupt file."""
    build = Data.train_loader

    def loader(self, parallel):
        sampler, batches = build(self, parallel)
        collate = batches.collate_fn

        def corrupt(items):
            batch = collate(items)
            for i, utterance in enumerate(batch.ids):
                if utterance in bad_ids:
                    batch.features[i, 3] = math.nan
            return batch

        batches.collate_fn = corrupt
        return sampler, batches

    monkeypatch.setattr(Data, "train_loader", loader)


def test_a_corrupt_batch_is_skipped_and_named_and_the_model_survives(tmp_path, monkeypatch):
    poison(monkeypatch, {"tone2.wav"})
    run_dir = tmp_path / "run"
    assert train(run_dir, tones(tmp_path), "--stable", "--precision", "fp32", "--epochs", "2") == 0
    skipped = [s for s in metrics(run_dir, "step") if s["verdict"] == "skip_nonfinite"]
    assert len(skipped) == 2
    for step in skipped:
        assert "tone2.wav" in step["skipped_utterances"]
        assert "head.weight" in step["nonfinite_parameters"]
        assert math.isnan(float(step["grad_norm"]))
    for number in (step["step"] - 1 for step in skipped):  # metrics count from 1
        found = json.loads((run_dir / f"bad_step_{number:06d}.json").read_text())
        assert "tone2.wav" in found["batch_id"]
        assert "head.weight" in found["norms"]
    assert [e["skipped"] for e in metrics(run_dir, "epoch")] == [1, 1]
    assert all(math.isfinite(float(e["loss"])) for e in metrics(run_dir, "epoch"))
    assert "WARNING - Infinite gradient, skipping batch" in (run_dir / "train.log").read_text()
    model = checkpoint.load(run_dir / "last.pt")["model"]
    assert all(v.isfinite().all() for v in model.values())  # BatchNorm's statistics too


def test_without_the_guard_the_same_batch_destroys_the_model(tmp_path, monkeypatch):
    poison(monkeypatch, {"tone2.wav"})
    run_dir = tmp_path / "run"
    assert train(run_dir, tones(tmp_path), "--precision", "fp32", "--epochs", "1") == 1
    log = (run_dir / "train.log").read_text()
    assert "WARNING - Large gradient norm: nan at batch" in log
    assert "No checkpoint at step 2, training continues" in log
    assert "ERROR - Finished at step 2, but not all could be written" in log.splitlines()[-1]
    assert not (run_dir / "last.pt").exists()


def test_an_explosion_that_does_not_end_ends_the_run_with_advice(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {f"tone{i}.wav" for i in range(4)})
    run_dir = tmp_path / "run"
    assert (
        train(run_dir, tones(tmp_path), "--stable", "--precision", "fp32", "--guard.patience", "2")
        == 1
    )
    error = capsys.readouterr().err
    for part in ("ERROR - 2 steps in a row were skipped", "tone", "what to try:"):
        assert part in error
    assert "Traceback" not in error
    assert checkpoint.load(run_dir / "last.pt")["step"] == 2
    assert len(metrics(run_dir, "step")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_after_the_step_with_a_checkpoint(tmp_path, number):
    """They reach the whole process group, as from a terminal or a scheduler."""
    run_dir = tmp_path / "run"
    options = """--model baseline --stable --epochs 10000 --precision fp32 --num-workers 1
        --batch-size 1"""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastguard.train", *options.split(),
         "--data", tones(tmp_path), "--run-dir", str(run_dir)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )  # fmt: skip
    before = []
    for line in process.stderr:
        before.append(line)
        if line.startswith("Batch"):
            os.killpg(process.pid, number)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert f"run folder: {run_dir}\n" in before
    assert "Stopping after this step" in rest
    assert "Traceback" not in rest
    assert checkpoint.load(run_dir / "last.pt")["step"] == metrics(run_dir, "step")[-1]["step"]


def test_fp16_scales_the_loss_and_trains(tmp_path):
    run_dir = tmp_path / "run"
    assert (
        train(
            run_dir,
            tones(tmp_path, 4),
            "--stable",
            "--precision",
            "fp16",
            "--max-steps",
            "1",
            "--batch-size",
            "1",
        )
        == 0
    )
    assert checkpoint.load(run_dir / "last.pt")["scaler"]["scale"] > 0
    assert math.isfinite(losses(run_dir)[0])


def test_the_stable_teacher_trains_on_recorded_speech(tmp_path):
    asterisk_or_skip()
    run_dir = tmp_path / "run"
    assert (
        main(["--stable", "--data", "asterisk", "--max-steps", "40", "--run-dir", str(run_dir)])
        == 0
    )
    values = losses(run_dir)
    assert len(values) == 40
    assert all(map(math.isfinite, values))
    assert not all(s["verdict"].startswith("skip") for s in metrics(run_dir, "step"))
    assert sum(values[-10:]) < sum(values[:10])
    assert 0 < metrics(run_dir, "epoch")[-1]["wer"] <= 1.5


def test_the_baseline_learns_eight_recorded_prompts_by_heart(trained_run):
    assert metrics(trained_run, "epoch")[-1]["cer"] < 0.2


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(tmp_path):
    """Per output frame: at most the log of the vocabulary, minus what the alignments add up to."""
    run_dir = tmp_path / "run"
    assert (
        train(run_dir, tones(tmp_path), "--stable", "--precision", "fp32", "--max-steps", "1") == 0
    )
    symbols = len(checkpoint.load(run_dir / "last.pt")["tokenizer"]["symbols"])
    step = metrics(run_dir, "step")[0]
    assert 0 < step["loss"] < math.log(symbols) + 0.1
    assert step["grad_norm"] > 0


def test_a_student_learns_from_a_teacher_on_the_synthetic_corpus(tmp_path):
    options = ["--data", "synthetic", "--guarded", "--precision", "fp32", "--max-steps", "2"]
    teacher, student, alone = (tmp_path / name for name in ("teacher", "student", "alone"))
    assert main(["--model", "teacher", "--run-dir", str(teacher), *options]) == 0
    baseline = ["--model", "baseline", *options]
    assert main([*baseline, "--run-dir", str(alone)]) == 0
    learns = ["--teacher", str(teacher), "--distill.weight", "0.25"]
    assert main([*baseline, *learns, "--run-dir", str(student)]) == 0
    # Before they have learnt anything the two agree: the distance adds next to nothing.
    assert losses(student)[0] == pytest.approx(0.75 * losses(alone)[0], rel=0.05)
    assert math.isfinite(losses(student)[1])
