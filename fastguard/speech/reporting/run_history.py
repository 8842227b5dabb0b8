"""Reads the folder of a run for a report, as far as it exists and is intact."""

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from fastguard._deprecated import with_new_keys
from fastguard._io import files
from fastguard.guard.report import OLD_KEYS
from fastguard.speech.storage.yaml_file import read_yaml
from fastguard.speech.training.metrics import LARGEST_METRICS, EpochMetrics
from fastguard.speech.training.ranking import Rank, comparable

_LOG_TAIL = 200_000  # bytes; the last lines say how a run ended
_LOG_LINES = 40


class RunFolderError(RuntimeError):
    """A folder is not that of a run; the message names it."""


@dataclass
class Steps:
    """The optimizer steps of a run: a list per quantity, with NaN for missing values."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    clip_coef: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def append(self, step: int, line: dict) -> None:
        """Add a step from its line of metrics.jsonl."""
        self.step.append(step)
        for name in ("loss", "grad_norm", "clip_coef", "lr", "seconds"):
            getattr(self, name).append(number(line.get(name)))
        self.skipped.append(str(line.get("verdict")).startswith("skip"))

    def forget_from(self, step: int) -> None:
        """Remove ``step`` and all later steps."""
        first = bisect_left(self.step, step)
        for column in vars(self).values():
            del column[first:]


@dataclass(frozen=True)
class Epoch:
    """One epoch: what every version of the trainer writes, and what newer versions add."""

    metrics: EpochMetrics
    #: WER of the utterances with four words or more; NaN if the line has none.
    wer_long: float
    dev_utterances: int | None

    @property
    def rank(self) -> Rank:
        """Its place among the epochs of the run."""
        metrics, rate = self.metrics, self.metrics.wer
        if self.dev_utterances and metrics.dev_words > 0:
            rate = comparable(rate, metrics.cer, self.dev_utterances, metrics.dev_words)
        return Rank(rate, metrics.loss, metrics.step)

    @property
    def status(self) -> str:
        """The epoch in words."""
        return "no error rate" if math.isnan(self.metrics.wer) else self.metrics.status


@dataclass
class BadStep:
    """A skipped step: its line in metrics.jsonl, and its bad_step file."""

    #: Counted from 1, as in metrics.jsonl; the guard's files count from 0.
    step: int
    verdict: str
    loss: float = math.nan
    grad_norm: float = math.nan
    utterances: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    #: The guard's file; empty if there is none.
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Hypothesis:
    """An utterance of hypotheses.jsonl."""

    id: str
    reference: str
    hypothesis: str
    wer: float
    cer: float


@dataclass
class Run:
    """The contents of a run folder. Everything except the path may be missing."""

    path: Path
    #: config.yaml with dotted names.
    settings: dict[str, object] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    epochs: list[Epoch] = field(default_factory=list)
    bad_steps: dict[int, BadStep] = field(default_factory=dict)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    log_tail: str = ""
    #: The last line or the error line of train.log; empty if the run is running or was killed.
    ending: str = ""
    #: Number of parameters from train.log, such as "15.6 M".
    parameters: str = ""
    #: Messages about what could not be read.
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Epoch | None:
        """The epoch of best.pt, unless that is the mean of several."""
        rated = [e for e in self.epochs if not math.isnan(e.metrics.wer)]
        return min(rated, key=lambda e: e.rank, default=None)

    @property
    def scored(self) -> str:
        """What the error rates are of: "dev split", "training split", or "" if it is not known."""
        split = self.epochs[-1].metrics.split if self.epochs else ""
        return {"dev": "dev split", "train": "training split", "": ""}[split]

    @property
    def seconds(self) -> float:
        """Wall time of the epochs that ended and of the steps after the last one."""
        first = bisect_left(self.steps.step, self.epochs[-1].metrics.step + 1) if self.epochs else 0
        times = [e.metrics.seconds for e in self.epochs] + self.steps.seconds[first:]
        return math.fsum(t for t in times if math.isfinite(t))


def read(path: Path) -> Run:
    """Read a run folder, also that of a run that is running or has crashed.

    Lines and files that cannot be read are left out and counted in ``notes``. A step or an epoch
    that occurs again, as after a resume, replaces what was written from there on.

    Raises:
        RunFolderError: ``path`` is not a folder, or has neither settings nor metrics nor a log.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: give the --run-dir of a run")
    if not any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl", "train.log")):
        raise RunFolderError(
            f"{path} is not a run: it has neither config.yaml nor metrics.jsonl nor train.log"
        )
    run = Run(path)
    run.settings = _settings(run)
    _read_metrics(run)
    _read_bad_steps(run)
    _read_hypotheses(run)
    _read_log(run)
    return run


def number(value: object) -> float:
    """A JSON number, or its text, as NaN and Inf are written; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _settings(run: Run) -> dict[str, object]:
    try:
        values = read_yaml(run.path / "config.yaml")
    except FileNotFoundError:
        run.notes.append("config.yaml is missing")
        return {}
    except (OSError, ValueError) as error:
        run.notes.append(f"config.yaml cannot be read: {error}")
        return {}
    return dict(_dotted(values)) if isinstance(values, dict) else {}


def _dotted(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(run: Run, name: str) -> Iterator[dict]:
    """The objects of a JSON Lines file, whose last line may be incomplete."""
    bad, cut = 0, False
    try:
        for _, row, ended in files.json_lines(run.path / name, LARGEST_METRICS):
            if row is None:
                bad, cut = bad + ended, not ended
            else:
                yield row
    except FileNotFoundError:
        run.notes.append(f"{name} is missing")
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror or error}")
    if cut:
        run.notes.append(f"the last line of {name} is cut off")
    if bad:
        run.notes.append(f"{bad} lines of {name} cannot be read and were left out")


def _read_metrics(run: Run) -> None:
    incomplete = 0
    for line in _rows(run, "metrics.jsonl"):
        step, epoch = number(line.get("step")), number(line.get("epoch"))
        if not (math.isfinite(step) and math.isfinite(epoch)):
            incomplete += 1
        elif line.get("kind") == "step":
            _add_step(run, int(step), line)
        elif line.get("kind") == "epoch":
            _add_epoch(run, int(epoch), line)
    if incomplete:
        run.notes.append(f"{incomplete} lines of metrics.jsonl have no step and were left out")


def _add_step(run: Run, step: int, line: dict) -> None:
    if run.steps.step and step <= run.steps.step[-1]:
        run.steps.forget_from(step)
        run.epochs = [e for e in run.epochs if e.metrics.step < step]
        run.bad_steps = {n: bad for n, bad in run.bad_steps.items() if n < step}
    run.steps.append(step, line)
    if run.steps.skipped[-1]:
        run.bad_steps[step] = BadStep(
            step,
            "search for a loss scale" if line.get("scale_search") else str(line["verdict"]),
            number(line.get("loss")),
            number(line.get("grad_norm")),
            _texts(line.get("skipped_utterances")),
            _texts(line.get("nonfinite_parameters")),
        )


def _add_epoch(run: Run, epoch: int, line: dict) -> None:
    values = {f.name: number(line.get(f.name)) for f in fields(EpochMetrics) if f.name != "split"}
    for name in ("epoch", "step", "skipped", "steps"):
        values[name] = int(values[name]) if math.isfinite(values[name]) else 0
    count = number(line.get("dev_utterances"))
    run.epochs = [e for e in run.epochs if e.metrics.epoch < epoch]
    run.epochs.append(
        Epoch(
            EpochMetrics(**values, split=_split(line)),
            number(line.get("wer_long")),
            int(count) if math.isfinite(count) else None,
        )
    )


def _split(line: dict) -> str:
    """The split that was evaluated; "" in a line of a version that did not write it."""
    split = line.get("split")
    return split if split in ("dev", "train") else ""


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _texts(values: object) -> list[str]:
    return list(map(_text, values)) if isinstance(values, list) else []


def _read_bad_steps(run: Run) -> None:
    bad = 0
    for path in sorted(run.path.glob("bad_step_*.json")):
        try:
            details = files.read_json(path)
            step = int(details["step"]) + 1
            details = with_new_keys(details, OLD_KEYS)
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            bad += 1
            continue
        if step in run.bad_steps:
            run.bad_steps[step].details = details
        elif details.get("skipped_micro_batches") and step in run.steps.step:
            run.bad_steps[step] = BadStep(
                step, "micro-batches left out", grad_norm=number(details.get("total_norm"))
            )
            run.bad_steps[step].details = details
        # Any other file was written before a resume.
    if bad:
        run.notes.append(f"{bad} bad_step files cannot be read and were left out")


def _read_hypotheses(run: Run) -> None:
    if not (run.path / "hypotheses.jsonl").exists():
        return
    run.hypotheses = [
        Hypothesis(
            _text(row.get("id")),
            _text(row.get("reference")),
            _text(row.get("hypothesis")),
            number(row.get("wer")),
            number(row.get("cer")),
        )
        for row in _rows(run, "hypotheses.jsonl")
    ]


_ENDING = re.compile(r"^(Finished at step|Stopped at step|ERROR - )")
_PARAMETERS = re.compile(r"^\w+: ([\d.]+ M) parameters", re.MULTILINE)


def _read_log(run: Run) -> None:
    try:
        with files.open_regular(run.path / "train.log", LARGEST_METRICS) as file:
            head = file.read(_LOG_TAIL)
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL))
            tail = file.read()
    except FileNotFoundError:
        run.notes.append("train.log is missing")
        return
    except OSError as error:
        run.notes.append(f"train.log cannot be read: {error.strerror or error}")
        return
    if found := _PARAMETERS.search(head.decode("utf-8", "replace")):
        run.parameters = found[1]
    lines = tail.decode("utf-8", "replace").splitlines()
    run.log_tail = "\n".join(lines[-_LOG_LINES:])
    # A resumed run appends to the log after the end of the run before.
    begins = max((i for i, line in enumerate(lines) if line.startswith("run folder: ")), default=0)
    run.ending = _ending(lines[begins:])


def _ending(lines: list[str]) -> str:
    """The last line that says how the run ended, with the indented lines after it."""
    at = next((i for i in reversed(range(len(lines))) if _ENDING.match(lines[i])), None)
    if at is None:
        return ""
    more = itertools.takewhile(lambda line: line.startswith("  "), lines[at + 1 :])
    return "\n".join([lines[at], *more])
