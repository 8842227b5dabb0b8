"""The pictures of README.md and docs/, drawn from the records in docs/results.

    python bench/plots.py [--output docs/assets]

Each picture names its record and the machine. Its background is white and opaque, so that it reads
the same on a light and on a dark page.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
OURS, TORCH, OTHER, INK = "#0f766e", "#c2410c", "#94a3b8", "#334155"

STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "fastguard",  # the same file from the same record
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "assets", help="a folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, (record, draw) in PICTURES.items():
            figure = draw(json.loads((RESULTS / record).read_text(encoding="utf-8")))
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            print(f"written to {path}")


def machine(found: dict) -> str:
    facts = found["machine"]
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"


def explosion(found: dict) -> Figure:
    """Loss and gradient norm of three runs on the same batches."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = {"AdamW": OTHER, "clip_grad_norm_ + AdamW": TORCH, "fastguard": OURS}
    for (name, run), width in zip(found["runs"].items(), (2.6, 1.8, 1.1), strict=True):
        losses = [value for value in run["loss"] if value is not None]
        above.plot(losses, color=colours[name], linewidth=width, label=name)
        if len(losses) < len(run["loss"]):
            above.plot(len(losses) - 1, losses[-1], "X", color=colours[name], markersize=9)
    guarded = found["runs"]["fastguard"]
    norms = [float("nan") if norm is None else norm for norm in guarded["grad_norm"]]
    below.plot(norms, color=OURS, linewidth=1.1)
    top = 10 * max(norm for norm in norms if norm == norm)
    below.plot(guarded["skipped"], [top] * len(guarded["skipped"]), "v", color=INK, markersize=5)
    for axes in (above, below):
        axes.set_yscale("log")
        for step in found["loud"] + found["nan"]:
            axes.axvline(step, color=INK, linewidth=0.6, linestyle=":", zorder=0)
    limits = above.get_ylim()
    for step in found["loud"]:
        above.text(step + 2, limits[1] * 0.6, "input × 10⁴", fontsize=7.5)
    for step in found["nan"]:
        above.text(step + 2, limits[1] * 0.6, "one NaN: both others end", fontsize=7.5)
    above.set_ylabel("held-out loss")
    below.set_ylabel("grad_norm,\nfastguard")
    below.set_ylim(top=10 * top)
    below.set_xlabel("step (▼ skipped by the guard)")
    above.legend(loc="lower left", frameon=False, fontsize=8)
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
    cases = list(found["steps"])
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
    "explosion": ("explosion.json", explosion),
    "optimizer_step": ("optimizer_step_cpu.json", optimizer_step),
    "norm_kernel": ("norm_kernel_cpu.json", norm_kernel),
    "train_step": ("train_step_cpu.json", train_step),
    "attention_kernel": ("attention_kernel_cpu.json", attention_kernel),
}

if __name__ == "__main__":
    main()
