"""The guard in loops of Hugging Face accelerate.

::

    from fastguard.integrations.accelerate import attach_guard

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    guard = attach_guard(accelerator, model, optimizer, max_norm=0.5, skip_norm=10.0)

The loop stays as it is, without ``accelerator.clip_grad_norm_``: that would clip before the guard
sees the gradients, and a NaN in one of them makes all of them NaN there.
"""

from torch import nn

from fastguard import GradGuard
from fastguard._extras import require
from fastguard.guard.update import link_of, unwrapped

from ._logged import logged

require("accelerate", "integrations")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402


def attach_guard(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, **settings
) -> GradGuard:
    """Make ``optimizer.step()`` the guarded step of an accelerate loop.

    What accelerate does around a step stays: before the last micro-batch of
    ``accelerator.accumulate`` nothing happens, and a GradScaler's scale becomes part of the guard's
    coefficient. A step that the guard skips is a skipped step for accelerate too:
    ``optimizer.step_was_skipped`` and ``accelerator.optimizer_step_was_skipped`` are true, and a
    prepared scheduler does not step. Reading these two waits for the device.

    If trackers were initialised (``accelerator.init_trackers``), ``guard/verdict``,
    ``guard/grad_norm`` and ``guard/clip_coef`` of every step are logged with ``accelerator.log``
    under the guard's count of steps. ``accelerator.save_state`` and ``load_state`` save and load
    the guard's state with the optimizer's.

    Args:
        accelerator: the one that prepared ``optimizer``.
        model: as ``accelerator.prepare`` returned it.
        optimizer: as ``accelerator.prepare`` returned it.
        settings: keyword arguments of :class:`fastguard.GradGuard`.

    Returns:
        The guard. Its ``last_report`` describes the last step.

    Raises:
        TypeError: ``optimizer`` was not prepared, or is one of DeepSpeed or Megatron.
        ValueError: ``optimizer`` has a guard already; or as :class:`fastguard.GradGuard` and
            :meth:`fastguard.GradGuard.attach`.
    """
    guard = attach_to_prepared(model, optimizer, settings)
    optimizer._log_to = accelerator
    return guard


def attach_to_prepared(model: nn.Module, optimizer: AcceleratedOptimizer, settings: dict):
    """:func:`attach_guard` without a log."""
    if getattr(optimizer, "guard", None) is not None:
        raise ValueError(
            "this optimizer has a guard already, which attach_guard returned: use it, or call its "
            "detach() first"
        )
    if type(optimizer) not in (AcceleratedOptimizer, _Guarded):
        raise TypeError(
            "the guard attaches to the optimizer that accelerator.prepare returned, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}. (Those of DeepSpeed and "
            "Megatron step inside their engines, where the guard cannot see the gradients.)"
        )
    guard = GradGuard(model, **settings)
    guard.attach(optimizer)
    optimizer.__class__ = _Guarded
    optimizer._log_to = None
    return guard


class _Guarded(AcceleratedOptimizer):
    """An AcceleratedOptimizer around an attached optimizer."""

    @property
    def guard(self) -> GradGuard | None:
        link = link_of(unwrapped(self))
        return None if link is None else link.guard

    def step(self, closure=None):
        super().step(closure)
        logs = self._log_to is not None and self._log_to.trackers
        if logs and self.guard is not None and self.gradient_state.sync_gradients:
            for report in self.guard.poll():  # what is known by now, without a sync
                self._log_to.log(logged(report), step=report.step)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, by the guard or by a GradScaler."""
        report = None if self.guard is None else self.guard.last_report
        return self._is_overflow or (report is not None and report.skipped)
