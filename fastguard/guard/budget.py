"""How many steps a run may skip before it ends: a guard that skips for ever is a failure."""

import operator
from collections import deque
from typing import NamedTuple

from fastguard.ops import Verdict

from .report import StepReport
from .scale_search import Searches

#: The window whose share of skips is looked at, as a multiple of ``patience``.
SHARE_WINDOW = 8


class Spent(NamedTuple):
    """Why the budget is spent."""

    #: In words, with the steps' numbers.
    what: str
    #: The first skip of those that spent it. What is older was before the explosion.
    since: int
    #: The last skips, at most ``patience``.
    reports: tuple[StepReport, ...]


class Budget:
    """``patience`` skips in a row spend it, or more than half of the last 8 x ``patience`` steps.

    The second catches a run that skips, say, nine steps of ten: never 25 in a row, and yet it does
    not train.
    """

    def __init__(self, patience: int):
        self.patience = operator.index(patience)
        #: Of the last steps: the number of a step that was skipped, -1 of one that was taken.
        self._steps: deque[int] = deque(maxlen=SHARE_WINDOW * self.patience)
        self._skips: deque[StepReport] = deque(maxlen=self.patience)
        self._searches = Searches()
        self.in_a_row = 0
        self.spent: Spent | None = None

    def clear(self) -> None:
        """Begin anew, but for the searches of a GradScaler that were free."""
        self._steps.clear()
        self._skips.clear()
        self.in_a_row, self.spent = 0, None

    def account(self, report: StepReport) -> bool:
        """Take in the next step; ``spent`` says why, if it was one skip too many.

        Returns:
            Whether the step counts. A skip that does not is as if its step had not been.
        """
        if not report.skipped:
            self.in_a_row = 0
            self._steps.append(-1)
            return True
        if not self._spends(report):
            return False
        self.in_a_row += 1
        self._steps.append(report.step)
        self._skips.append(report)
        self.spent = self._why()
        return True

    def _spends(self, report: StepReport) -> bool:
        """Whether a skip uses up the budget. It is asked once for each."""
        if report.verdict is Verdict.SKIP_ROLLBACK:
            return False
        return not (report.scale_search and self._searches.is_free(report.step))

    def _why(self) -> Spent | None:
        reports = tuple(self._skips)
        if self.in_a_row >= self.patience:
            what = f"{len(reports)} steps in a row were skipped, steps {_span(reports)}"
            return Spent(what, reports[0].step, reports)
        skipped = [step for step in self._steps if step >= 0]
        if len(skipped) <= SHARE_WINDOW * self.patience // 2:
            return None
        what = (
            f"{len(skipped)} of the last {len(self._steps)} steps were skipped, more than half of "
            f"{SHARE_WINDOW} x patience={self.patience}, though never {self.patience} in a row; of "
            f"the last {len(reports)}, steps {_span(reports)}"
        )
        return Spent(what, skipped[0], reports)

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        return {
            "steps": list(self._steps),
            # A tuple, which torch.distributed.checkpoint saves as one: of a list of dicts it would
            # ask a fresh guard, which has none, for each by its place.
            "skips": tuple(report.to_dict() for report in self._skips),
            "in_a_row": self.in_a_row,
            "searches": self._searches.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises what a dict that is no such state makes it raise; nothing is changed then."""
        steps = list(map(operator.index, state["steps"]))
        skips = list(map(StepReport.from_dict, state["skips"]))
        in_a_row = operator.index(state["in_a_row"])
        searches = Searches(state["searches"])
        if in_a_row < 0 or min(steps, default=0) < -1:
            raise ValueError(f"numbers of steps are negative: {in_a_row}, {steps}")
        self.clear()
        self._steps.extend(steps)
        self._skips.extend(skips)
        self.in_a_row, self._searches = in_a_row, searches


def _span(reports: tuple[StepReport, ...]) -> str:
    return f"{reports[0].step} to {reports[-1].step}"
