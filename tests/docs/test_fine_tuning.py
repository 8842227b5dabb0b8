"""The command of the page on fine-tuning does what the page says."""

import shlex

from fastguard.speech.cli.train import main
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint
from tests.recordings import tones, write_manifest

from .blocks import find


def test_fine_tuning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tones(tmp_path)
    source = ["--model", "baseline", "--guarded", "--precision", "fp32", "--data", data]
    assert main([*source, "--epochs", "1", "--run-dir", "runs/my"]) == 0
    row = {"audio_filepath": "tone0.wav", "text": "zwölf", "split": "train"}
    write_manifest(tmp_path / "my.jsonl", [row])
    python, _, module, *options = shlex.split(find("fine-tune").code)
    assert (python, module) == ("python", "fastguard.train")
    assert main([*options, "--precision", "fp32", "--max-steps", "3"]) == 0
    tuned = Recognizer.load(tmp_path / "runs" / "tuned" / "best.pt")
    assert tuned.config.model == "baseline"
    assert (tuned.config.epochs, tuned.config.freeze_encoder) == (30, 2)
    assert "ö" in tuned.tokenizer.symbols
    assert tuned.config.init_from == tmp_path / "runs" / "my"
    last = checkpoint.load(tmp_path / "runs" / "tuned" / "last.pt")
    assert (last["epoch"], last["step"]) == (3, 3)
    log = capsys.readouterr().err
    assert "the rows of 29 of the head's 30 symbols are taken, new are ö;" in log
