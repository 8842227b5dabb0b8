"""Settings as plain values and back."""

import pytest

from fastguard.speech.training.config import Config
from fastguard.speech.training.options import parse


def test_plain_values_and_back():
    config = parse(["--guarded", "--run-dir", "somewhere", "--teacher", "t.pt"])
    assert Config.from_dict(config.to_dict()) == config


def test_what_is_missing_gets_its_default():
    assert Config.from_dict({"optim": {"lr": 0.5}}).optim.lr == 0.5
    assert Config.from_dict({"optim": {"lr": 0.5}}).optim.betas == Config().optim.betas


def test_unknown_keys_are_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        Config.from_dict({"optim": {"learning_rate": 1}})


def test_settings_without_a_normalization_have_that_of_their_time():
    """Checkpoints of earlier versions have features without it."""
    assert Config().features.normalization == "speech"
    assert Config.from_dict({}).features.normalization == "utterance"
    assert Config.from_dict({"features": {"n_mels": 40}}).features.normalization == "utterance"
    level = {"features": {"normalization": "level"}}
    assert Config.from_dict(level).features.normalization == "level"
