"""The commands of the page on export do what the page says."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.speech.cli import export
from fastguard.speech.training.config import Config
from tests.recordings import tones

from .blocks import ROOT, find

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")


def test_export(tmp_path, monkeypatch, capsys):
    from tests.speech.cli.test_onnx_client import LETTERS, small, write_sounds, write_untrained

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
    Path("runs", "my").mkdir(parents=True)
    data = tones(tmp_path)
    config = Config(model="baseline", data=data, run_dir=Path("runs", "my"))
    write_untrained(Path("runs", "my", "best.pt"), config, LETTERS)
    write_sounds(tmp_path, 16_000, 3.0)[0].rename("speech.wav")
    exported, client = (shlex.split(line) for line in find("export").code.splitlines())
    assert exported[:3] == ["python", "-m", "fastguard.export"]
    assert export.main([*exported[3:], "--wer-loss", "100"]) == 0  # it was never trained
    lines = capsys.readouterr().out.splitlines()
    assert "utterances of 2 words" in lines[3]
    described = json.loads(Path("exported", "model.json").read_text("utf-8"))
    found = sorted(path.name for path in Path("exported").iterdir())
    assert found == sorted(["model.json", *described["files"]])
    assert client[:2] == ["python", "examples/onnx_client.py"]
    command = [sys.executable, ROOT / client[1], *client[2:]]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert len(text.split()) > 3
