"""The command: planted faults in recordings, texts and weights, and real recordings in peace."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from fastguard import GradGuard, stable_init_
from fastguard.diagnose.weight_rules import excessive_rate, grown_parameters
from fastguard.speech.cli.diagnose import main, utterances_of
from fastguard.speech.cli.train import main as train
from fastguard.speech.data.corpora import read_rows
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.recognition.recognizer import untrained_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.options import parse
from tests.recordings import tones, write_manifest


def save(path, data, *options, change=None):
    """A checkpoint as the trainer writes it before its first step."""
    config = parse(["--data", data, *options])
    tokenizer = CharTokenizer.from_texts(["ab"])
    torch.manual_seed(config.seed)
    model = untrained_model(config, tokenizer.vocab_size)
    stable_init_(model, config.init.linear_std, config.init.conv_scale)
    if change is not None:
        with torch.no_grad():
            change(model)
    state = {
        "model": model.state_dict(),
        "tokenizer": tokenizer.to_dict(),
        "config": config.to_dict(),
    }
    torch.save(state, path)  # checkpoint.save refuses weights that are not finite
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """Tones of which one has an Inf in its samples, and one a text that it has no frames for."""
    data = tones(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "tones.jsonl").read_text().splitlines()]
    samples, rate = soundfile.read(tmp_path / "tone0.wav", dtype="float32")
    samples[100] = np.inf
    soundfile.write(tmp_path / "inf.wav", samples, rate, subtype="FLOAT")
    rows.insert(1, {"audio_filepath": "inf.wav", "text": "ab", "split": "train"})
    soundfile.write(tmp_path / "a, b [c].wav", samples[200:], rate)
    rows.append({"audio_filepath": "a, b [c].wav", "text": "ab " * 20, "split": "train"})
    write_manifest(tmp_path / "tones.jsonl", rows)
    return data


def test_an_inf_in_the_audio(corpus, tmp_path, capsys):
    path = save(tmp_path / "last.pt", corpus, "--model", "baseline", "--precision", "fp32")
    assert main([path, "--utterances", "tone1.wav", "inf.wav"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Verdict: bad input at inf.wav: ")
    assert "\nbatch [tone1.wav, inf.wav]\n\nlayer " in out
    assert "Verdict: bad input at inf.wav: 1 of 16000 samples are NaN or Inf.\n  Change: " in out
    assert "poisoned weight" not in out


def test_an_infeasible_target_from_the_report_of_a_bad_step(corpus, tmp_path, capsys):
    path = save(tmp_path / "last.pt", corpus, "--model", "baseline", "--precision", "fp32")
    long = "a, b [c].wav"
    toy = nn.Linear(1, 1)
    guard = GradGuard(toy, 1.0, patience=5, report_dir=tmp_path)
    (toy(torch.ones(1)) * math.nan).backward()
    guard.step(torch.optim.SGD(toy.parameters(), lr=0.1), batch_id=f"3 [tone1.wav, {long}]")
    guard.poll(wait=True)
    report = tmp_path / "bad_step_000000.json"
    written = tmp_path / "out.json"
    assert main([str(tmp_path), "--report", str(report), "--json", str(written)]) == 0
    out = capsys.readouterr().out
    assert f"Verdict: infeasible target at {long}: the target needs 59 frames" in out
    assert "undefined loss" not in out
    (batch,) = json.loads(written.read_text())
    assert batch["utterances"] == ["tone1.wav", long]
    assert batch["loss"] == "inf"
    assert batch["findings"][0]["evidence"]["available"] == 25
    assert path


def test_fp16_overflow(corpus, tmp_path, capsys):
    def change(model):
        model.blocks[0].feed_forward1.up.weight.mul_(1e9)

    path = save(tmp_path / "last.pt", corpus, "--stable", change=change)
    assert main([path, "--utterances", "tone1.wav", "--precision", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "Verdict: weight growth at blocks.0.feed_forward1.up.weight: " in out
    assert "Also overflow at blocks.0.feed_forward1.up: fp16 overflow:" in out
    assert "--precision bf16" in out


def test_poisoned_weights(corpus, tmp_path, capsys):
    def change(model):
        model.layers[3].norm.running_var[7] = math.nan

    path = save(tmp_path / "last.pt", corpus, "--model", "baseline", change=change)
    assert main([path, "--utterances", "tone1.wav"]) == 0
    assert "Verdict: poisoned weight at layers.3.norm.running_var" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "name", "alone"),
    [
        ("baseline", [], "layers.3.conv", True),
        ("baseline", ["--stable"], "head", False),
        ("teacher", ["--stable"], "blocks.2.attention.out_proj", True),
        ("teacher", [], "blocks.9.feed_forward2.down", False),
    ],
)
def test_one_weight_that_is_ten_thousand_times_too_large(
    corpus, tmp_path, capsys, model, options, name, alone
):
    def change(model):
        weight = model.get_submodule(name).weight
        (weight.view(-1)[weight.abs().argmax()] if alone else weight).mul_(1e4)

    path = save(tmp_path / "last.pt", corpus, "--model", model, *options, change=change)
    assert main([path, "--utterances", "tone1.wav"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Verdict: weight growth at {name}.weight: its ")
    assert "its element" in out if alone else "its root mean square is" in out


@pytest.mark.parametrize("model", ["baseline", "teacher"])
@pytest.mark.parametrize("options", [[], ["--stable"], ["--guarded"]])
def test_each_weight_of_the_models_is_watched(model, options):
    config = parse(["--data", "synthetic", "--model", model, *options])
    made = untrained_model(config, 30)
    stable_init_(made, config.init.linear_std, config.init.conv_scale)
    assert grown_parameters(made) == []
    assert [*excessive_rate(made, config.optim.lr)] == []
    assert [finding.kind for finding in excessive_rate(made, 0.1)] == ["learning rate"]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1e4)
    watched = {name for name, _ in made.named_parameters() if not name.endswith("bias")}
    assert {grown.name for grown in grown_parameters(made)} == watched


@pytest.mark.parametrize(("rate", "guard"), [("3", False), ("1e20", True), ("1e20", False)])
def test_a_learning_rate_that_is_too_large(rate, guard, tmp_path, capsys):
    options = ["--model", "baseline", "--data", tones(tmp_path), "--epochs", "1"]
    options += ["--batch-size", "2"]
    options += ["--run-dir", str(tmp_path / "run"), "--optim.lr", rate]
    train([*options, "--guard.enabled", str(guard).lower()])
    kept = (tmp_path / "run" / "last.pt").exists()
    assert kept == (guard or rate == "3")  # the weights are NaN otherwise
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == (0 if kept else 1)
    said = capsys.readouterr()
    found = f"learning rate at optim.lr: {float(rate):.3g} is too large: Adam moves a weight by "
    if kept:
        assert said.out.startswith(f"Verdict: {found}")
        assert "Also weight growth at " in said.out
        assert " eps " not in said.out.split("Note: ")[0]
    else:
        assert said.err.startswith(f"error: {tmp_path / 'run'} has no checkpoint. {found}")
        assert said.err.endswith("or a checkpoint from before\n")
        assert said.err.count("\n") == 1
        assert "\\u" not in said.err


def test_a_run_without_a_checkpoint_whose_rate_is_good(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(parse(["--data", "synthetic"]).to_yaml())
    assert main([str(tmp_path)]) == 1
    assert "has no checkpoint: give a .pt file" in capsys.readouterr().err


def real_prompts():
    try:
        rows, _ = read_rows("asterisk")
    except CorpusError as error:
        pytest.skip(f"asterisk packages are absent: {error}")
    lengths = {row.id: soundfile.info(row.audio).duration for row in rows[:80]}
    return [name for name, seconds in lengths.items() if 1.0 < seconds < 1.6]


@pytest.mark.parametrize("stable", [[], ["--stable"]])
@pytest.mark.parametrize("model", ["baseline", "teacher"])
def test_nothing_is_wrong_at_initialisation_on_recorded_speech(model, stable, tmp_path, capsys):
    ids = real_prompts()[:2]
    path = save(tmp_path / "last.pt", "asterisk", "--model", model, *stable)
    written = tmp_path / "out.json"
    assert main([path, "--utterances", *ids, "--json", str(written)]) == 0
    out = capsys.readouterr().out
    assert "Verdict: nothing wrong." in out
    (batch,) = json.loads(written.read_text())
    assert batch["findings"] == []
    assert batch["healthy"]
    rows = {row["name"]: row for row in batch["layers"]}
    assert rows["head"]["gain"] > 0
    assert rows["subsampling.norm1"]["min_variance"] > 0
    if model == "teacher":
        assert rows["blocks.11.attention"]["max_logit"] is not None
        gains = [rows[f"blocks.{i}"]["gain"] for i in range(12)]
        # SiLU of a unit normal has a deviation of 0.56, which the first block's LayerNorm undoes.
        assert gains[0] == pytest.approx(1 / 0.56, rel=0.2)
        assert gains[1:] == pytest.approx([1] * 11, abs=0.05)


def test_batches_of_the_corpus_and_the_first_with_a_fault_is_shown(corpus, tmp_path, capsys):
    path = save(tmp_path / "last.pt", corpus, "--model", "baseline", "--batch-size", "1")
    assert main([path, "--batches", "2"]) == 0
    out = capsys.readouterr().out
    batches = [line for line in out.splitlines() if line.startswith("batch [")]
    assert batches == ["batch [inf.wav]", "batch [tone0.wav]"]
    assert out.count("Verdict: nothing wrong") == 1
    assert out.index("Verdict: bad input") == 0
    assert out.index("Verdict: nothing wrong") < out.index("The layers in batch [inf.wav]:\nlayer ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.pt"], 1, "nowhere.pt"),
        (["--utterances", "missing.wav"], 1, "missing.wav"),
        (["--data", "asterisk:/nowhere"], 1, "not found"),
        (["--report", "nowhere.json"], 1, "nowhere.json"),
        (["--batches", "0"], 2, "--batches"),
        (["--batches", "1", "--utterances", "a"], 2, "not allowed"),
    ],
)
def test_what_can_not_be_diagnosed(corpus, tmp_path, capsys, arguments, status, message):
    if not arguments[0].endswith(".pt"):
        arguments = [save(tmp_path / "last.pt", corpus, "--model", "baseline"), *arguments]
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_recording_that_can_not_be_read_is_named(corpus, tmp_path, capsys):
    (tmp_path / "tone1.wav").write_bytes(b"no audio")
    path = save(tmp_path / "last.pt", corpus, "--model", "baseline")
    assert main([path, "--utterances", "tone1.wav"]) == 1
    assert "utterance tone1.wav cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch_id", "quarantined", "ids"),
    [
        ("3 [a, b]", [], ["a", "b"]),
        ("3 [a, b, c]", [], ["a, b", "c"]),
        ("3 [x, [y], z]", [], ["x", "[y]", "z"]),
        ("3 [a]", ["4 [b]", "5 [c]"], ["b", "c"]),
    ],
)
def test_ids_of_a_report(tmp_path, batch_id, quarantined, ids):
    known = {"a", "b", "c", "[y]"} | ({"a, b"} if "c" in batch_id else set())
    content = {"batch_id": batch_id, "quarantined": [{"batch_id": text} for text in quarantined]}
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert utterances_of(tmp_path / "report.json", known) == ids


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"batch_id": null, "quarantined": []}', '{"quarantined": 3}']
)
def test_what_is_no_report(corpus, tmp_path, capsys, text):
    path = save(tmp_path / "last.pt", corpus, "--model", "baseline")
    (tmp_path / "report.json").write_text(text)
    assert main([path, "--report", str(tmp_path / "report.json")]) == 1
    assert "report.json" in capsys.readouterr().err


def test_a_foreign_checkpoint(tmp_path, capsys):
    torch.save({"weights": 1}, tmp_path / "last.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "last.pt")
    assert main([str(tmp_path / "last.pt")]) == 1
    assert "every checkpoint of fastguard" in capsys.readouterr().err
