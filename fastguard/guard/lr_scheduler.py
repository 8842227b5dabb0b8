"""A learning rate scheduler that counts applied steps, and not those that were skipped."""

from typing import Any

#: An entry of its own in the scheduler's state, which a plain scheduler can load, too.
_OWED = "fastguard_owed"


class GuardedScheduler:
    """Calls ``scheduler.step`` once for each applied step; see :meth:`GradGuard.scheduler`.

    All other attributes are the scheduler's own.
    """

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        #: Skipped steps for which the scheduler has stepped already, or is about to.
        self._owed = 0

    def step(self, *args, **kwargs) -> None:
        """Step the scheduler, unless a step that was skipped has to be made up for."""
        if self._owed:
            self._owed -= 1
        else:
            self._scheduler.step(*args, **kwargs)

    def owe(self) -> None:
        """A step was skipped."""
        self._owed += 1

    def state_dict(self) -> dict:
        """The scheduler's, which a plain one can load, and the number of steps that it owes."""
        return self._scheduler.state_dict() | {_OWED: self._owed}

    def load_state_dict(self, state: dict) -> None:
        """Load the state of a guarded scheduler, or of the plain one."""
        self._scheduler.load_state_dict({k: v for k, v in state.items() if k != _OWED})
        self._owed = int(state.get(_OWED, 0))

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_scheduler":
            raise AttributeError(name)
        return getattr(self._scheduler, name)
