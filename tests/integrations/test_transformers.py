"""What GuardCallback does in transformers' Trainer besides the steps of test_matrix.py."""

import math

import pytest
import transformers

from fastguard import GradientExplosionError
from fastguard.integrations.transformers import GuardCallback
from fastguard.ops import Verdict

from .runs import (
    MAX_NORM,
    OPTIMIZERS,
    SKIP_NORM,
    Run,
    batches,
    differences,
    grad_scaler,
    state_of,
    transformers_trainer,
)

ADAMW = OPTIMIZERS["fastguard.AdamW"]


def guarded(data, folder="unused", optimizer=ADAMW, scaler=None, patience=25, **options):
    trainer = transformers_trainer(optimizer, "fp32", data, scaler, folder, **options)
    callback = GuardCallback(trainer, skip_norm=SKIP_NORM, patience=patience)
    trainer.add_callback(callback)
    return trainer, callback


def everything(trainer, callback):
    optimizer = trainer.optimizer.optimizer
    last_epoch = trainer.lr_scheduler.last_epoch
    return Run(trainer.model, optimizer, callback.guard, last_epoch).everything()


class Heard(transformers.TrainerCallback):
    """As the integrations of the Trainer's loggers, which come before added callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_what_it_logs():
    data = batches(6, {3: "NaN input"})
    trainer = transformers_trainer(ADAMW, "fp32", data, logging_strategy="steps", logging_steps=2)
    before, after = Heard(), Heard()
    trainer.add_callback(before)
    trainer.add_callback(GuardCallback(trainer))
    trainer.add_callback(after)
    trainer.train()
    for logs in (before.logs, after.logs):
        assert [step for step, values in logs if "loss" in values] == [2, 4, 6]
        of_guard = {step: values for step, values in logs if "guard/verdict" in values}
        assert [*of_guard] == [2, 4, 6]
        assert of_guard[4]["guard/verdict"] == Verdict.SKIP_NONFINITE
        assert math.isnan(of_guard[4]["guard/grad_norm"])
        assert [values["guard/skipped_steps"] for values in of_guard.values()] == [0, 1, 0]
    kept = [entry for entry in trainer.state.log_history if "guard/verdict" in entry]
    assert [entry["step"] for entry in kept] == [2, 4, 6]


def test_a_step_that_was_skipped_is_one_for_the_trainer():
    class Steps(transformers.TrainerCallback):
        skipped = ()

        def on_step_end(self, args, state, control, **kwargs):
            self.skipped = (*self.skipped, trainer.accelerator.optimizer_step_was_skipped)

    trainer, _ = guarded(batches(4, {1: "NaN input"}))
    steps = Steps()
    trainer.add_callback(steps)
    trainer.train()
    assert steps.skipped == (False, True, False, False)
    assert trainer.lr_scheduler.last_epoch == 3
    assert trainer.state.global_step == 4


def test_the_trainers_clipping_does_not_spread_a_nan_before_the_guard_looks(caplog):
    """Its own would, with max_grad_norm and without: both ask for the norm by clipping."""
    for max_grad_norm in (MAX_NORM, 0.0):
        trainer, callback = guarded(batches(3), max_grad_norm=max_grad_norm)
        weight = trainer.model.net[3].weight
        weight.register_hook(lambda grad: grad * math.nan)
        trainer.train()
        assert callback.guard.last_report.nonfinite == ("net.3.weight",)


def test_the_trainers_norm_is_the_guards():
    trainer, callback = guarded(batches(3), max_grad_norm=0.25)
    trainer.train()
    assert callback.guard.max_norm == 0.25
    assert callback.guard.last_report.verdict is Verdict.CLIP
    trainer, callback = guarded(batches(3), max_grad_norm=0.0)
    trainer.train()
    assert callback.guard.max_norm == math.inf


def test_accelerates_clipping_is_back_after_the_training():
    trainer, _ = guarded(batches(2))
    trainer.train()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_max_norm_is_the_trainers_setting():
    trainer, _ = guarded(batches(2))
    with pytest.raises(TypeError, match=r"TrainingArguments\(max_grad_norm=0\.5\)"):
        GuardCallback(trainer, max_norm=0.5)


@pytest.mark.parametrize("optimizer", ["fastguard.AdamW", "torch.AdamW"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_checkpoint_goes_on_exactly_with_the_guard(tmp_path, optimizer, scaled):
    def training(epochs):
        return guarded(
            batches(6, {1: "NaN input", 4: "NaN gradient"}),
            str(tmp_path),
            OPTIMIZERS[optimizer],
            grad_scaler() if scaled else None,
            num_train_epochs=epochs,
            save_strategy="steps",
            save_steps=3,
        )

    straight = training(epochs=2)
    straight[0].train()
    resumed = training(epochs=2)
    resumed[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed[0].state.global_step == straight[0].state.global_step == 12
    assert differences(everything(*resumed), everything(*straight)) == []
    assert state_of(resumed[1].guard) == state_of(straight[1].guard)


def test_accumulated_batches_are_one_step():
    trainer, callback = guarded(batches(8, {3: "NaN input"}), gradient_accumulation_steps=2)
    trainer.train()
    data = batches(8)
    expected = guarded([*data[:2], *data[4:]], gradient_accumulation_steps=2)
    expected[0].train()
    assert differences(everything(trainer, callback), everything(*expected)) == []


def test_a_trainer_trains_again():
    trainer, callback = guarded(batches(3, {1: "Inf"}))
    trainer.train()
    first = callback.guard
    trainer.train()
    assert callback.guard is first
    assert callback.guard.state_dict()["steps"] == 6


def test_patience_ends_the_training_with_the_guards_error():
    trainer, _ = guarded(batches(4, {1: "NaN input", 2: "NaN input"}), patience=2)
    with pytest.raises(GradientExplosionError, match="of step 2"):
        trainer.train()
