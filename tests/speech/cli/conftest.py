"""What the run of several tests has learnt."""

import json

import pytest

from fastguard.speech.recognition.recognizer import Recognizer


@pytest.fixture
def prompts(trained_run):
    """Path and text of the prompts that the run has learnt."""
    manifest = (trained_run.parent / "eight.jsonl").read_text(encoding="utf-8")
    rows = map(json.loads, manifest.splitlines())
    return [(row["audio_filepath"], row["text"]) for row in rows]


@pytest.fixture
def recognizer(trained_run):
    return Recognizer.load(trained_run / "best.pt")
