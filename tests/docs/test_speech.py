"""The Python block of docs/speech."""

import torch

from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.recognition.recognizer import untrained_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.config import Config

from .blocks import run_block


def test_streaming(tmp_path, monkeypatch):
    """With an untrained model, and silence from the microphone."""
    config, tokenizer = Config(model="baseline"), CharTokenizer.from_texts([])
    state = {
        "model": untrained_model(config, tokenizer.vocab_size).state_dict(),
        "tokenizer": tokenizer.to_dict(),
        "config": config.to_dict(),
    }
    (tmp_path / "runs" / "my").mkdir(parents=True)
    checkpoint.save(tmp_path / "runs" / "my" / "best.pt", state)
    monkeypatch.chdir(tmp_path)
    names = run_block("streaming", {"microphone": torch.zeros(3, 8_000)})
    assert names["transcriber"].seconds_read == 1.5
    assert names["final_words"] == names["words_that_may_change"] == names["last_words"] == []
