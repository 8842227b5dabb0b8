"""A learning rate scheduler that counts only the applied steps."""

from typing import Any

#: A separate entry in the scheduler's state. A plain scheduler can load the state too.
_OWED = "fastguard_owed"


class GuardedScheduler:
    """Calls ``scheduler.step`` once for each applied step; see :meth:`GradGuard.scheduler`.

    All other attributes are the scheduler's own.
    """

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        #: Skipped steps whose scheduler step is still to be left out.
        self._owed = 0

    def step(self, *args, **kwargs) -> None:
        """Step the scheduler, or leave one step out for each step that was skipped."""
        if self._owed:
            self._owed -= 1
        else:
            self._scheduler.step(*args, **kwargs)

    def owe(self) -> None:
        """Record a skipped step: the next :meth:`step` does nothing."""
        self._owed += 1

    def state_dict(self) -> dict:
        """The scheduler's state, which a plain one can load, and the number of owed steps."""
        return self._scheduler.state_dict() | {_OWED: self._owed}

    def load_state_dict(self, state: dict) -> None:
        """Load the state of a guarded scheduler or of a plain one."""
        self._scheduler.load_state_dict({k: v for k, v in state.items() if k != _OWED})
        self._owed = int(state.get(_OWED, 0))

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_scheduler":
            raise AttributeError(name)
        return getattr(self._scheduler, name)
