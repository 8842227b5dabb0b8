"""Checkpoints, copies and pickles of a guard."""

import weakref

from .accounting import Budget
from .rollback import RateFactor, Snapshots
from .statistics import VERSION, Memory, of_this_version


class Restorable:
    """``state_dict`` and ``load_state_dict`` of :class:`fastguard.GradGuard`, and its copies."""

    def state_dict(self) -> dict:
        """The state that the next decision depends on, as plain numbers; waits for the device.

        Settings such as ``max_norm`` are not part of it. A window that :meth:`accumulate` has begun
        and the copies for a rollback are not part of it either: these start anew. Where processes
        train together, every rank has to call it. Any rank may save its own: all decide alike.

        ``torch.distributed.checkpoint`` takes it as an entry of its own beside model and optimizer;
        with AdaGC, whose names a fresh guard does not have, as ``json.dumps(guard.state_dict())``.
        In the state of an attached optimizer it is such a text already.
        """
        self._learn(wait=True)
        self._accounting.on_skip.tell()
        return {
            "version": VERSION,
            "steps": self._steps,
            **self._decider.memory.state_dict(self.threshold.kind),
            "budget": self._accounting.budget.state_dict(),
            "batches_to_skip": self._batches_to_skip,
            "lr_backoffs": self._rate.backoffs,
            "lr_growth_tracker": self._rate.tracker,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load the result of :meth:`state_dict`.

        An older fastguard kept only the accepted norms. Its state loads as that of a guard that saw
        no other norms.

        Raises:
            ValueError: this is no state of a GradGuard, or a newer fastguard wrote it. Nothing was
                changed then.
        """
        try:
            state = of_this_version(state)
            device = self._decider.memory.statistics.numbers.device
            renamed = self._watched.by_current_names
            memory = Memory.from_state(state, device, self.threshold.kind, renamed)
            steps, to_skip = int(state["steps"]), int(state["batches_to_skip"])
            rate = RateFactor(
                self._rollback,
                int(state.get("lr_backoffs", 0)),
                int(state.get("lr_growth_tracker", 0)),
            )
            if min(steps, to_skip, rate.backoffs, rate.tracker) < 0:
                raise ValueError("a number of steps is negative or not finite")
            budget = Budget(self.patience)
            budget.load_state_dict(state["budget"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"this is no state of a GradGuard: {error!r}") from error
        self._decider.memory, self._accounting.budget = memory, budget
        self._steps, self._batches_to_skip, self._window = steps, to_skip, None
        self._rate = rate
        self._accounting.clear()
        if self._snapshots is not None:
            self._snapshots.clear()

    def __getstate__(self) -> dict:
        """For pickle and copy: the settings, the parameters, and the state of the next decision.

        The copy has no copies for a rollback and no begun window. :meth:`GradGuard.scheduler` has
        to be called again for it. Waits for the device.
        """
        if self._group is not None:
            raise TypeError(
                "a GradGuard with a process_group cannot be copied or pickled: the group belongs "
                "to this process. Build another GradGuard and give it this one's state_dict()"
            )
        self._learn(wait=True)
        report = self.last_report
        return vars(self) | {
            "_listening": None,
            "_decider": self._decider.without_ranks(),
            "_snapshots": None if self._snapshots is None else Snapshots(self._rollback),
            "_window": None,
            "_accounting": self._accounting.without_schedulers(),
            "_stepped": ((), None),
            "_described": (None, None),
            "last_report": None if report is None else report.result(),
        }

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._listening = weakref.WeakSet()
        self._look_up_again()
