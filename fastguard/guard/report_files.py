"""Log lines and JSON files of bad steps, and the error that ends a run."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from fastguard._io.files import write_text
from fastguard.ops import LARGEST_APPLIED, Verdict

from .report import PendingReport, StepReport, shorten, strict_json

logger = logging.getLogger(__name__)

_MAX_FILES = 100  # per guard: a run that skips every other batch must not fill the disk


class GradientExplosionError(RuntimeError):
    """The guard's patience is spent: too many steps were skipped.

    Args:
        reports: of the last skipped steps.
        skip_norm: the guard's.
        what: how many were skipped of how many, in words, as
            :class:`fastguard.guard.accounting.Spent` has it.
        poisoned: parameters, and entries of the optimizer's state, that are NaN or Inf by now.
    """

    def __init__(
        self,
        reports: Sequence[StepReport],
        skip_norm: float,
        what: str,
        poisoned: Sequence[str] = (),
    ):
        self.reports = list(reports)
        self.skip_norm = skip_norm
        self.what = what
        self.poisoned = list(poisoned)
        super().__init__(_explosion(self.reports, skip_norm, what, self.poisoned))

    def __reduce__(self):  # by default pickle rebuilds an exception from its message alone
        return type(self), (self.reports, self.skip_norm, self.what, self.poisoned)


def _explosion(reports: list[StepReport], skip_norm: float, what: str, poisoned: list[str]) -> str:
    """The message: the findings, their places, and suggestions."""
    # A step without a good micro-batch is replaced by its micro-batches.
    causes = (r.skipped_micro_batches if r.all_micro_batches_skipped else (r,) for r in reports)
    evidence = [each for group in causes for each in group]
    overflowed = [r for r in evidence if _overflowed(r)]
    bad = [r for r in evidence if r.nonfinite_parameters and not _overflowed(r)]
    finite = [r for r in evidence if not r.nonfinite_parameters]
    large = [r for r in finite if not _bad_loss(r)]
    losses = [r for r in finite if _bad_loss(r)]
    parts = [
        *([_of_poisoned(poisoned)] if poisoned else []),
        *([_of_overflows(overflowed)] if overflowed else []),
        *([_of_nonfinite(bad, losses)] if bad or losses else []),
        *([_of_large(large, skip_norm)] if large else []),
    ]
    seen, suggestions = zip(*parts, strict=True) if parts else ((), ())
    nonfinite = next((r.nonfinite for r in evidence if r.nonfinite_parameters), ())
    # The first outlier's list: later usual norms include those of the outliers.
    risen = next((r.most_risen for r in large if r.most_risen), ())
    rose = f"  parameters that rose most: {shorten(risen)}\n" if risen else ""
    return (
        f"{what}: {'; '.join(seen)}.\n"
        f"  batches: {shorten(r.batch for r in evidence)}\n"
        f"  parameters that were non-finite first: {shorten(nonfinite) or 'none'}\n{rose}"
        f"  what to try: {'; '.join(suggestions)}."
    )


def _of_poisoned(poisoned: list[str]) -> tuple[str, str]:
    """The finding and the suggestion, as in the functions below."""
    return f"NaN or Inf is in {shorten(poisoned)}", (
        "load an earlier state of the model and its optimizer: no batch can be good with these, "
        "and no skipped step wrote them"
    )


def _of_overflows(reports: list[StepReport]) -> tuple[str, str]:
    places = dict.fromkeys(r.first_nonfinite for r in reports)
    scales = dict.fromkeys(
        "unknown" if r.loss_scale is None else f"{r.loss_scale:g}" for r in reports
    )
    seen = (
        f"{len(reports)} had an Inf gradient, first at {shorten(places)}, while no loss is known "
        f"to be bad, under a GradScaler at scale {shorten(scales)}"
    )
    return seen, (
        "gradients overflow though the scaler lowers its scale: run in bf16 or fp32, or look for "
        "what makes them so large; lower the learning rate"
    )


def _of_nonfinite(bad: list[StepReport], losses: list[StepReport]) -> tuple[str, str]:
    seen = []
    if bad:
        places = dict.fromkeys(
            f"{r.first_nonfinite} ({r.nonfinite_parameters[0].kind})" for r in bad
        )
        seen.append(f"{len(bad)} had a NaN or Inf gradient, first at {shorten(places)}")
    if losses:
        seen.append(f"{len(losses)} had a loss of {shorten({str(r.loss): None for r in losses})}")
    return "; ".join(seen), (
        "look for corrupt or silent inputs and for targets longer than their inputs in these "
        "batches; run in fp32; lower the learning rate; restart from a checkpoint older than the "
        "first of them"
    )


def _of_large(reports: list[StepReport], skip_norm: float) -> tuple[str, str]:
    norms = shorten(f"{r.total_norm:.3g}" for r in reports)
    limit, suggestion = _limit_of(reports[0], skip_norm)
    seen = f"{len(reports)} had a norm above {limit} ({norms})"
    return seen, f"{suggestion}; lower the learning rate"


class BadStepFiles:
    """One JSON file per bad step, ``bad_step_<number>.json``, in a folder that may be absent yet.

    A GradScaler's search for its scale is no bad step.

    A file holds the report, the batch's id, the ranges of finite parameters, the norm of every
    parameter, and the statistics of the attentions that record them. At most 100 files are written.
    A file that cannot be written is a warning, and the run continues.
    """

    def __init__(self, folder: str | Path | None):
        self._folder = None if folder is None else Path(folder)
        self._left = _MAX_FILES

    def write(self, report: PendingReport, skip_norm: float) -> None:
        if self._folder is None or self._left == 0:
            return
        self._left -= 1
        content = report.result().to_dict()
        content["verdict"] = report.verdict.name.lower()
        content["skip_norm"] = skip_norm
        found = report.nonfinite_parameters
        for values, each in zip(content["nonfinite_parameters"], found, strict=True):
            values["kind"] = each.kind
        content["norms"] = report.norms()
        content["attention"] = report.attention()
        path = self._folder / f"bad_step_{report.step:06d}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(strict_json(content), indent=1) + "\n")
        except (OSError, TypeError, ValueError) as error:
            logger.warning("No report on step %d: %s", report.step, error)
        if self._left == 0:
            logger.warning("%d bad steps were written to %s; no more", _MAX_FILES, self._folder)


def log_skip(report: StepReport, skip_norm: float) -> None:
    """Log a warning about a skipped step, in the wording of the trainer's logs."""
    if report.verdict is Verdict.SKIP_OUTLIER:
        logger.warning(
            "Large gradient norm: %.4g at batch %s, skipping (%s)%s",
            report.total_norm,
            report.batch,
            _limit_of(report, skip_norm)[0],
            f"; risen most: {shorten(report.most_risen, 3)}" if report.most_risen else "",
        )
    elif report.scale_search:
        logger.warning(
            "Gradient overflow at %s, skipping batch %s: the scaler is searching for its scale, %s",
            "a GradScaler's unknown scale"
            if report.loss_scale is None
            else f"GradScaler scale {report.loss_scale:g}",
            report.batch,
            "the loss was not given" if report.loss is None else f"the loss is {report.loss:.4g}",
        )
    elif report.all_micro_batches_skipped:
        logger.warning(
            "All %d micro-batches were bad, skipping batch %s", report.micro_batches, report.batch
        )
    elif report.verdict is Verdict.SKIP_ROLLBACK:
        logger.warning("Skipping batch %s after the rollback", report.batch)
    elif _bad_loss(report) and not report.nonfinite_parameters:
        logger.warning("Infinite loss, skipping batch %s (loss %s)", report.batch, report.loss)
    else:
        logger.warning(
            "Infinite gradient, skipping batch %s (norm %s, first at %s)",
            report.batch,
            report.total_norm,
            report.first_nonfinite or _why_no_parameter_is_nonfinite(report),
        )


def _limit_of(report: StepReport, skip_norm: float) -> tuple[str, str]:
    """The limit that a finite norm was above, and the suggestion."""
    if report.total_norm > report.outlier_above:
        limit = f"skip_norm={skip_norm:g}"
        if report.outlier_above > skip_norm:
            median = "4 times the median of the last norms"
            limit = f"{report.outlier_above:.3g}, {median} (and {limit})"
        return limit, (
            "raise skip_norm or set it to inf, so that large finite gradients are clipped; a "
            "patience above 64 waits until a norm that stays has become ordinary"
        )
    if math.isinf(report.total_norm):
        return "1.8e308 in the sum of its squares", "look for what makes gradients so large"
    return f"{LARGEST_APPLIED:g}, what fp32 moments can hold", "set a finite max_norm"


def _why_no_parameter_is_nonfinite(report: StepReport) -> str:
    if math.isnan(report.total_norm):
        return "none: found by GradScaler.unscale_, perhaps on another rank"
    if math.isfinite(report.total_norm):
        return "none: another rank's loss is not finite, or it passes over this batch"
    return "none: the sum of the squares overflows"


def _overflowed(report: StepReport) -> bool:
    """Whether gradients overflowed under a GradScaler, at any scale, without a known bad loss."""
    if report.scale_search:
        return True
    if report.loss_scale is None or not any(each.infs for each in report.nonfinite_parameters):
        return False
    return report.loss is None or math.isfinite(report.loss)


def _bad_loss(report: StepReport) -> bool:
    return (
        report.verdict is Verdict.SKIP_NONFINITE
        and math.isfinite(report.total_norm)
        and report.loss is not None
    )
