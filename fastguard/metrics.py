"""What a run tells: log lines, ``metrics.jsonl``, and the table of its epochs."""

import json
import logging
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl per optimizer step, under ``"kind": "step"``."""

    step: int
    epoch: int
    batch: int
    loss: float
    #: L2 norm of all gradients before clipping.
    grad_norm: float
    #: Factor on the gradients; 1 where nothing was written.
    clip_coef: float
    #: apply, clip, skip_nonfinite, skip_outlier.
    verdict: str
    lr: float
    #: Wall time of the step, loading included.
    seconds: float
    #: Ids of the utterances of a skipped batch.
    skipped_utterances: tuple[str, ...] = ()
    #: Parameters with a NaN or Inf gradient in it.
    nonfinite_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl per epoch, under ``"kind": "epoch"``."""

    epoch: int
    step: int
    #: Mean training loss of the steps that were not skipped, NaN if there were none.
    loss: float
    #: Word and character error rate on the dev split; 1 is 100 %.
    wer: float
    cer: float
    #: Median gradient norm of all steps.
    grad_norm: float
    skipped: int
    steps: int
    seconds: float

    @property
    def status(self) -> str:
        """The epoch in words: first what is wrong with it, else how far it got."""
        if self.skipped == self.steps:
            return "WARNING: every step skipped"
        if not math.isfinite(self.loss):
            return "WARNING: loss not finite"
        if self.skipped > self.steps / 2:
            return "WARNING: most steps skipped"
        return next(words for bound, words in _STATUS if self.wer <= bound)


_STATUS = (
    (0.1, "target range"),
    (0.3, "good progress"),
    (0.6, "improving"),
    (0.95, "learning"),
    (math.inf, "stable start"),
)


def summarize(epoch: int, steps: list[StepMetrics], wer: float, cer: float, seconds: float):
    """The metrics of an epoch out of those of its steps; ``steps`` is not empty."""
    losses = [s.loss for s in steps if not s.verdict.startswith("skip")]
    return EpochMetrics(
        epoch,
        steps[-1].step,
        statistics.fmean(losses) if losses else math.nan,
        wer,
        cer,
        statistics.median(s.grad_norm for s in steps),
        len(steps) - len(losses),
        len(steps),
        seconds,
    )


class MetricsFile:
    """Appends objects to ``metrics.jsonl``, each line flushed, so that a crash loses nothing.

    JSON has no NaN and no Inf: they are written as the strings "nan", "inf" and "-inf", which
    ``float()`` reads.
    """

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics | EpochMetrics) -> None:
        kind = "step" if isinstance(metrics, StepMetrics) else "epoch"
        values = {key: _json_number(value) for key, value in asdict(metrics).items() if value != ()}
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _json_number(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def epoch_table(epochs: list[EpochMetrics]) -> str:
    """One row per epoch under a header."""
    row = "{:>5}  {:>8}  {:>6}  {:>6}  {:>9}  {:>9}  {}".format
    lines = [row("epoch", "loss", "WER", "CER", "grad norm", "skipped", "status")]
    for e in epochs:
        numbers = f"{e.loss:.3f}", f"{e.wer:.3f}", f"{e.cer:.3f}", f"{e.grad_norm:.3g}"
        lines.append(row(e.epoch, *numbers, f"{e.skipped}/{e.steps}", e.status))
    return "\n".join(lines)


class _Formatter(logging.Formatter):
    """INFO as it is; everything else under its level."""

    def format(self, record):
        message = super().format(record)
        return message if record.levelno == logging.INFO else f"{record.levelname} - {message}"


def log_to(path: Path) -> None:
    """Send fastguard's log to the terminal and to a file."""
    root = logging.getLogger("fastguard")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in root.handlers:
        handler.close()
    root.handlers = [logging.StreamHandler(), logging.FileHandler(path, encoding="utf-8")]
    for handler in root.handlers:
        handler.setFormatter(_Formatter())
