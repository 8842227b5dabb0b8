"""What the processes of a run agree on before each step: to stop, that one failed, what is left
out."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from fastguard._io.failures import in_a_line
from fastguard.speech.data.batching import Batch, LoadError
from fastguard.speech.data.readers import Rejected

from .parallel import Parallel

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_SIGNAL = 1.0  # seconds in which a second one is the same: a terminal's and torchrun's Ctrl-C


class Agreement:
    """Keeps the processes in step. A process that went on alone, or stopped alone, would leave the
    others waiting forever.

    Attributes:
        stopping: whether the run stops; the same in all processes.
        rejected: rows of the current step, in any process, that could not be used.
    """

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self.stopping = False
        self.rejected: list[Rejected] = []
        self._asked: float | None = None  # when a signal asked this process to stop

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Stop the run on Ctrl-C, and on SIGTERM, which schedulers send before they take a machine
        away. A second signal raises KeyboardInterrupt."""

        def stop(signum, frame):
            if self._asked is None:
                self._asked = time.monotonic()
                logger.info("Stopping after this step; Ctrl-C again stops at once")
            elif time.monotonic() - self._asked > _ONE_SIGNAL:
                raise KeyboardInterrupt

        previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def micro_batches(self, batches: Iterator[Batch], size: int = 1) -> Iterator[list[Batch]]:
        """The batches of each step, up to ``size``, until they end or a process is asked to stop.

        Raises:
            LoadError: in every process, if one cannot load its batches.
        """
        while True:
            step, failure = [], None
            try:
                step = list(islice(batches, size))
            except Exception as error:
                failure = error
            self.agree(step, failure)
            if self.stopping or not step:
                return
            yield step

    def agree(self, step: Sequence[Batch] = (), failure: Exception | None = None) -> None:
        """Exchange, in one sum, how many processes are asked to stop, failed, or left out rows.

        What failed and which rows were left out is exchanged only if there is something to say.
        """
        failed, left_out = 1 << 16, 1 << 32  # each more than there are processes
        rejected = [row for batch in step for row in batch.rejected]
        asked = self._asked is not None
        votes = self.parallel.sum(
            asked + failed * (failure is not None) + left_out * bool(rejected)
        )
        if votes % left_out >= failed:
            causes = self.parallel.gather(None if failure is None else in_a_line(failure))
            raise LoadError(next(filter(None, causes))) from failure
        everywhere = self.parallel.gather(rejected) if votes >= left_out else []
        self.rejected = [row for rows in everywhere for row in rows]
        self.stopping = votes % failed > 0
