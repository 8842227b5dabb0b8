"""Which settings may differ from those of the run that --resume continues."""

import dataclasses

import pytest

from fastguard.speech.data.text import TextRules
from fastguard.speech.training.config import (
    Config,
    FeaturesConfig,
    GuardConfig,
    OptimConfig,
    TokenizerConfig,
)
from fastguard.speech.training.run_folder import RunError

from .folders import begun, state


def saved(folder, step=7, **more):
    """The folder of a run with a state of the default settings."""
    of_run = begun(folder)
    of_run.save({**state(step), **more})
    of_run.close()
    return str(folder)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": "baseline"}, "model was teacher and is baseline"),
        ({"features": FeaturesConfig(n_mels=40)}, "features.n_mels was 80 and is 40"),
        ({"text": TextRules(numbers="reject")}, "text.numbers was keep and is reject"),
        ({"tokenizer": TokenizerConfig("bpe")}, "tokenizer.kind was char and is bpe"),
        ({"guard": GuardConfig(enabled=False)}, "guard.enabled was True and is False"),
        ({"ema": 0.9}, "ema was 0.0 and is 0.9"),
        ({"precision": "fp16"}, "precision was bf16 and is fp16"),
    ],
)
def test_settings_that_the_state_depends_on_are_refused_by_name(tmp_path, changed, message):
    source = saved(tmp_path / "old")
    with pytest.raises(RunError) as caught:
        begun(tmp_path / "new", resume=source, **changed)
    assert f"was trained with other settings: {message}. Use the same" in str(caught.value)
    assert "or begin anew with its weights: --init-from" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_all_of_them_are_named_at_once(tmp_path):
    source = saved(tmp_path / "old")
    with pytest.raises(RunError, match=r"features\.n_mels was .*; model was .*; text\.numbers was"):
        begun(tmp_path / "new", resume=source, model="baseline",
              features=FeaturesConfig(n_mels=40), text=TextRules(numbers="reject"))  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"optim": OptimConfig(lr=0.5)},
        {"precision": "fp32"},
        {"data": "asterisk"},
        {"batch_size": 7},
        {"guard": GuardConfig(threshold="zclip")},
        {"tokenizer": TokenizerConfig(vocab_size=99)},  # which characters ignore
    ],
)
def test_what_a_state_does_not_depend_on_may_change(tmp_path, changed):
    source = saved(tmp_path / "old")
    assert begun(tmp_path / "new", resume=source, **changed).find_state()["step"] == 7


@pytest.mark.parametrize("changed", [{"data": "asterisk"}, {"batch_size": 7}, {"seed": 3}])
def test_inside_an_epoch_what_orders_its_batches_may_not_change(tmp_path, changed):
    source = saved(tmp_path / "old", batches=2)
    (name,) = changed
    with pytest.raises(RunError, match=f"with other settings: {name} was .* Use the same"):
        begun(tmp_path / "new", resume=source, **changed)


def test_an_encoder_is_not_freed_on_the_way(tmp_path):
    config = dataclasses.replace(Config(), init_from=tmp_path, freeze_encoder=3).to_dict()
    for epoch in (2, 3):
        source = saved(tmp_path / f"old{epoch}", config=config, epoch=epoch)
        if epoch == 2:
            with pytest.raises(RunError, match="freeze_encoder was 3 and is 0"):
                begun(tmp_path / f"new{epoch}", resume=source)
            begun(tmp_path / "same", resume=source, freeze_encoder=3)
        else:
            begun(tmp_path / f"new{epoch}", resume=source)


def test_a_run_whose_epochs_are_trained_needs_more(tmp_path):
    source = saved(tmp_path / "old", epoch=10)
    message = r"--resume .*step_000000007\.pt: 10 epochs are trained, and epochs=10, so nothing is"
    with pytest.raises(RunError, match=message):
        begun(tmp_path / "new", resume=source)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="7 steps are done, and max_steps=7, so nothing is left"):
        begun(tmp_path / "new", resume=source, epochs=11, max_steps=7)
    assert begun(tmp_path / "new", resume=source, epochs=11).find_state()["step"] == 7


@pytest.mark.parametrize("more", [{"epoch": "9"}, {"config": {"epochs": []}}, {"config": {"a": 1}}])
def test_a_state_with_other_types_is_named(tmp_path, more):
    source = saved(tmp_path / "old", **more)
    with pytest.raises(RunError, match=r"--resume .*step_000000007\.pt cannot be continued: "):
        begun(tmp_path / "new", resume=source)
