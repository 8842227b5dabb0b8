"""A newcomer with ten German recordings does what docs/speech/own-recordings.md says."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from fastguard.speech.data.synthetic import SAMPLE_RATE, _find_espeak, _speak

from .blocks import ROOT, find

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TEXTS = (
    "Guten Morgen",
    "Wie geht es dir",
    "Schönes Wetter heute",
    "Der Zug fährt um zehn Uhr",
    "Ich möchte ein Brötchen",
    "Bitte schließen Sie die Tür",
    "Die Straße ist nass",
    "Morgen gehen wir schwimmen",
    "Das Buch liegt auf dem Tisch",
    "Vielen Dank und auf Wiedersehen",
)
DEV = (1, 6)  # kept for evaluation
TRAIN = [text for i, text in enumerate(TEXTS) if i not in DEV]
MORE = "Der Tisch ist heute schön"


def record(folder):
    """The recordings, the two manifests, and a long recording of TRAIN, three times, with pauses.

    my.jsonl has two rows for evaluation; more.jsonl has all for training.
    """
    library, data, *_ = _find_espeak()
    texts = [*TEXTS, MORE]
    requests = [
        {"text": text, "voice": "de", "rate": 150 + 3 * i, "pitch": 45 + i}
        for i, text in enumerate(texts)
    ]
    spoken = list(_speak(requests, folder / "requests", library, data))
    (folder / "recordings").mkdir()
    rows = []
    for i, samples in enumerate(spoken, 1):
        name = f"recordings/{i:02}.wav"
        soundfile.write(folder / name, samples, SAMPLE_RATE, subtype="PCM_16")
        rows.append({"audio_filepath": name, "text": texts[i - 1], "split": "train"})
    write(folder / "more.jsonl", rows)
    for i in DEV:
        rows[i]["split"] = "dev"
    write(folder / "my.jsonl", rows[: len(TEXTS)])
    pause = np.zeros(3 * SAMPLE_RATE // 2, np.int16)
    trained = [spoken[TEXTS.index(text)] for text in TRAIN]
    parts = [part for samples in trained for part in (samples, pause)]
    soundfile.write(folder / "long.wav", np.concatenate(parts * 3), SAMPLE_RATE)


def write(manifest, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    manifest.write_text(lines, encoding="utf-8")


def run(line, folder):
    """Standard output of one command of the page, as a user has it."""
    python, *arguments = shlex.split(line)
    assert python == "python"
    arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def words(texts):
    return " ".join(texts).lower().split()


def shared(found, expected):
    """The part of the expected words that is found in order."""
    table = np.zeros((len(found) + 1, len(expected) + 1), int)
    for i, word in enumerate(found):
        for j, other in enumerate(expected):
            best = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else best
    return table[-1, -1] / len(expected)


@pytest.mark.slow
def test_a_newcomer_with_ten_recordings(tmp_path):
    record(tmp_path)
    train, evaluate, transcribe, diagnose, report, export, client = find(
        "own-recordings"
    ).code.splitlines()
    run(train, tmp_path)
    rates = run(evaluate, tmp_path)
    assert float(re.search(r"^all +(\d\.\d+)", rates, re.MULTILINE)[1]) <= 0.1
    long_text = run(transcribe, tmp_path)
    assert shared(long_text.split(), words(TRAIN * 3)) >= 0.9
    assert run(diagnose, tmp_path).startswith("Verdict: nothing wrong")
    run(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "runs/my" in page
    assert re.search(r"epoch \d+ of 100, dev split", page)
    run(export, tmp_path)
    for program in "model.onnx", "model.int8.onnx":
        command = client.replace("model.onnx", program)
        assert run(command, tmp_path).split() == words(TEXTS[:1])

    train, transcribe = find("more-recordings").code.splitlines()
    run(train, tmp_path)
    assert shared(run(transcribe, tmp_path).split(), words([MORE])) >= 0.6
