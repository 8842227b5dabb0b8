"""What is said of bad steps: log lines, a JSON file each, and the error that ends a run."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from fastguard._io.files import write_text
from fastguard.ops import LARGEST_APPLIED, Verdict

from .report import PendingReport, StepReport, shorten, strict_json

logger = logging.getLogger(__name__)

_MAX_FILES = 100  # of one guard: a run that skips every other batch must not fill the disk


class GradientExplosionError(RuntimeError):
    """The guard's patience is spent: too many steps were skipped.

    Args:
        reports: of the last skipped steps.
        skip_norm: the guard's.
        what: how many were skipped of how many, as :class:`fastguard.guard.budget.Spent` says it.
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
        # Of a step without a good micro-batch, what was wrong with these.
        evidence = [e for r in reports for e in (r.quarantined if r.all_quarantined else (r,))]
        overflowed = [r for r in evidence if _overflowed(r)]
        bad = [r for r in evidence if r.offenders and not _overflowed(r)]
        large = [r for r in evidence if not r.offenders and not _bad_loss(r)]
        losses = [r for r in evidence if not r.offenders and _bad_loss(r)]
        seen, cures = [], []
        if poisoned:
            seen.append(f"NaN or Inf is in {shorten(poisoned)}")
            cures.append(
                "load an earlier state of the model and its optimizer: no batch can be good with "
                "these, and no skipped step wrote them"
            )
        if overflowed:
            places = dict.fromkeys(r.first_nonfinite for r in overflowed)
            scales = dict.fromkeys(
                "unknown" if r.loss_scale is None else f"{r.loss_scale:g}" for r in overflowed
            )
            seen.append(
                f"{len(overflowed)} had an Inf gradient, first at {shorten(places)}, while no "
                f"loss is known to be bad, under a GradScaler at scale {shorten(scales)}"
            )
            cures.append(
                "gradients overflow though the scaler lowers its scale: run in bf16 or fp32, or "
                "look for what makes them so large; lower the learning rate"
            )
        if bad:
            places = dict.fromkeys(f"{r.first_nonfinite} ({r.offenders[0].kind})" for r in bad)
            seen.append(f"{len(bad)} had a NaN or Inf gradient, first at {shorten(places)}")
        if losses:
            seen.append(
                f"{len(losses)} had a loss of {shorten({str(r.loss): None for r in losses})}"
            )
        if bad or losses:
            cures.append(
                "look for corrupt or silent inputs and for targets longer than their inputs in "
                "these batches; run in fp32; lower the learning rate; restart from a checkpoint "
                "older than the first of them"
            )
        if large:
            norms = shorten(f"{r.total_norm:.3g}" for r in large)
            limit, cure = _limit_of(large[0], skip_norm)
            seen.append(f"{len(large)} had a norm above {limit} ({norms})")
            cures.append(f"{cure}; lower the learning rate")
        first = [r for r in evidence if r.offenders]
        # Of the first of these: the usual norms of later ones are those of the outliers, too.
        risen = next((r.most_risen for r in large if r.most_risen), ())
        rose = f"  parameters that rose most: {shorten(risen)}\n" if risen else ""
        super().__init__(
            f"{what}: {'; '.join(seen)}.\n"
            f"  batches: {shorten(r.batch for r in evidence)}\n"
            f"  parameters that were non-finite first: "
            f"{shorten(first[0].nonfinite) if first else 'none'}\n{rose}"
            f"  what to try: {'; '.join(cures)}."
        )

    def __reduce__(self):  # exceptions are pickled by their message, and rebuilt from it
        return type(self), (self.reports, self.skip_norm, self.what, self.poisoned)


class BadStepFiles:
    """One JSON file per bad step, ``bad_step_<number>.json``, in a folder that may be absent yet.

    A GradScaler's search for its scale is none.

    It holds the report, the batch's id, the bracket, the norm of every parameter, and the logits of
    the attentions that record them. At most 100 are written; a folder that can not be written costs
    a warning, not the run.
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
        for offender, found in zip(content["offenders"], report.offenders, strict=True):
            offender["kind"] = found.kind
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
    """A warning in the words of the trainer's logs."""
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
    elif report.all_quarantined:
        logger.warning(
            "All %d micro-batches were bad, skipping batch %s", report.micro_batches, report.batch
        )
    elif report.verdict is Verdict.SKIP_ROLLBACK:
        logger.warning("Skipping batch %s after the rollback", report.batch)
    elif _bad_loss(report) and not report.offenders:
        logger.warning("Infinite loss, skipping batch %s (loss %s)", report.batch, report.loss)
    else:
        logger.warning(
            "Infinite gradient, skipping batch %s (norm %s, first at %s)",
            report.batch,
            report.total_norm,
            report.first_nonfinite or _why_without_offenders(report),
        )


def _limit_of(report: StepReport, skip_norm: float) -> tuple[str, str]:
    """What a finite norm was above, and the cure."""
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


def _why_without_offenders(report: StepReport) -> str:
    if math.isnan(report.total_norm):
        return "none: found by GradScaler.unscale_, perhaps on another rank"
    if math.isfinite(report.total_norm):
        return "none: another rank's loss is not finite, or it passes over this batch"
    return "none: the sum of the squares overflows"


def _overflowed(report: StepReport) -> bool:
    """Whether gradients overflowed under a GradScaler, at any scale, with no bad loss known."""
    if report.scale_search:
        return True
    if report.loss_scale is None or not any(offender.infs for offender in report.offenders):
        return False
    return report.loss is None or math.isfinite(report.loss)


def _bad_loss(report: StepReport) -> bool:
    return (
        report.verdict is Verdict.SKIP_NONFINITE
        and math.isfinite(report.total_norm)
        and report.loss is not None
    )
