"""The callback that hears of each skipped step: ``GradGuard(on_skip=...)``."""

import copy
from collections import deque
from collections.abc import Callable

from .report import StepReport


class OnSkip:
    """Calls a callback once with each report that was added, in order.

    Reports are added while the guard accounts for them, and told when it is done with that: a
    callback may raise, or call the guard.

    Args:
        callback: or None, and nothing is called.

    Raises:
        TypeError: the callback cannot be called.
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
        """Call the callback. After an exception of it the next call goes on with the next report.

        Raises:
            Exception: what the callback raises.
        """
        while self._untold:
            self._callback(self._untold.popleft())

    def clear(self) -> None:
        self._untold.clear()

    # A copy tells of nothing that the original has still to tell.

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
