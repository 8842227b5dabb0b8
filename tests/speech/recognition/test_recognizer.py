"""A checkpoint of the trainer, read back for recognition."""

import pytest
import torch

from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.recognition.recognizer import Recognizer, features, untrained_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.config import Config


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = Config(model="baseline", run_dir=tmp_path)
    tokenizer = CharTokenizer.from_texts(["abc"])
    model = untrained_model(config, tokenizer.vocab_size).eval()
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
    with torch.no_grad():  # with gradients its products may be another library's
        expected = model(*batch)
    for ours, theirs in zip(recognizer(*batch), expected, strict=True):
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


def test_settings_without_rules_for_texts_are_told_in_one_line(saved, caplog):
    path, config, _, state = saved
    Recognizer.load(path)
    assert not caplog.messages
    del state["config"]["text"]
    checkpoint.save(path, state)
    assert Recognizer.load(path).config == config
    (message,) = caplog.messages
    assert message.startswith(f"{path} was written before the settings text.*")
    assert message.endswith("language=en, numbers=keep, brackets=drop, case=lower, unicode=NFKC")
    assert "\n" not in message


def test_weights_that_do_not_fit_are_refused(saved):
    path, _, _, state = saved
    state["config"]["features"]["n_mels"] = 40
    checkpoint.save(path, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)last\.pt.*subsampling"):
        Recognizer.load(path)


def test_settings_of_a_larger_model_than_the_file_take_no_memory(saved):
    path, _, _, state = saved
    state["tokenizer"]["symbols"] += [chr(0x4E00 + i) for i in range(20_000)]
    checkpoint.save(path, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"must be torch.float32 of shape .200"):
        Recognizer.load(path)


@pytest.mark.parametrize(
    "part, value",
    [
        ("config", {"seed": 10**400}),
        ("config", {"optim": {"lr": 10**400}}),
        ("config", {"optim": 3}),
        ("config", {"model": ["teacher"]}),
        ("config", {"guard": {"enabled": 1}}),
        ("config", {3: 1}),
        ("config", {"augment": {"speeds": [None]}}),
        ("tokenizer", {"kind": []}),
        ("tokenizer", {"kind": torch.ones(2, 3)}),
        ("tokenizer", {"symbols": None}),
        ("tokenizer", {"kind": "sentencepiece", "model": "abc"}),
        ("tokenizer", {"kind": "sentencepiece", "model": torch.ones(9, dtype=torch.uint8)}),
    ],
)
def test_parts_of_other_types_are_refused_in_a_line(saved, part, value):
    path, _, _, state = saved
    checkpoint.save(path, {**state, part: value})
    with pytest.raises(checkpoint.CheckpointError, match="cannot be used by this") as caught:
        Recognizer.load(path)
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 1
