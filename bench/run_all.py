"""Every benchmark of the CPU in one go, into one JSON file and one page.

    python bench/run_all.py [--json docs/results/all.json] [--page docs/results/all.md]
                            [--only NAME [NAME ...]] [--quick]

Each benchmark is a process of its own, one after the other. The file has what each wrote with
--json (medians, percentiles, the machine and its load), its command, its seconds and what it
printed. It is written after each benchmark, so that Ctrl-C loses one at most. The page begins with
the table of targets, which compares the figures of this run with what was aimed at.

--quick takes few repeats: it shows that all of them run. Its figures say little.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optimizer_step
import train_step
from timing import table, write_json

from fastguard.env import describe, processor, version

HERE = Path(__file__).resolve().parent
BENCHES = (
    "optimizer_step", "norm_kernel", "accumulate", "busy_cores", "master_weights",
    "attention_kernel", "train_step",
)  # fmt: skip
QUICK = ("--repeats", "3")

BIG = "45 M fp32 in 600 tensors (300 matrices, 300 vectors)"
SMALL = "2000 tensors of 64 fp32"


class Target(NamedTuple):
    """What a ratio should be at least, or at most."""

    work: str
    goal: float
    at_most: bool
    bench: str
    ratio: Callable[[dict], float]  # of the benchmark's JSON

    def met(self, found: float) -> bool:
        return found <= self.goal if self.at_most else found >= self.goal


def step_ratio(case: str, above: str, below: str) -> Callable[[dict], float]:
    def ratio(result: dict) -> float:
        seconds = result["step"][case]["seconds"]
        return seconds[above] / seconds[below]

    return ratio


def norm_ratio(case: str) -> Callable[[dict], float]:
    def ratio(result: dict) -> float:
        seconds = result["cases"][case]
        clipping = "clip_grad_norm_, clipping"
        return seconds[f"torch {clipping}"] / seconds[f"fastguard.{clipping}"]

    return ratio


def train_ratio(title: str, row: str) -> Callable[[dict], float]:
    return lambda result: result["steps"][title][row] / result["steps"][title][train_step.OURS]


def busy_ratio(result: dict) -> float:
    busy = next(value for name, value in result.items() if name.startswith("busy"))
    alone = result["alone, one thread"]
    return busy[optimizer_step.OURS]["median"] / alone[optimizer_step.OURS]["median"]


def accumulate_ratio(result: dict) -> float:
    seconds = result["seconds"]["fp16, 45000000"]
    return seconds["fastguard"] / min(seconds["torch"], seconds["torch, own dtype"])


OURS, FUSED = optimizer_step.OURS, optimizer_step.FUSED_BASELINE
TARGETS = [
    Target("guard.step(fastguard.AdamW) / torch's AdamW(fused=True).step() alone", 1.0, True,
           "optimizer_step", step_ratio(BIG, OURS, optimizer_step.BARE)),
    Target("clip_grad_norm_ + AdamW(fused=True) / guard.step", 1.9, False,
           "optimizer_step", step_ratio(BIG, FUSED, OURS)),
    Target("clip_grad_norm_ + AdamW() / guard.step", 3.8, False,
           "optimizer_step", step_ratio(BIG, optimizer_step.DEFAULT_BASELINE, OURS)),
    Target("1000 tensors of 8, clipping: torch / ours", 8.0, False,
           "norm_kernel", norm_ratio("1000 tensors of 8 fp32")),
    Target("2000 tensors of 64: clip + fused / guard.step", 5.0, False,
           "optimizer_step", step_ratio(SMALL, FUSED, OURS)),
    Target("2000 tensors of 64 on busy cores / alone with one thread", 1.5, True,
           "busy_cores", busy_ratio),
    Target("bf16, 45 M, clipping: torch / ours", 3.0, False,
           "norm_kernel", norm_ratio(BIG.replace("fp32", "bf16"))),
    Target("fp16 accumulate: ours / torch's add_, the faster of two", 1.2, True,
           "accumulate", accumulate_ratio),
    Target("teacher, bf16, 2 x 5 s: stock with AdamW() / ours", 2.0, False,
           "train_step", train_ratio("bf16, 2 x 5 s", train_step.STOCK)),
    Target("teacher, bf16, 2 x 5 s: stock with AdamW(fused=True) / ours", 1.6, False,
           "train_step", train_ratio("bf16, 2 x 5 s", train_step.STOCK_FUSED)),
    Target("teacher, bf16, 2 x 15 s, attention dropout 0.1: stock fused / ours", 1.9, False,
           "train_step",
           train_ratio("bf16, 2 x 15 s, attention dropout 0.1", train_step.STOCK_FUSED)),
    Target("teacher, fp32, 2 x 5 s: stock fused / ours", 1.25, False,
           "train_step", train_ratio("fp32, 2 x 5 s", train_step.STOCK_FUSED)),
    Target("teacher, bf16, 2 x 5 s, both compiled: stock fused / ours", 1.3, False,
           "train_step", train_ratio("bf16, 2 x 5 s, compiled", train_step.STOCK_FUSED)),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = HERE.parent / "docs" / "results"
    parser.add_argument("--json", type=Path, default=results / "all.json", help="%(default)s")
    parser.add_argument("--page", type=Path, default=results / "all.md", help="%(default)s")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    args = parser.parse_args()
    found = {"machine": machine(), "benches": {}}
    try:
        for name in args.only:
            found["benches"][name] = run(name, QUICK if args.quick else ())
            write_json(args.json, found)
    except KeyboardInterrupt:
        sys.exit(130)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(found), encoding="utf-8")
    print(f"written to {args.page}\n\n{targets_table(found['benches'])}")


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "processors": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "fastguard": version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **describe(),
    }


def run(name: str, options: tuple[str, ...]) -> dict:
    """What a benchmark wrote and printed; its output is also shown here."""
    command = [f"bench/{name}.py", *options]
    print(f"+ python {' '.join(command)}", flush=True)
    start, load = time.perf_counter(), os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        process = subprocess.Popen(
            [sys.executable, *command, "--json", str(path)],
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait():
            sys.exit(f"error: bench/{name}.py ended with {process.returncode}; see above")
        result = json.loads(path.read_text(encoding="utf-8"))
    return {
        "command": f"python {' '.join(command)}",
        "seconds": round(time.perf_counter() - start, 1),
        "load before": load,
        "load after": os.getloadavg(),
        "result": result,
        "printed": "".join(line for line in lines if str(path) not in line),
    }


def targets_table(benches: dict[str, dict]) -> str:
    rows = []
    for target in TARGETS:
        if target.bench not in benches:
            continue
        found = target.ratio(benches[target.bench]["result"])
        sign = "<=" if target.at_most else ">="
        word = "met" if target.met(found) else "missed"
        rows.append([target.work, f"{sign} {target.goal:.2f}", f"{found:.2f}", word])
    return table("Targets, by the figures of this run", ["work", "goal", "found", ""], rows)


def page(found: dict) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in found["machine"].items())
    parts = [
        "# All benchmarks of one run\n",
        "Written by `python bench/run_all.py`. Figures are medians; the JSON file beside this page "
        "has the 10th and the 90th percentile too.\n",
        facts + "\n",
        f"```text\n{targets_table(found['benches'])}\n```\n",
    ]
    for name, bench in found["benches"].items():
        before, after = (f"{bench[f'load {when}'][0]:.1f}" for when in ("before", "after"))
        parts.append(f"## {name}\n")
        parts.append(f"`{bench['command']}`, {bench['seconds']:.0f} s, load {before} to {after}.\n")
        parts.append(f"```text\n{bench['printed'].strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
