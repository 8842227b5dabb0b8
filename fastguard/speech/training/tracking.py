"""Curves for TensorBoard: ``tensorboard --logdir runs``."""

import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from .metrics import EpochMetrics, StepMetrics

logger = logging.getLogger(__name__)


class Curves:
    """Writes what a run measures; a full disk costs the curves, not the run.

    Args:
        folder: for the event files.
        step: the last one of a run that is resumed; what was written after it is hidden.
        skips: the skipped steps up to there.
    """

    def __init__(self, folder: Path, step: int, skips: int):
        self._skips = skips
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def write(self, metrics: StepMetrics | EpochMetrics) -> None:
        if isinstance(metrics, StepMetrics):
            self._skips += metrics.verdict.startswith("skip")
            values = {
                "train/loss": metrics.loss,
                "train/norm_before_clip": metrics.grad_norm,
                "train/norm_after_clip": metrics.grad_norm * metrics.clip_coef,
                "train/clip_coef": metrics.clip_coef,
                "train/skips": self._skips,
                "train/lr": metrics.lr,
                "train/seconds_per_step": metrics.seconds,
            }
        else:
            values = {
                "epoch/loss": metrics.loss,
                "epoch/wer": metrics.wer,
                "epoch/cer": metrics.cer,
                "epoch/skipped": metrics.skipped,
                "epoch/seconds": metrics.seconds,
            }
        self._add(values, metrics.step)

    def write_norms(self, norms: dict[str, float], step: int) -> None:
        """The gradient norm of each parameter."""
        self._add({f"norms/{name}": norm for name, norm in norms.items()}, step)

    def _add(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        logger.warning("No more curves for TensorBoard: %s", error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:  # it writes behind the run's back, and tells of it late
            self._give_up(error)
