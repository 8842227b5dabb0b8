"""The pictures of README.md and docs/, drawn from the records in docs/results.

    python bench/plots.py [--output docs/assets]

Each picture of times names the machine. A background is opaque, so that it reads the same on any
page; the picture that opens the README is there in white and in dark.
"""

import argparse
import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


class Theme(NamedTuple):
    page: str
    ink: str
    ours: str
    torch: str


LIGHT = Theme("white", "#334155", "#0f766e", "#c2410c")
DARK = Theme("#0d1117", "#cbd5e1", "#2dd4bf", "#fb923c")
OURS, TORCH, OTHER, INK = LIGHT.ours, LIGHT.torch, "#94a3b8", LIGHT.ink
#: The faults of the cells "in turns", as bench/grid/faults.py has them.
TURNS = ("input × 1000", "infeasible target", "NaN input")

STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "fastguard",  # the same file from the same record
    "axes.spines.top": False,
    "axes.spines.right": False,
}
#: What a theme colours.
INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
PAGES = ("figure.facecolor", "axes.facecolor")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "assets", help="a folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, (record, draw) in PICTURES.items():
        found = read(record)
        path = folder / f"{name}.svg"
        theme = DARK if name.endswith("-dark") else LIGHT
        colours = dict.fromkeys(INKED, theme.ink) | dict.fromkeys(PAGES, theme.page)
        with mpl.rc_context(STYLE | colours):
            draw(found).savefig(path, metadata={"Date": None, "Creator": None})
        print(f"written to {path}")


def read(record: str) -> dict:
    """A file of docs/results, or the part of all.json that a benchmark wrote: "all.json NAME"."""
    file, _, bench = record.partition(" ")
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found["benches"][bench]["result"] if bench else found


def machine(found: dict) -> str:
    facts = found["machine"]
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"


def stability(found: dict, theme: Theme) -> Figure:
    """Gradient norm of a guarded run, and its loss beside that of the plain loop."""
    cells = {cell["recipe"]: cell for cell in found["cells"].values() if "losses" in cell}
    plain, guarded = cells["before"], cells["before, guarded"]
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    draw_line(above, guarded["norms"], theme.ours, 1.2, "grad_norm with the guard")
    top = 10 * max(norm for norm in guarded["norms"] if norm is not None)
    lost = [i for i in guarded["bad"] if guarded["norms"][i] is None]
    above.plot(lost, [top] * len(lost), "x", color=theme.torch, markersize=7, label="NaN or Inf")
    skipped = guarded["skipped"]
    above.plot(
        skipped, [3 * top] * len(skipped), "v", color=theme.ink, markersize=6, label="step skipped"
    )
    draw_line(below, plain["losses"], theme.torch, 2.2, "clip_grad_norm_ and AdamW")
    draw_line(below, guarded["losses"], theme.ours, 1.2, "the same with GradGuard")
    end = plain["losses"].index(None)
    last = plain["losses"][end - 1]
    below.plot(end - 1, last, "X", color=theme.torch, markersize=10)
    below.text(end + 1.5, 1.5 * last, "NaN from here on", color=theme.torch, fontsize=8)
    for axes in (above, below):
        axes.set_yscale("log")
        for step in guarded["bad"]:
            axes.axvline(step, color=theme.ink, linewidth=0.6, linestyle=":", zorder=0)
    below.set_yticks([3, 5, 10, 20], ["3", "5", "10", "20"])
    below.minorticks_off()
    above.set_ylim(1, 20 * top)
    for turn, step in enumerate(guarded["bad"]):
        above.text(step + 1.5, 20 * top, TURNS[turn % len(TURNS)], fontsize=8, va="top")
    above.set_ylabel("gradient norm")
    below.set_ylabel("loss of the batch")
    below.set_xlabel("step")
    above.legend(loc="lower left", frameon=False, fontsize=8, ncols=3)
    below.legend(loc="upper center", framealpha=1, edgecolor="none", fontsize=8)
    return figure


def draw_line(axes, values: list[float | None], colour: str, width: float, label: str) -> None:
    """A line with a gap where a value is missing."""
    known = [math.nan if value is None else value for value in values]
    axes.plot(known, color=colour, linewidth=width, label=label)


def parity(found: dict) -> Figure:
    """The loss of torch's loop and of a guarded one: the range of the seeds, by 5 steps each."""
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(1, 3), found["runs"].items(), strict=True):
        for loop, look in (
            ("torch", {"color": TORCH, "alpha": 0.35, "linewidth": 0}),
            ("fastguard", {"facecolor": "none", "edgecolor": OURS, "linewidth": 1}),
        ):
            means = [
                [statistics.mean(losses[i : i + 5]) for i in range(0, found["steps"], 5)]
                for losses in runs[loop]
            ]
            low, high = ([bound(step) for step in zip(*means, strict=True)] for bound in (min, max))
            axes.fill_between(range(2, found["steps"], 5), low, high, label=loop, **look)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel("loss, range of 3 seeds")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def optimizer_step(found: dict) -> Figure:
    """One guarded step, 45 M parameters."""
    case = next(name for name in found["step"] if name.startswith("45 M"))
    seconds = found["step"][case]["seconds"]
    return bars(seconds, "guard.step(fastguard.AdamW)", f"{case}\n{machine(found)}")


def norm_kernel(found: dict) -> Figure:
    """Norm and clipping, 45 M parameters."""
    case = next(name for name in found["cases"] if name.startswith("45 M"))
    seconds = found["cases"][case]
    return bars(seconds, "fastguard", f"{case}\n{machine(found)}")


def train_step(found: dict) -> Figure:
    """A training step of the teacher."""
    cases = [case for case in found["steps"] if "compiled" not in case]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(found["steps"][cases[0]])
    shades = [OURS, TORCH, OTHER, "#cbd5e1"]
    for place, (name, shade) in enumerate(zip(names, shades, strict=True)):
        ratios = [found["steps"][c][name] / found["steps"][c]["fastguard"] for c in cases]
        places = [i + (place - 1.5) * 0.2 for i in range(len(cases))]
        axes.bar(places, ratios, 0.19, color=shade, label=name)
    labels = [case.replace(", attention dropout", "\ndropout") for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=7.5)
    axes.set_ylabel("time / fastguard's")
    axes.set_ylim(top=2.25)
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper left")
    axes.set_title(machine(found), fontsize=8, loc="left")
    return figure


def attention_kernel(found: dict) -> Figure:
    """Attention, forward and backward, beside SDPA."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, dtype in zip(panels, ("fp32", "bf16"), strict=True):
        for suffix, colour, label in (
            (", dropout 0.1", OURS, "dropout 0.1"),
            (", causal", TORCH, "causal"),
            ("", INK, "plain"),
        ):
            points = speedups(found["kernels"], dtype, suffix)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
        axes.axhline(1, color=OTHER, linewidth=0.8)
        axes.set_yscale("log")
        axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axes.set_xlabel(f"T, {dtype}, (2, 8, T, 64)")
    panels[0].set_ylabel("time of SDPA + clamp / ours")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(machine(found), fontsize=8)
    return figure


def speedups(kernels: dict, dtype: str, suffix: str) -> list[tuple[int, float]]:
    """(T, SDPA / ours) of the rows of one kind, forward and backward together."""
    found = []
    for name, times in kernels.items():
        if fit := re.fullmatch(rf"{dtype}, T=(\d+){re.escape(suffix)}", name):
            found.append((int(fit[1]), times["SDPA"]["both"] / times["ours"]["both"]))
    return found


def bars(seconds: dict[str, float], ours: str, title: str) -> Figure:
    """Milliseconds by name, the slowest at the bottom."""
    rows = sorted(seconds.items(), key=lambda row: -row[1])
    figure = Figure(figsize=(8.4, 0.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in rows]
    milliseconds = [1e3 * value for _, value in rows]
    colours = [OURS if name.startswith(ours) else OTHER for name in names]
    drawn = axes.barh(names, milliseconds, color=colours, height=0.7)
    axes.bar_label(drawn, fmt="%.1f ms", padding=3, fontsize=8)
    axes.set_xlim(right=1.12 * max(milliseconds))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title, fontsize=8, loc="left")
    return figure


#: Of each picture its record and the function that draws it.
PICTURES = {
    "stability": ("stability.json", functools.partial(stability, theme=LIGHT)),
    "stability-dark": ("stability.json", functools.partial(stability, theme=DARK)),
    "parity": ("parity.json", parity),
    "optimizer_step": ("all.json optimizer_step", optimizer_step),
    "norm_kernel": ("all.json norm_kernel", norm_kernel),
    "train_step": ("all.json train_step", train_step),
    "attention_kernel": ("all.json attention_kernel", attention_kernel),
}

if __name__ == "__main__":
    main()
