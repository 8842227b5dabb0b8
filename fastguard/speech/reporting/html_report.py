"""Renders run folders as one HTML page that needs no other file and no network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import jiwer

from . import plots
from .run_history import BadStep, Hypothesis, Run, number

_MOST_BAD_STEPS = 100
_MOST_UTTERANCES = 30
_MOST_WORDS = 2_000  # of one utterance; an hour of speech has 9,000
_MOST_PARAMETERS = 12  # of a bad step


def render(runs: Sequence[Run]) -> str:
    """The HTML page about one run, or about several side by side. All text of the runs is
    escaped."""
    names = _names(runs)
    return _template().render(
        runs=[
            _RunView(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        settings=_settings(runs),
        plots=plots.draw(runs, names),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastguard.speech.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "duration": _duration}
    return environment.get_template("report.html.j2")


def _names(runs: Sequence[Run]) -> list[str]:
    """The names of the folders; the paths of folders with the same name."""
    names = [run.path.resolve().name or str(run.path) for run in runs]
    return [
        str(run.path) if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


class _RunView:
    """A run as the template shows it."""

    def __init__(self, run: Run, name: str, position: int):
        self.name = name
        self.colour = position % plots.COLOURS
        self.dash = plots.DASHES[position // plots.COLOURS % len(plots.DASHES)]
        self.path, self.notes, self.log_tail = run.path, run.notes, run.log_tail
        self.parameters, self.best, self.epochs = run.parameters, run.best, run.epochs
        self.scored = run.scored
        self.steps, self.seconds = len(run.steps), run.seconds
        self.skipped = sum(run.steps.skipped)
        self.state = _state(run)
        self.failed = run.ending.startswith("ERROR")
        self.ending = run.ending
        self.written = _written(run.path / "metrics.jsonl")
        self.has_long = any(not math.isnan(e.wer_long) for e in run.epochs)
        bad = [run.bad_steps[step] for step in sorted(run.bad_steps)]
        self.bad_count = len(bad)
        self.bad_steps = [_BadStepView(each) for each in bad[:_MOST_BAD_STEPS]]
        self.utterance_count = len(run.hypotheses)
        worst = sorted(run.hypotheses, key=lambda h: -h.wer if math.isfinite(h.wer) else math.inf)
        self.worst = [(each, list(_diff(each))) for each in worst[:_MOST_UTTERANCES]]


def _state(run: Run) -> str:
    if run.ending.startswith("Finished"):
        return "finished"
    if run.ending.startswith("Stopped"):
        return "stopped"
    return "failed" if run.ending else "running, or killed"


def _written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    except OSError:
        return "never"


# --- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    name: str
    values: list[str]
    differs: bool


def _settings(runs: Sequence[Run]) -> list[_Setting]:
    """Every setting of any run, without run_dir, which is in the title of the page."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "run_dir")
    rows = []
    for name in names:
        values = [_value(run.settings[name]) if name in run.settings else "" for run in runs]
        rows.append(_Setting(name, values, len(set(values)) > 1))
    return rows


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- bad steps ----------------------------------------------------------------------------------


class _BadStepView:
    """A bad step as the template shows it. The guard's file may have any content."""

    def __init__(self, bad: BadStep):
        self.step, self.verdict = bad.step, bad.verdict.replace("_", " ")
        self.loss, self.grad_norm, self.utterances = bad.loss, bad.grad_norm, bad.utterances
        details = bad.details
        self.batch = str(details.get("batch_id") or "")
        found = [o for o in _list(details.get("nonfinite_parameters")) if isinstance(o, dict)]
        self.nonfinite = [_counts(o) for o in found[:_MOST_PARAMETERS]]
        self.nonfinite_count = len(found) or len(bad.nonfinite)
        self.first = _place(found[0]) if found else next(iter(bad.nonfinite), "")
        self.finite_ranges = [
            (bool(s.get("finite")), str(s.get("first")), str(s.get("last")))
            for s in _list(details.get("finite_ranges"))[: 2 * _MOST_PARAMETERS]
            if isinstance(s, dict)
        ]
        norms = details.get("norms")
        norms = {str(k): number(v) for k, v in norms.items()} if isinstance(norms, dict) else {}
        finite = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        self.parameter_count = len(norms)
        self.largest = sorted(finite.items(), key=lambda item: -item[1])[:_MOST_PARAMETERS]
        self.risen = [
            (str(r.get("name")), *(number(r.get(key)) for key in ("norm", "usual_norm")))
            for r in _list(details.get("most_risen"))[:_MOST_PARAMETERS]
            if isinstance(r, dict)
        ]
        # Files of an older fastguard have only the setting, not the resulting threshold.
        skipped_above = "outlier_above" if "outlier_above" in details else "skip_norm"
        self.limits = [
            (words, number(details[name]))
            for name, words in (("max_norm", "clipped to"), (skipped_above, "skipped above"))
            if name in details
        ]
        self.has_details = bool(self.nonfinite or self.finite_ranges or self.largest or self.risen)


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _place(parameter: dict) -> str:
    return f"{parameter.get('name')}[{parameter.get('first_index')}]"


def _counts(parameter: dict) -> tuple[str, str]:
    counts = f"{parameter.get('nans')} NaN, {parameter.get('infs')} Inf"
    return _place(parameter), counts


# --- utterances ---------------------------------------------------------------------------------


def _diff(utterance: Hypothesis) -> Iterator[tuple[str, str, str]]:
    """Pairs of aligned words with their kind: equal, substitute, delete or insert.

    Only the first _MOST_WORDS are aligned: the time grows with the product of both lengths.
    """
    reference, hypothesis = (
        text.split(maxsplit=_MOST_WORDS)[:_MOST_WORDS]
        for text in (utterance.reference, utterance.hypothesis)
    )
    aligned = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    for chunk in aligned.alignments[0]:
        said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        heard = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(said), len(heard))):
            yield chunk.type, said[i] if said else "", heard[i] if heard else ""


# --- numbers ------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
