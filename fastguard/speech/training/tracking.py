"""Sends the metrics of a run to the loggers that ``--loggers`` names."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import ClassVar

from torch.utils.tensorboard import SummaryWriter

from fastguard._extras import MissingExtra
from fastguard._io.failures import in_a_line

from .config import Config
from .metrics import EpochMetrics, StepMetrics
from .progress import Progress

logger = logging.getLogger(__name__)


class Tracker:
    """Gives points of curves to a logger. If it fails, curves are lost, and the run continues.

    Args:
        skips: steps that the guard skipped before the next one, of the whole run.
    """

    title: ClassVar[str]
    _failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, skips: int):
        self._skips = skips
        self._works = True

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

    def close(self, failed: bool = False) -> None:
        """Send what is buffered, and end; ``failed`` says that an error ends the run."""
        self._try(self._end, failed)

    def _add(self, values: dict[str, float], step: int) -> None:
        self._try(self._send, values, step)

    def _try(self, action, *args) -> None:
        if not self._works:
            return
        try:
            action(*args)
        except self._failures as error:
            self._works = False
            logger.warning("No more curves for %s: %s", self.title, in_a_line(error))

    def _send(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _end(self, failed: bool) -> None:
        raise NotImplementedError


class Curves(Tracker):
    """Writes event files for TensorBoard: ``tensorboard --logdir runs``.

    Args:
        folder: for the event files.
        step: the last step of a resumed run; later points in the files are hidden.
        skips: number of skipped steps up to ``step``.
    """

    title = "TensorBoard"
    _failures = (OSError,)  # it writes in a thread and raises later

    def __init__(self, folder: Path, step: int, skips: int):
        super().__init__(skips)
        self._try(self._open, folder, step)

    def _open(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def _send(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _end(self, failed: bool) -> None:
        self._writer.close()


def require_loggers(config: Config) -> None:
    """Raise MissingExtra if the package of a logger in the settings is not installed."""
    for name in config.logger_names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a mere folder of that name
            raise MissingExtra(f"the package {name} is not installed", name)


def open_trackers(folder: Path, config: Config, progress: Progress) -> list[Tracker]:
    """The trackers that the settings name, for a run in this folder after this progress."""
    trackers: list[Tracker] = []
    if "tensorboard" in config.logger_names:
        trackers.append(Curves(folder / "tensorboard", progress.step, progress.skipped))
    if "wandb" in config.logger_names:
        from .tracking_wandb import Wandb

        trackers.append(Wandb(folder, config, progress.skipped))
    if "mlflow" in config.logger_names:
        from .tracking_mlflow import MLflow

        trackers.append(MLflow(folder, config, progress.skipped))
    return trackers
