"""``python -m fastguard.train``: trains a CTC speech model; ``--help`` lists the settings."""

import logging
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from fastguard._extras import MissingExtra
from fastguard._io import terminal
from fastguard._io.failures import in_a_line
from fastguard.env import processor, version
from fastguard.guard.report_files import GradientExplosionError
from fastguard.speech.data.batching import LoadError
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.training.config import Config
from fastguard.speech.training.memory import keep_freed_memory
from fastguard.speech.training.metrics import log_to
from fastguard.speech.training.options import parse
from fastguard.speech.training.parallel import Parallel, leave
from fastguard.speech.training.run_folder import RunError, RunFolder
from fastguard.speech.training.tracking import require_loggers
from fastguard.speech.training.trainer import Trainer

logger = logging.getLogger(__name__)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run or its corpus failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    config = parse(argv)
    with Parallel.start(config.parallel) as parallel:
        status = run(config, parallel)
        if status and parallel.world_size > 1:
            leave(status)  # the others may be in a collective and would be waited for
        return status


def run(config: Config, parallel: Parallel) -> int:
    """Train in this process, one of those that train together; return its exit status."""
    default = Path("runs") / f"{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = RunFolder(parallel.from_main(config.run_dir or default), config)
    trainer = None
    if not parallel.main:
        log_to(None)
    with _SigtermAtTheEnd() as sigterm:
        try:
            if error := parallel.from_main(_begin(folder) if parallel.main else None):
                if parallel.main:
                    print(f"error: {terminal.one_line(error)}", file=sys.stderr)
                return 2
            keep_freed_memory()
            trainer = Trainer(config, folder, parallel)
            sigterm.ignored = True  # while fit runs, it stops the run by handlers of its own
            trainer.fit()
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            sigterm.ignored = True
            _tell(error, folder, parallel, begun=trainer is not None)
            return 1
        finally:
            folder.close()
    if folder.unsaved:
        return 1
    return 130 if trainer.stopping else 0


class _SigtermAtTheEnd:
    """Ignores SIGTERM while a process says why it ends, which takes seconds.

    Where a process is gone, torchrun sends SIGTERM to the others at once. Before ``ignored`` is
    set, the signal ends the process as it does without this class.
    """

    def __init__(self):
        self.ignored = False

    def __enter__(self) -> "_SigtermAtTheEnd":
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, signum, frame) -> None:
        if not self.ignored:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


def _tell(error: Exception, folder: RunFolder, parallel: Parallel, begun: bool) -> None:
    """Log in one line what ends the run; the log file also gets the traceback of a bug."""
    way_on = _way_on(folder, parallel) if begun else None

    def tell(cause: str, traceback: Exception | None = None) -> None:
        between = "\n" if "\n" in cause else "; "  # the guard's advice has several lines
        logger.error("%s", between.join(filter(None, [cause, way_on])), exc_info=traceback)

    if isinstance(error, (GradientExplosionError, LoadError)) and not parallel.main:
        return  # all processes have this error
    if parallel.lost_another(error):
        cause = parallel.word()
        if cause is not None and not parallel.main:
            return  # that process has logged it, and the main process logs it in the file
        tell(cause or "another process of this run is gone without a message: was it killed?")
        return
    known = isinstance(error, (CorpusError, GradientExplosionError, LoadError, RunError))
    cause = str(error) if known else in_a_line(error)
    if parallel.world_size > 1:
        parallel.leave_word(cause)
    if not known and not parallel.main:
        cause = f"process {parallel.rank}: {cause}"
        _log_errors_to(folder.path / "train.log")
    tell(cause, None if known else error)


def _way_on(folder: RunFolder, parallel: Parallel) -> str | None:
    """A sentence on how the run can be continued; other processes than the first look into the
    folder."""
    if not parallel.main and not folder.look_for_newest():
        return None  # the folder may be on another machine
    return folder.way_on()


def _log_errors_to(path: Path) -> None:
    """Let a process that does not write the log append its last message to it."""
    try:
        log_to(path)
    except OSError as error:
        log_to(None)
        logger.warning("the traceback could not be logged: %s", error)


def _begin(folder: RunFolder) -> str | None:
    """Make the folder of the run and its log; return an error message, or None."""
    try:
        require_loggers(folder.config)
        folder.begin()
        log_to(folder.path / "train.log")
    except (MissingExtra, RunError) as error:
        return str(error)
    except OSError as error:
        return f"cannot write the run folder: {error}; choose --run-dir"
    logger.info("run folder: %s", folder.path)
    logger.info("command: %s", terminal.one_line(shlex.join(sys.orig_argv)))
    logger.info(
        "machine: %s, %d threads, torch %s, fastguard %s",
        torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        torch.get_num_threads(),
        torch.__version__,
        version(),
    )
    return None
