"""A checkpoint of the trainer, read back for recognition."""

import pytest
import torch

from fastguard import checkpoint
from fastguard.config import Config
from fastguard.recognizer import Recognizer, features, network
from fastguard.speech.tokenizer import CharTokenizer


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = Config(model="baseline", run_dir=tmp_path)
    tokenizer = CharTokenizer.from_texts(["abc"])
    model = network(config, tokenizer.vocab_size).eval()
    state = {
        "model": model.state_dict(),
        "tokenizer": tokenizer.to_dict(),
        "config": config.to_dict(),
    }
    checkpoint.save(tmp_path / "last.pt", state)
    return tmp_path / "last.pt", config, model, state


def test_gives_what_the_model_gave(saved):
    path, config, model, _ = saved
    recognizer = Recognizer.load(path)
    assert recognizer.config == config
    batch = features(config)(torch.randn(8000))[None], torch.tensor([51])
    for ours, theirs in zip(recognizer(*batch), model(*batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_settings_of_earlier_versions_get_defaults_and_unknown_ones_are_named(saved):
    path, config, _, state = saved
    del state["config"]["network"]["dropout"]
    checkpoint.save(path, state)
    assert Recognizer.load(path).config == config
    state["config"]["network"]["dropuot"] = 0.1
    checkpoint.save(path, state)
    with pytest.raises(checkpoint.CheckpointError, match="dropuot"):
        Recognizer.load(path)


def test_weights_that_do_not_fit_are_refused(saved):
    path, _, _, state = saved
    state["config"]["features"]["n_mels"] = 40
    checkpoint.save(path, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)last\.pt.*subsampling"):
        Recognizer.load(path)
