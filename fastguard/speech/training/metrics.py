"""The output of a run: its log, ``metrics.jsonl``, and the table of its epochs."""

import contextlib
import copy
import json
import logging
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy

from fastguard._io import files
from fastguard._io.terminal import one_line, visible
from fastguard._table import aligned
from fastguard.speech.recognition.evaluation import Evaluation, pooled

LARGEST_METRICS = 4 << 30
"""Largest metrics.jsonl in bytes; a step has about 300."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl per optimizer step, under ``"kind": "step"``."""

    step: int
    epoch: int
    batch: int
    loss: float
    #: L2 norm of all gradients before clipping.
    grad_norm: float
    #: Factor on the gradients; 1 if they were not changed.
    clip_coef: float
    #: apply, clip, skip_nonfinite, skip_outlier.
    verdict: str
    lr: float
    #: Wall time of the step in seconds, loading included.
    seconds: float
    #: Ids of the utterances of a skipped batch.
    skipped_utterances: tuple[str, ...] = ()
    #: Parameters with a NaN or Inf in their gradient.
    nonfinite_parameters: tuple[str, ...] = ()
    #: Loss scale of the GradScaler in fp16; None without one.
    loss_scale: float | None = None
    #: Whether the step was skipped because the GradScaler searches for its scale.
    scale_search: bool = False
    #: Ids of utterances of the batch, in any process, that could not be used.
    left_out_utterances: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl per epoch, under ``"kind": "epoch"``."""

    epoch: int
    step: int
    #: Mean training loss of the steps that were not skipped, NaN if there were none.
    loss: float
    #: Word and character error rate on ``split``; 1 is 100 %.
    wer: float
    cer: float
    #: Median gradient norm of all steps.
    grad_norm: float
    skipped: int
    steps: int
    seconds: float
    #: WER of the utterances with at least 4 words; NaN if there are none.
    wer_long: float = math.nan
    #: Size of what was evaluated.
    dev_utterances: int = 0
    dev_words: int = 0
    dev_minutes: float = 0.0
    #: Largest gradient norm of all steps; NaN or Inf if one was.
    max_grad_norm: float = math.nan
    #: What was evaluated: "dev", "train" if the corpus has no dev split, "" if it is not known.
    split: str = ""

    @property
    def status(self) -> str:
        """The epoch in words: what is wrong with it, or else how good the WER is."""
        if 0 < self.skipped == self.steps:
            return "WARNING: every step skipped"
        if not math.isfinite(self.loss):
            return "WARNING: loss not finite"
        if self.skipped > self.steps / 2:
            return "WARNING: most steps skipped"
        if math.isnan(self.wer):
            return "WARNING: nothing evaluated"
        return next(words for bound, words in _STATUS if self.wer <= bound)


_STATUS = (
    (0.1, "target range"),
    (0.3, "good progress"),
    (0.6, "improving"),
    (0.95, "learning"),
    (math.inf, "stable start"),
)


@dataclass
class EpochTotals:
    """Sums over the steps of an epoch; part of a checkpoint."""

    losses: float = 0.0
    accepted: int = 0
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def skipped(self) -> int:
        """Number of skipped steps."""
        return len(self.norms) - self.accepted

    def add(self, step: StepMetrics) -> None:
        """Add a step."""
        self.norms.append(step.grad_norm)
        self.seconds += step.seconds
        if not step.verdict.startswith("skip"):
            self.losses += step.loss
            self.accepted += 1

    def close(
        self, epoch: int, step: int, found: Evaluation, evaluation_seconds: float, split: str
    ) -> EpochMetrics:
        """The epoch's metrics; ``step`` is its last, and ``found`` the evaluation of ``split``."""
        return EpochMetrics(
            epoch,
            step,
            self.losses / self.accepted if self.accepted else math.nan,
            found.rates.wer,
            found.rates.cer,
            # NaN counts as the largest, because it cannot be ordered.
            statistics.median(math.inf if math.isnan(n) else n for n in self.norms)
            if self.norms
            else math.nan,
            self.skipped,
            len(self.norms),
            self.seconds + evaluation_seconds,
            pooled(found.long_rows).wer,
            len(found.rows),
            found.rates.words,
            found.seconds / 60,
            numpy.max(self.norms).item() if self.norms else math.nan,
            split,
        )


class MetricsFile:
    """Appends objects to ``metrics.jsonl`` and flushes each line, so that a crash loses nothing.

    JSON has no NaN and no Inf: they are written as the strings "nan", "inf" and "-inf", which
    ``float()`` reads. If the disk is full, lines are lost, and the run continues.

    Args:
        path: of the file.
        step, epochs: progress of the run. Lines of an interrupted run after this are removed,
            because they will be written again.
    """

    def __init__(self, path: Path, step: int = 0, epochs: int = 0):
        self._complained = False
        if path.exists():
            _drop_after(path, step, epochs)
        self._file = files.open_appending(path)

    def write(self, metrics: StepMetrics | EpochMetrics) -> None:
        """Append a line."""
        kind = "step" if isinstance(metrics, StepMetrics) else "epoch"
        values = {
            key: _json_number(value)
            for key, value in asdict(metrics).items()
            if value != () and value is not None and value is not False
        }
        try:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._complained:
                logger.warning("metrics.jsonl is not complete: %s", error)
            self._complained = True

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # already reported
            self._file.close()


def _drop_after(path: Path, step: int, epochs: int) -> None:
    """Keep the lines up to ``step`` and ``epochs``. A warning names invalid lines, except a last
    line without a newline, which a crash left."""
    bad = []
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as kept:
        for number, line, ended in files.json_lines(path, LARGEST_METRICS):
            if line is None or not _is_numbered(line):
                bad += [number] if ended else []
            elif line["epoch"] <= epochs if line["kind"] == "epoch" else line["step"] <= step:
                kept.write(json.dumps(line) + "\n")
    if bad:
        logger.warning(
            "%s: %d lines are not metrics and were removed, the first is line %d",
            path,
            len(bad),
            bad[0],
        )


def _is_numbered(line: dict) -> bool:
    kind = line.get("kind")
    return kind in ("step", "epoch") and type(line.get(kind)) is int


def _json_number(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def epoch_table(epochs: list[EpochMetrics]) -> str:
    """A text table with one row per epoch."""
    rows = [["epoch", "loss", "WER", "CER", "grad norm", "skipped", "status"]]
    for e in epochs:
        numbers = [f"{e.loss:.3f}", f"{e.wer:.3f}", f"{e.cer:.3f}", f"{e.grad_norm:.3g}"]
        rows.append([str(e.epoch), *numbers, f"{e.skipped}/{e.steps}", e.status])
    return "\n".join(aligned(rows, left=(6,)))


class _Formatter(logging.Formatter):
    """Prefixes levels other than INFO, hides tracebacks from the terminal, and escapes invisible
    characters."""

    def __init__(self, tracebacks: bool):
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record):
        record = copy.copy(record)
        if isinstance(record.args, tuple):
            record.args = tuple(one_line(str(a)) if isinstance(a, Path) else a for a in record.args)
        if not self._tracebacks:
            record.exc_info = record.exc_text = None
        message = visible(super().format(record))
        return message if record.levelno == logging.INFO else f"{record.levelname} - {message}"


class _File(logging.FileHandler):
    """A log file. If the disk is full, one warning replaces a traceback for each line.

    It follows no symbolic link.
    """

    def _open(self):
        return files.open_appending(Path(self.baseFilename))

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], OSError):
            self.setLevel(logging.CRITICAL + 1)
            logger.warning("train.log is not complete: %s", sys.exc_info()[1])
        else:
            super().handleError(record)

    def close(self):
        with contextlib.suppress(OSError):  # already reported
            super().close()


class _Terminal(logging.StreamHandler):
    """Writes to what is sys.stderr now, like the handler that logging falls back to."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


def log_to(path: Path | None) -> None:
    """Send fastguard's log to the terminal and to a file.

    Handlers that are not of this function stay as they are, and records still reach those of the
    root logger.

    Args:
        path: of the log file. None: no file, and on the terminal only warnings.
    """
    package = logging.getLogger("fastguard")
    package.setLevel(logging.INFO if path else logging.WARNING)
    for handler in [h for h in package.handlers if isinstance(h, _Terminal | _File)]:
        package.removeHandler(handler)
        handler.close()
    package.addHandler(_with_format(_Terminal(), tracebacks=False))
    if path is not None:
        package.addHandler(_with_format(_File(path, encoding="utf-8"), tracebacks=True))


def _with_format(handler: logging.Handler, tracebacks: bool) -> logging.Handler:
    handler.setFormatter(_Formatter(tracebacks))
    return handler
