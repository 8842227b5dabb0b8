"""The plots of a report: inline SVG whose colours are CSS variables of the page."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .run_history import Run

#: Colours in the CSS of the page; with more runs, lines become dashed, then dotted.
COLOURS = 6
DASHES = ("solid", "dashed", "dotted")

_SIZE = (430, 260)  # px at 1:1
_BINS = 400  # of a line with more than twice as many steps: about one per pixel
_LARGEST = 1e300  # above it axes overflow
# Placeholders for CSS variables, because matplotlib accepts only colours.
_INK, _MUTED, _GRID = "#000001", "#000002", "#000003"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"}
_VARIABLES |= {f"#0001{i:02x}": f"--run-{i}" for i in range(COLOURS)}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastguard",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.labelpad": 8,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    svg: Markup
    #: The legend: pairs of a mark (a CSS class of the page) and a text.
    key: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Line:
    """One quantity of one run."""

    name: str
    colour: str
    dash: str
    x: np.ndarray
    y: np.ndarray


def draw(runs: Sequence[Run], names: Sequence[str]) -> list[Plot]:
    """The plots for which the runs have values; all runs share the axes."""
    with matplotlib.style.context(["default", _STYLE]):
        return [plot for make in _PLOTS if (plot := make(runs, names)) is not None]


def _loss(runs, names):
    return _per_step("Training loss", "loss", runs, names, lambda run: run.steps.loss)


def _clip_coef(runs, names):
    words = "clip coefficient"
    return _per_step("Clip coefficient", words, runs, names, lambda run: run.steps.clip_coef)


def _seconds(runs, names):
    return _per_step("Time of a step", "time / s", runs, names, lambda run: run.steps.seconds)


def _per_step(title, label, runs, names, values: Callable[[Run], list[float]]) -> Plot | None:
    """Each step as a faint line, and the running median."""
    lines = list(_lines(runs, names, lambda run: (run.steps.step, values(run))))
    if not lines:
        return None
    figure, axes = _axes("optimizer step", label)
    width = _draw_steps(axes, lines)
    _scale(axes, lines)
    return _plot(title, figure, lines, (_EACH_STEP, _median_key(width)))


def _grad_norm(runs, names):
    before = list(_lines(runs, names, lambda run: (run.steps.step, run.steps.grad_norm), log=True))
    if not before:
        return None
    after = list(_lines(runs, names, _norms_after, log=True))
    figure, axes = _axes("optimizer step", "gradient norm (L2)")
    width = _draw_steps(axes, before)
    for line in after:
        axes.plot(*_running_median(line, width), color=line.colour, lw=1.4, ls=(0, (3, 2)))
    _log_scale(axes, [*before, *after])
    marks = _mark_skips(axes, runs)
    key = (
        _EACH_STEP,
        ("line", f"before clipping, running median of {width}"),
        ("dashes", "after clipping, running median"),
        *marks,
    )
    return _plot("Gradient norm", figure, before, key)


def _norms_after(run: Run) -> tuple[list[int], np.ndarray]:
    with np.errstate(over="ignore"):
        norms = _clean(run.steps.grad_norm) * _clean(run.steps.clip_coef)
    return run.steps.step, np.where(run.steps.skipped, math.nan, norms)


def _mark_skips(axes: Axes, runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Mark skipped steps: crosses at finite norms, triangles at the upper edge for the others.

    Yields the legend of what was drawn.
    """
    crosses = triangles = False
    for i, run in enumerate(runs):
        skipped = np.array(run.steps.skipped, dtype=bool)
        x, y = np.array(run.steps.step)[skipped], _clean(run.steps.grad_norm, log=True)[skipped]
        finite = np.isfinite(y)
        options = {"ls": "none", "color": _colour(i), "clip_on": False, "zorder": 4}
        if finite.any():
            axes.plot(*_thin(x[finite], y[finite]), marker="x", ms=5, mew=1.4, **options)
            crosses = True
        if not finite.all():
            edge = _thin(x[~finite], np.ones(len(x) - finite.sum()))
            transform = axes.get_xaxis_transform()
            axes.plot(*edge, marker="v", ms=5, transform=transform, **options)
            triangles = True
    if crosses:
        yield "cross", "skipped"
    if triangles:
        yield "triangle", "skipped, norm NaN or Inf"


def _learning_rate(runs, names):
    lines = list(_lines(runs, names, lambda run: (run.steps.step, run.steps.lr)))
    if not lines:
        return None
    figure, axes = _axes("optimizer step", "learning rate")
    for line in lines:
        axes.plot(*_envelope(line.x, line.y), color=line.colour, ls=line.dash, **_marker(line))
    _from_zero(axes, lines)
    return _plot("Learning rate", figure, lines, ())


def _epoch_loss(runs, names):
    lines = list(_lines(runs, names, lambda run: _of_epochs(run, "loss")))
    if not lines:
        return None
    figure, axes = _axes("epoch", "mean loss")
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, ls=line.dash, marker="o", ms=4)
    _scale(axes, lines)
    return _plot("Training loss per epoch", figure, lines, ())


def _error_rates(runs, names):
    wer = list(_lines(runs, names, lambda run: _of_epochs(run, "wer", 100)))
    if not wer:
        return None
    cer = list(_lines(runs, names, lambda run: _of_epochs(run, "cer", 100)))
    long = list(
        _lines(
            runs,
            names,
            lambda run: (
                [e.metrics.epoch for e in run.epochs],
                [100 * e.wer_long for e in run.epochs],
            ),
        )
    )
    figure, axes = _axes("epoch", "error rate / %")
    for lines, marker, dash in ((wer, "o", "-"), (cer, "s", (0, (3, 2))), (long, "^", ":")):
        for line in lines:
            axes.plot(line.x, line.y, color=line.colour, ls=dash, marker=marker, ms=4)
    _from_zero(axes, [*wer, *cer, *long])
    key = [("line disc", "WER"), ("dashes square", "CER")]
    key += [("dots up", "WER, 4 words and more")] if long else []
    return _plot(_title_of_rates(runs), figure, wer, tuple(key))


def _title_of_rates(runs: Sequence[Run]) -> str:
    """What was scored, as far as it is known. The summary has it for each run."""
    scored = {run.scored for run in runs if run.epochs}
    if len(scored) > 1:
        return "Error rates, not all on the same split"
    return f"Error rates on the {scored.pop()}" if any(scored) else "Error rates"


def _of_epochs(run: Run, name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    metrics = [epoch.metrics for epoch in run.epochs]
    return [m.epoch for m in metrics], [factor * getattr(m, name) for m in metrics]


_PLOTS = (_loss, _error_rates, _epoch_loss, _grad_norm, _clip_coef, _learning_rate, _seconds)
_EACH_STEP = ("faint", "each step")


def _median_key(width: int) -> tuple[str, str]:
    return "line", f"running median of {width}"


# --- lines ------------------------------------------------------------------------------------


def _colour(i: int) -> str:
    return f"#0001{i % COLOURS:02x}"


def _lines(runs, names, points, log: bool = False) -> Iterator[_Line]:
    """A line for each run that has a finite value."""
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        x, y = points(run)
        y = _clean(y, log)
        if np.isfinite(y).any():
            dash = DASHES[i // COLOURS % len(DASHES)]
            yield _Line(name, _colour(i), dash, np.asarray(x, dtype=float), y)


def _clean(y: Sequence[float], log: bool = False) -> np.ndarray:
    """float64 with NaN for what an axis cannot show: Inf, and values <= 0 on a log axis."""
    y = np.asarray(y, dtype=float)
    shown = np.isfinite(y) & (y > 0) if log else np.isfinite(y)
    return np.where(shown, np.clip(y, -_LARGEST, _LARGEST), math.nan)


def _draw_steps(axes: Axes, lines: list[_Line]) -> int:
    """Draw each step as a faint line and the running median; return its width in steps."""
    width = max(max(len(line.x) for line in lines) // 20, 5) | 1
    faint = 0.35 if len(lines) == 1 else 0.2
    for line in lines:
        axes.plot(
            *_envelope(line.x, line.y), color=line.colour, lw=0.8, alpha=faint, **_marker(line)
        )
    for line in lines:
        axes.plot(*_running_median(line, width), color=line.colour, ls=line.dash, lw=1.8)
    return width


def _marker(line: _Line) -> dict:
    """Draw markers if there are few points: a line needs two neighbours."""
    return {"marker": "o", "ms": 3} if np.isfinite(line.y).sum() <= 40 else {}


def _envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * _BINS points: the smallest and the largest of each bin of steps, in order."""
    if len(x) <= 2 * _BINS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), _BINS)
    picked = []
    for stretch in stretches:
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite) == 0:
            picked += [stretch[0]]  # a gap
        else:
            picked += sorted({finite[y[finite].argmin()], finite[y[finite].argmax()]})
    return x[picked], y[picked]


def _running_median(line: _Line, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Median of the finite values among ``width`` neighbours, at up to _BINS steps."""
    at = np.unique(np.linspace(0, len(line.x) - 1, _BINS).astype(int))
    half = width // 2
    around = (line.y[max(0, i - half) : i + half + 1] for i in at)
    finite = [values[np.isfinite(values)] for values in around]
    return line.x[at], np.array([np.median(v) if len(v) else math.nan for v in finite])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _BINS of the marks."""
    at = np.unique(np.linspace(0, len(x) - 1, _BINS).astype(int))
    return x[at], y[at]


# --- axes -------------------------------------------------------------------------------------


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0] / 72, _SIZE[1] / 72), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure, axes


def _count(value: float, _) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _scale(axes: Axes, lines: list[_Line]) -> None:
    """Use a linear axis from 0, or a logarithmic one if outliers would flatten the rest."""
    values = np.concatenate([_finite(line) for line in lines])
    if values.min() > 0 and values.max() > 20 * np.median(values):
        _log_scale(axes, lines)
    else:
        _from_zero(axes, lines)


def _from_zero(axes: Axes, lines: list[_Line]) -> None:
    """Start the axis at 0 with room above the highest value, unless values are negative."""
    values = np.concatenate([_finite(line) for line in lines])
    if values.min() >= 0:
        axes.set_ylim(0, 1.06 * values.max() or 1)


def _log_scale(axes: Axes, lines: list[_Line]) -> None:
    """Ticks at powers of 10, or for few decades at 1, 2, 5; the axis ends at ticks."""
    values = np.concatenate([_finite(line) for line in lines])
    low, high = math.log10(values.min()), math.log10(values.max())
    if high - low <= 2.5:
        bounds = range(math.floor(low), math.ceil(high) + 1)
        ticks = [digit * 10.0**power for power in bounds for digit in (1, 2, 5)]
    else:
        stride = math.ceil((high - low) / 6)
        first = math.floor(low / stride) * stride
        ticks = [10.0**power for power in range(first, math.ceil(high) + stride, stride)]
    ticks = [t for t in ticks if t > 0]
    bottom = max((t for t in ticks if t <= values.min()), default=ticks[0])
    top = min((t for t in ticks if t >= values.max() and t > bottom), default=ticks[-1])
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if bottom <= t <= top]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(axes.get_ylabel() + ", log scale")


# --- SVG --------------------------------------------------------------------------------------


def _plot(title: str, figure: Figure, lines: list[_Line], key) -> Plot:
    axes = figure.axes[0]
    described = "; ".join(
        f"{line.name}: {np.isfinite(line.y).sum()} points, first "
        f"{_finite(line)[0]:.3g}, last {_finite(line)[-1]:.3g}, lowest {_finite(line).min():.3g}, "
        f"highest {_finite(line).max():.3g}"
        for line in lines
    )
    description = f"{axes.get_ylabel()} over {axes.get_xlabel()}. {described}."
    return Plot(title, _svg(title, description, figure), tuple(key))


def _finite(line: _Line) -> np.ndarray:
    return line.y[np.isfinite(line.y)]


def _svg(title: str, description: str, figure: Figure) -> Markup:
    """SVG with text as text, ids that are unique in the page, no metadata and two decimals."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}-", body)
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub("|".join(_VARIABLES), lambda found: f"var({_VARIABLES[found[0]]})", body)
    head = (
        f'<svg viewBox="0 0 {_SIZE[0]} {_SIZE[1]}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(title)}</title>'
        f'<desc id="{prefix}-desc">{escape(description)}</desc>'
    )
    return Markup(head + body)
