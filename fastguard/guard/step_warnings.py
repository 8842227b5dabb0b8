"""Warnings about steps that are no error but are probably not intended; once for each guard.

They need no host-device sync: the host knows which parameters have gradients, and the reports hold
the clip coefficients.
"""

import logging
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastguard.thresholds import Kind, Threshold

from .report import StepReport, shorten

logger = logging.getLogger(__name__)

#: The number of steps in which a parameter has a gradient and no optimizer holds it, before the
#: warning. Fewer such steps are normal at the start of a loop with several optimizers, as of a GAN.
_UNHELD_STEPS = 20
#: The number of last applied steps that the check of clipping reads, and the least number it needs.
_CLIP_WINDOW, _CLIP_STEPS = 128, 64
_CLIPPED_BELOW = 0.01


class StepWarnings:
    """Looks at each step, and logs three warnings at most.

    - No watched parameter had a gradient, and the optimizer was stepped.
    - In 20 steps a watched parameter had a gradient, and no optimizer that the guard ever stepped
      holds it: the gradient is part of the norm, and is neither applied nor, most likely, cleared.
    - More than half of the last 128 applied steps (of at least 64) were clipped below 1 %.
    """

    def __init__(self):
        self._logged: set[str] = set()
        self._held: set[str] = set()  # names of the parameters that an optimizer held
        #: Names of the other parameters -> the number of steps in which each had a gradient.
        self._unheld: dict[str, int] = {}
        #: Clip coefficient and norm of the last applied steps.
        self._clipped: deque[tuple[float, float]] = deque(maxlen=_CLIP_WINDOW)

    def saw_optimizers(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Take in the watched parameters and the optimizers, after either changed."""
        ids = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        self._held |= {n for n, p in zip(names, parameters, strict=True) if id(p) in ids}
        self._unheld = {n: self._unheld.get(n, 0) for n in names if n not in self._held}

    def saw_gradients(self, step: int, names: Iterable[str]) -> None:
        """Take in the names of the parameters that had a gradient on this rank in a step."""
        if not names:
            self._log(
                "no gradients",
                "No watched parameter had a gradient at step %d, so the step changed nothing. Call "
                "the step after loss.backward() and before zero_grad(); check that GradGuard was "
                "given the model that computes the loss, and that its parameters require gradients",
                step,
            )
        if not self._unheld or "unheld" in self._logged:
            return
        unheld = [name for name in names if name in self._unheld]
        for name in unheld:
            self._unheld[name] += 1
        if unheld and max(map(self._unheld.get, unheld)) >= _UNHELD_STEPS:
            self._log(
                "unheld",
                "No optimizer that this guard steps holds %s: the gradients of %d parameters are "
                "part of the norm, are not applied, and grow where nothing clears them. Pass all "
                "optimizers in one call, guard.step([one, two]); or give GradGuard only the "
                "parameters that its optimizer holds; or call requires_grad_(False) on the others",
                shorten(unheld),
                len(unheld),
            )

    def saw_report(self, report: StepReport, threshold: Threshold) -> None:
        """Take in the next report, with the threshold of the guard."""
        if report.skipped or "clipped" in self._logged:
            return
        self._clipped.append((report.clip_coef, report.total_norm))
        if report.clip_coef >= _CLIPPED_BELOW:
            return
        below = sum(coef < _CLIPPED_BELOW for coef, _ in self._clipped)
        if len(self._clipped) < _CLIP_STEPS or 2 * below <= len(self._clipped):
            return
        coefs, norms = zip(*self._clipped, strict=True)
        per_parameter = threshold.kind is Kind.ADAGC
        self._log(
            "clipped",
            "%d of the last %d steps were clipped below 1 %%: %s, the median norm is %.3g, the "
            "median coefficient%s %.2g. %s",
            below,
            len(coefs),
            f"the threshold is {threshold!r}"
            + ("" if per_parameter else f", {report.max_norm:.3g} now"),
            statistics.median(norms),
            " of the parameter that is clipped most" if per_parameter else "",
            statistics.median(coefs),
            _suggestion(threshold),
        )

    def _log(self, key: str, text: str, *args: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.warning(text, *args)


def _suggestion(threshold: Threshold) -> str:
    if threshold.kind is Kind.FIXED:
        return (
            "max_norm is far below the ordinary norm: raise it, or lower the learning rate if the "
            "norms have grown"
        )
    return (
        "It was learnt from smaller norms than those of now, or max_norm is far below them: raise "
        "max_norm; if the norms have grown for good, begin with a new GradGuard, or with "
        "thresholds.RunningMedian, whose level is that of the last 128 accepted steps"
    )
