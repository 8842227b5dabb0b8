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
