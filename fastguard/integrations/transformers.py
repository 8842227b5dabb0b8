"""The guard in the Trainer of Hugging Face transformers.

::

    from fastguard.integrations.transformers import GuardCallback

    trainer = Trainer(model, TrainingArguments("out", max_grad_norm=0.5), train_dataset=data)
    trainer.add_callback(GuardCallback(trainer, skip_norm=10.0))
"""

import math

from fastguard import GradGuard
from fastguard._extras import require

from ._logged import logged
from .accelerate import attach_to_prepared

require("transformers", "integrations")

from transformers import Trainer, TrainerCallback  # noqa: E402


class GuardCallback(TrainerCallback):
    """Makes the Trainer's ``optimizer.step()`` the guarded step.

    The guard clips at ``TrainingArguments.max_grad_norm`` (0: it does not clip) in place of the
    Trainer, whose own clipping would turn one NaN into a NaN in every gradient before the guard
    sees them. A skipped step does not advance the learning rate scheduler. ``state.global_step``
    counts it, as the Trainer counts the steps that a GradScaler skips.

    With each of its logs of the loss the Trainer logs ``guard/verdict``, ``guard/grad_norm`` and
    ``guard/clip_coef`` of the last step, and ``guard/skipped_steps`` since the last log. The
    guard's state is part of the optimizer's state in the Trainer's checkpoints, and
    ``trainer.train(resume_from_checkpoint=...)`` goes on with it.

    Args:
        trainer: the one that this callback is added to.
        settings: keyword arguments of :class:`fastguard.GradGuard`, without ``max_norm``.

    Attributes:
        guard: the guard of the last training, None before the first.

    Raises:
        TypeError: ``max_norm`` is among the settings. At the start of a training: the optimizer is
            one of DeepSpeed or Megatron.
        ValueError: at the start of a training, as :class:`fastguard.GradGuard` and
            :meth:`fastguard.GradGuard.attach`.
    """

    def __init__(self, trainer: Trainer, **settings):
        if "max_norm" in settings:
            raise TypeError(
                f"max_norm={settings['max_norm']} is the Trainer's own setting: give it as "
                f"TrainingArguments(max_grad_norm={settings['max_norm']})"
            )
        self.trainer = trainer
        self.settings = settings
        self.guard: GradGuard | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.guard is None or getattr(optimizer, "guard", None) is not self.guard:
            settings = {"max_norm": args.max_grad_norm or math.inf, **self.settings}
            self.guard = attach_to_prepared(model, optimizer, settings)
        # The Trainer calls it before each step, also to learn the norm without clipping.
        self.trainer.accelerator.clip_grad_norm_ = _leave_to_the_guard

    def on_train_end(self, args, state, control, **kwargs):
        vars(self.trainer.accelerator).pop("clip_grad_norm_", None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.guard.describe(batch_id=f"of step {state.global_step + 1}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or self.guard is None or self.guard.last_report is None:
            return
        skipped = sum(report.skipped for report in self.guard.poll(wait=True))
        values = logged(self.guard.last_report) | {"guard/skipped_steps": float(skipped)}
        self.trainer.log(values)


def _leave_to_the_guard(parameters, max_norm, norm_type=2) -> None:
    """In the place of ``accelerator.clip_grad_norm_``."""
