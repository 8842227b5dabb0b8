"""Writes curves for TensorBoard: ``tensorboard --logdir runs``."""

import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from .metrics import EpochMetrics, StepMetrics

logger = logging.getLogger(__name__)


class Curves:
    """Writes the metrics of a run. If the disk is full, curves are lost, and the run continues.

    Args:
        folder: for the event files.
        step: the last step of a resumed run; later points in the files are hidden.
        skips: number of skipped steps up to ``step``.
    """

    def __init__(self, folder: Path, step: int, skips: int):
        self._skips = skips
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def write(self, metrics: StepMetrics | EpochMetrics) -> None:
        """Add points of a step or an epoch."""
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
        """Add the gradient norm of each parameter."""
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
        """Write what is buffered, and close the files."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:  # it writes in a thread and raises later
            self._give_up(error)
