"""The callback of Lightning's Trainer, without the base class that its two packages each have."""

from torch import nn

from fastguard import GradGuard

from ._logged import logged


class GuardHooks:
    """Makes the ``step()`` of the Trainer's optimizers the guarded step.

    It serves automatic and manual optimization, ``accumulate_grad_batches`` and every precision of
    Lightning. With several optimizers each has a guard of its own parameters, and each guard
    protects the buffers of the whole LightningModule: a bad loss of one network may pass through
    the other.

    A skipped step does not advance a learning rate scheduler with ``interval="step"`` and
    ``frequency=1``; Lightning steps all others as without a guard. ``trainer.global_step`` counts a
    skipped step, as Lightning counts those that a GradScaler skips.

    ``guard/verdict``, ``guard/grad_norm`` and ``guard/clip_coef`` of each step, and
    ``guard/skipped_steps`` of each epoch, go to the Trainer's loggers; those of a second optimizer
    begin with ``guard/1/``. The guard's state is part of the optimizer's state in Lightning's
    checkpoints, and ``trainer.fit(ckpt_path=...)`` goes on with it.

    Args:
        settings: keyword arguments of :class:`fastguard.GradGuard`.

    Attributes:
        guards: a guard for each optimizer of the last ``fit``, in Lightning's order.

    Raises:
        ValueError: at the start of ``fit``: the Trainer has a ``gradient_clip_val``, which would
            clip before the guard; or as :class:`fastguard.GradGuard` and
            :meth:`fastguard.GradGuard.attach`.
    """

    def __init__(self, **settings):
        self.settings = settings
        self.guards: list[GradGuard] = []

    def setup(self, trainer, pl_module, stage):
        value = trainer.gradient_clip_val
        if value:
            raise ValueError(
                f"Trainer(gradient_clip_val={value}) clips before the guard sees the gradients, "
                "and one NaN becomes a NaN in all of them: remove it and give "
                f"GuardCallback(max_norm={value})"
            )

    def on_fit_start(self, trainer, pl_module):
        self.guards = [
            GradGuard(watched, **more, **self.settings)
            for watched, more in _watched(pl_module, trainer.optimizers)
        ]
        for guard, optimizer in zip(self.guards, trainer.optimizers, strict=True):
            guard.attach(optimizer)
            for config in trainer.lr_scheduler_configs:
                each_step = config.interval == "step" and config.frequency == 1
                if each_step and config.scheduler.optimizer is optimizer:
                    config.scheduler = guard.scheduler(config.scheduler)

    def on_train_epoch_start(self, trainer, pl_module):
        for guard in self.guards:  # a hook of the user may have written buffers since the last step
            guard.commit_buffers()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for guard in self.guards:
            guard.describe(batch_id=f"{batch_idx} of epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for i, guard in enumerate(self.guards):
            reports = guard.poll()  # of the steps that are known by now, without a sync
            for name, value in logged(reports[-1]).items() if reports else ():
                pl_module.log(_name(i, name), value, on_step=True, on_epoch=False)
            pl_module.log(
                _name(i, "guard/skipped_steps"),
                float(sum(report.skipped for report in reports)),
                **{"on_step": False, "on_epoch": True, "reduce_fx": "sum", "batch_size": 1},
            )


def _name(optimizer: int, name: str) -> str:
    return name.replace("/", f"/{optimizer}/") if optimizer else name


def _watched(module: nn.Module, optimizers: list):
    """What the guard of each optimizer is given."""
    if len(optimizers) == 1:
        return [(module, {})]
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    named = list(module.named_parameters())
    return [([(n, p) for n, p in named if id(p) in ids], {"buffers": module}) for ids in held]
