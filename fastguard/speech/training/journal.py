"""What a run writes down as it trains: metrics.jsonl, curves for loggers and lines of the log."""

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from fastguard.guard.report import PendingReport, StepReport
from fastguard.speech.data.readers import Rejected

from .config import Config
from .metrics import EpochMetrics, MetricsFile, StepMetrics, epoch_table
from .outlook import Outlook, clock
from .progress import Progress
from .run_folder import RunFolder
from .tracking import Tracker, open_trackers

logger = logging.getLogger(__name__)

_NORMS_EVERY = 50  # steps between curves of each parameter's norm


class Journal:
    """Records each step and each epoch. Only the process that writes opens files.

    Args:
        config: the settings, for the lines of the log and the estimate of the end.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._outlook = Outlook(config)
        self._logged_epoch: int | None = None  # of the last line about a step
        self._metrics: MetricsFile | None = None
        self._trackers: list[Tracker] = []

    @contextlib.contextmanager
    def writing_to(self, folder: Path, progress: Progress):
        """Append to the files of a run's folder, after what belongs to ``progress``."""
        with contextlib.ExitStack() as stack:
            metrics = MetricsFile(folder / "metrics.jsonl", progress.step, len(progress.epochs))
            self._metrics = stack.enter_context(contextlib.closing(metrics))
            self._trackers = open_trackers(folder, self._config, progress)
            failed = True
            try:
                yield
                failed = False
            finally:
                for tracker in self._trackers:
                    tracker.close(failed)

    def write(self, metrics: StepMetrics | EpochMetrics) -> None:
        """Write metrics into the files that are open."""
        for sink in filter(None, (self._metrics, *self._trackers)):
            sink.write(metrics)

    def step(
        self,
        progress: Progress,
        number: int,
        loss: float,
        report: StepReport | PendingReport,
        *,
        lr: float,
        seconds: float,
        ids: Sequence[str],
        rejected: Sequence[Rejected],
        batches: int,
    ) -> None:
        """Record an optimizer step.

        metrics.jsonl and the curves get each step. The log gets the first step of an epoch and of a
        resumed run, each ``log_every``-th and the last one, and each step that the guard skipped or
        whose norm is not finite.

        Args:
            progress: the run's, this step included; its totals take the step.
            number: of the step's first batch in the epoch.
            loss: mean over the processes.
            report: what the guard did.
            lr: learning rate.
            seconds: wall time of the step, loading included.
            ids: of the step's utterances.
            rejected: rows that could not be used.
            batches: of the epoch.
        """
        metrics = StepMetrics(
            progress.step,
            progress.epoch,
            number,
            loss,
            report.total_norm,
            report.clip_coef,
            report.verdict.name.lower(),
            lr,
            seconds,
            tuple(ids) if report.skipped else (),
            report.nonfinite,
            report.loss_scale,
            report.scale_search,
            tuple(row.id for row in rejected),
        )
        progress.totals.add(metrics)
        self.write(metrics)
        due = progress.step % _NORMS_EVERY == 0 and isinstance(report, PendingReport)
        if due and self._trackers:
            norms = report.norms()
            for tracker in self._trackers:
                tracker.write_norms(norms, progress.step)
        self._outlook.step_took(seconds)
        self._log_step(progress, metrics, batches)

    def _log_step(self, progress: Progress, metrics: StepMetrics, batches: int) -> None:
        total = self._outlook.total_steps(progress, batches)
        if not (
            metrics.epoch != self._logged_epoch
            or metrics.step % self._config.log_every == 0
            or metrics.step == total
            or metrics.verdict.startswith("skip")
            or not math.isfinite(metrics.grad_norm)
        ):
            return
        self._logged_epoch = metrics.epoch
        logger.info(
            "Batch %d: loss=%.2f, grad_norm=%.2f, verdict=%s, lr=%.3g, epoch=%d/%d, step=%d/%d, "
            "seconds=%.2f, eta=%s",
            metrics.batch,
            metrics.loss,
            metrics.grad_norm,
            "scale_search" if metrics.scale_search else metrics.verdict,
            metrics.lr,
            metrics.epoch,
            self._outlook.epochs,
            metrics.step,
            total,
            metrics.seconds,
            clock(self._outlook.seconds_left(progress, batches)),
        )

    def epoch(self, ended: EpochMetrics, evaluation_seconds: float) -> None:
        """Record an epoch, whose evaluation took ``evaluation_seconds``."""
        self.write(ended)
        self._outlook.evaluation_took(evaluation_seconds)
        logger.info(
            "Epoch %d: loss=%.3f, grad_norm=%.2f, wer=%.3f, cer=%.3f on %s, skipped=%d/%d, %.0f s "
            "(%s)",
            ended.epoch,
            ended.loss,
            ended.grad_norm,
            ended.wer,
            ended.cer,
            ended.split,
            ended.skipped,
            ended.steps,
            ended.seconds,
            ended.status,
        )

    def end(self, progress: Progress, folder: RunFolder, stopped: bool) -> None:
        """Log the table of epochs, how the run ended, and how it can be continued."""
        epochs = [*progress.epochs, *filter(None, [progress.unfinished])]
        logger.info("\n%s", epoch_table(epochs))
        how = "Stopped" if stopped else "Finished"
        if folder.unsaved:
            reasons = "; ".join(f"no {what}: {reason}" for what, reason in folder.unsaved.items())
            logger.error(
                "%s at step %d, but not all could be written (%s); %s",
                how,
                progress.step,
                reasons,
                folder.way_on(),
            )
        elif stopped:
            logger.info("Stopped at step %d; %s", progress.step, folder.way_on())
        else:
            logger.info("Finished at step %d; results are in %s", progress.step, folder.path)
