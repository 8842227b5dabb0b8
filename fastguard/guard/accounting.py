"""The host's reaction to the reports of steps: budget of skips, warnings, files, callbacks.

Where a GPU decides, the reports reach the host late. The host takes them in order, each once.
"""

import copy
import operator
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastguard.ops import Verdict
from fastguard.optim.checks import poisoned
from fastguard.thresholds import Threshold

from .grad_scaler import Searches
from .lr_scheduler import GuardedScheduler
from .report import PendingReport, StepReport
from .report_files import BadStepFiles, GradientExplosionError, log_skip
from .rollback import RateFactor, Rollback, Snapshots
from .step_warnings import StepWarnings


class Accounting:
    """Takes the reports of a guard in order: counts skips, logs them, writes files, adds callbacks.

    Args:
        patience, on_skip, report_dir: the arguments of :class:`fastguard.GradGuard`.
    """

    def __init__(
        self,
        patience: int,
        on_skip: Callable[[StepReport], object] | None,
        report_dir: str | Path | None,
    ):
        self.budget = Budget(patience)
        self.on_skip = OnSkip(on_skip)
        self.warnings = StepWarnings()
        self.schedulers: list[GuardedScheduler] = []
        self._files = BadStepFiles(report_dir)
        self._pending: deque[PendingReport] = deque()
        self._reports: deque[StepReport] = deque(maxlen=1000)

    def add(self, report: PendingReport) -> None:
        self._pending.append(report)

    def __len__(self) -> int:
        """The number of reports that are not accounted for yet."""
        return len(self._pending)

    @property
    def next_is_ready(self) -> bool:
        return bool(self._pending) and self._pending[0].ready

    def take(self, threshold: Threshold, skip_norm: float) -> StepReport:
        """Account for the oldest pending report. This is a host-device sync if it is not ready.

        Args:
            threshold, skip_norm: the settings of the guard, for warnings.
        """
        pending = self._pending.popleft()
        report = pending.result()
        self._reports.append(report)
        self.warnings.saw_report(report, threshold)
        left_out = report.skipped_micro_batches
        for skipped in (*left_out, *([report] if report.skipped else [])):
            log_skip(skipped, skip_norm)
            self.on_skip.add(skipped)
        if report.skipped:
            for scheduler in self.schedulers:
                scheduler.owe()
        counts = self.budget.account(report)
        if counts and (report.skipped or not all(each.scale_search for each in left_out)):
            self._files.write(pending, skip_norm)
        return report

    def taken(self) -> list[StepReport]:
        """The reports that were taken since the last call, at most the last 1000."""
        reports = list(self._reports)
        self._reports.clear()
        return reports

    def clear(self) -> None:
        """Drop the reports that are pending, not returned, or not given to the callback yet."""
        self._pending.clear()
        self._reports.clear()
        self.on_skip.clear()

    def without_schedulers(self) -> "Accounting":
        """A copy for a copy of the guard. The schedulers stay with the original."""
        other = copy.copy(self)
        other.on_skip, other.schedulers = copy.copy(self.on_skip), []
        return other


class Following:
    """The part of :class:`fastguard.GradGuard` that reads reports, and rolls back or raises.

    Args:
        rollback, on_patience: the arguments of GradGuard.
    """

    def __init__(self, rollback: Rollback, on_patience: str):
        self._rollback = rollback
        self._snapshots = Snapshots(rollback) if on_patience == "rollback" else None
        self._rate = RateFactor(rollback)
        self._batches_to_skip = 0
        self._discarded: int | None = None  # the last step that was discarded after a rollback

    def poll(self, wait: bool = False) -> list[StepReport]:
        """Read the reports of earlier steps: warn, write files, roll back or raise.

        Every :meth:`step` does this too. It waits only if more than ``max_lag`` reports are under
        way. Call it with ``wait=True`` at the end of a training: then the last steps count too.

        Returns:
            The reports since the last call, in order; at most the last 1000.

        Raises:
            GradientExplosionError: the ``patience`` is spent, and there is no copy for a rollback.
        """
        self._heed(wait)
        return self._accounting.taken()

    def _heed(self, wait: bool = False) -> None:
        """Account for the reports that are ready, call the callbacks, roll back or raise."""
        self._learn(wait)
        self._accounting.on_skip.tell()
        if (spent := self._accounting.budget.spent) is not None:
            self._act(spent)
            self._accounting.on_skip.tell()  # skips among the steps that were undone

    def _learn(self, wait: bool = False) -> None:
        """Account for the reports that are ready, until the patience is spent."""
        accounting = self._accounting
        while accounting and accounting.budget.spent is None:
            if not (wait or len(accounting) > self.max_lag or self._may_look_early()):
                break
            report = accounting.take(self.threshold, self.skip_norm)
            self._buffers.tell()
            if not report.skipped:
                self._rate.applied()

    def _may_look_early(self) -> bool:
        # On a GPU reports become ready at other times on other ranks. A rank that looked early
        # would roll back or raise some steps before the others.
        together = self._decider.ranks is not None
        on_device = self._decider.memory.statistics.numbers.device.type != "cpu"
        return self._accounting.next_is_ready and not (together and on_device)

    def _act(self, spent: "Spent") -> None:
        """Roll back or raise: the patience is spent."""
        self._accounting.budget.clear()
        if self._snapshots is not None:
            self._snapshots.forget_since(spent.since, self._stepped[0])
        if not self._snapshots:
            names = dict(zip(map(id, self._watched.parameters), self._watched.names, strict=True))
            found = poisoned(self._stepped[0], names)
            raise GradientExplosionError(spent.reports, self.skip_norm, spent.what, found)
        self._go_back()

    def _take_snapshot(self) -> None:
        # The last verdicts may still be unknown here. This does no harm: a skip changes nothing,
        # and copies from after an explosion are dropped when the explosion becomes known.
        if self._snapshots is None:
            return
        if self._discarded == self._steps - 1:
            self._snapshots.postpone(self._steps)
        if self._accounting.budget.in_a_row or not self._snapshots.due(self._steps):
            return
        own = {"memory": self._decider.memory.copy(), "buffers": self._buffers.copy()}
        self._snapshots.take(self._steps, self._watched.parameters, *self._stepped, own)

    @torch.no_grad()
    def _go_back(self) -> None:
        while self._accounting:  # report the steps after the explosion too; they are undone
            self._learn(wait=True)
            self._accounting.budget.clear()
        self._rate.back_off()
        own = self._snapshots.restore(self._steps, self.lr_factor)
        self._decider.memory, self._buffers = own["memory"], own["buffers"]
        self._buffers.restore()
        self._window = None
        self._batches_to_skip = self._rollback.skip_batches


# --- the budget of skips --------------------------------------------------------------------------

#: The number of steps whose share of skips is limited, as a multiple of ``patience``.
SHARE_WINDOW = 8


class Spent(NamedTuple):
    """The reason why the budget is spent."""

    #: The reason in words, with the numbers of the steps.
    what: str
    #: The step of the first skip that counts. Earlier states are from before the explosion.
    since: int
    #: The last skips, at most ``patience``.
    reports: tuple[StepReport, ...]


class Budget:
    """Allows less than ``patience`` skips in a row, and half of the last 8 x ``patience`` steps.

    The second limit catches a run that skips nine steps of ten: it never skips 25 in a row, but it
    does not train.
    """

    def __init__(self, patience: int):
        self.patience = operator.index(patience)
        #: One entry for each of the last steps: its number if it was skipped, else -1.
        self._steps: deque[int] = deque(maxlen=SHARE_WINDOW * self.patience)
        self._skips: deque[StepReport] = deque(maxlen=self.patience)
        self._searches = Searches()
        self.in_a_row = 0
        self.spent: Spent | None = None

    def clear(self) -> None:
        """Begin anew. The free searches of a GradScaler stay counted."""
        self._steps.clear()
        self._skips.clear()
        self.in_a_row, self.spent = 0, None

    def account(self, report: StepReport) -> bool:
        """Count the next step, and set ``spent`` if the budget is spent.

        Returns:
            Whether the step counts. A skip that does not count is ignored.
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
        """Whether a skip counts against the budget. Call this once per skip: it counts searches."""
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
        """Load what :meth:`state_dict` returned; after an error nothing is changed."""
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


# --- the callback ---------------------------------------------------------------------------------


class OnSkip:
    """Calls a callback once with each report that was added, in order.

    The guard adds reports while it accounts for them, and calls :meth:`tell` afterwards. The
    callback may therefore raise or call the guard.

    Args:
        callback: the function to call, or None.

    Raises:
        TypeError: the callback is not callable.
    """

    def __init__(self, callback: Callable[[StepReport], object] | None):
        if callback is not None and not callable(callback):
            raise TypeError(f"on_skip must be a function of a StepReport, got {callback!r}")
        self._callback = callback
        self._untold: deque[StepReport] = deque()

    def add(self, report: StepReport) -> None:
        if self._callback is not None:
            self._untold.append(report)

    def tell(self) -> None:
        """Call the callback with each report. After an exception the next call continues.

        Raises:
            Exception: any exception of the callback.
        """
        while self._untold:
            self._callback(self._untold.popleft())

    def clear(self) -> None:
        self._untold.clear()

    # A copy has no reports: the original still has to give them to the callback.

    def __copy__(self) -> "OnSkip":
        return OnSkip(self._callback)

    def __deepcopy__(self, memo: dict) -> "OnSkip":
        return OnSkip(copy.deepcopy(self._callback, memo))

    def __reduce__(self):
        name = getattr(self._callback, "__qualname__", "")
        if "<" in name:  # "<lambda>", "function.<locals>.inner"
            raise TypeError(
                f"a GradGuard with on_skip={name} cannot be pickled: pickle finds functions by "
                "their name. Give on_skip a function from the top level of a module, or a method "
                "of an object that can be pickled"
            )
        return OnSkip, (self._callback,)
