"""Two checkouts of fastguard in one run: is a step slower than it was?

    python bench/compare.py BEFORE [AFTER] [--rounds N] [--json FILE]
    python bench/compare.py BEFORE [AFTER] --train asterisk [--steps N] [--rounds N]

Runs bench/optimizer_step.py of each checkout by turns, in processes of their own, and prints the
median over the rounds of each row's seconds and of its ratio, after / before, round by round. Rows
of torch run the same code in both: how far their ratios are from 1 is the noise of the comparison.
Each checkout needs its libraries built (``python setup.py build_ext --inplace``).

With --train each checkout takes the first steps of ``train --stable`` on that corpus. The seconds
of a step are the trainer's own, and contain the loading of its batch; the first five are left out.
The largest difference of the losses says whether both train alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import table, write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("before", type=Path, help="the checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=here, help="default: this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", metavar="DATA", help="compare training steps on this corpus")
    parser.add_argument("--steps", type=int, default=40, help="of training (default: 40)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if args.train:
        write_json(args.json, compare_training(args))
        return
    rounds = []
    for k in range(args.rounds):
        trees = [("before", args.before), ("after", args.after)]
        seconds = {name: measured(tree) for name, tree in (trees if k % 2 == 0 else trees[::-1])}
        rounds.append(seconds)
        print(f"round {k + 1} of {args.rounds}", file=sys.stderr, flush=True)
    write_json(args.json, {"rounds": rounds, "rows": compared(rounds)})


def measured(tree: Path) -> dict[str, dict[str, float]]:
    """The seconds of each row of each case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "bench/optimizer_step.py", "--json", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        figures = json.loads(path.read_text(encoding="utf-8"))
    return {f"{case}, step": result["seconds"] for case, result in figures["step"].items()}


FIRST = 5  # steps that are not counted


def compare_training(args: argparse.Namespace) -> dict:
    trees = {"before": args.before.resolve(), "after": args.after.resolve()}
    steps: dict[str, list[list[dict]]] = {name: [] for name in trees}
    for k in range(args.rounds):
        for name in list(trees) if k % 2 == 0 else list(trees)[::-1]:
            steps[name].append(trained(trees[name], args.train, args.steps))
        print(f"round {k + 1} of {args.rounds}", file=sys.stderr, flush=True)
    seconds = {
        name: [sum(float(step["seconds"]) for step in run[FIRST:]) for run in runs]
        for name, runs in steps.items()
    }
    ratio = statistics.median(b / a for b, a in zip(*seconds.values(), strict=True))
    losses = ([float(step["loss"]) for step in runs[0]] for runs in steps.values())
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    before, after = (statistics.median(s) / (args.steps - FIRST) * 1e3 for s in seconds.values())
    row = [f"train --stable --data {args.train}", f"{before:.1f}", f"{after:.1f}", f"{ratio:.2f}"]
    header = ["", "before, ms a step", "after", "before / after", "losses apart"]
    print(table("Training steps", header, [[*row, f"{apart:.4f}"]]))
    return {"seconds": seconds, "before / after": ratio, "losses apart": apart}


def trained(tree: Path, data: str, steps: int) -> list[dict]:
    """The records of the steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "fastguard.train", "--stable", "--data", data]
        command += ["--max-steps", str(steps), "--run-dir", str(run)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def compared(rounds) -> dict[str, dict[str, tuple[float, float, float]]]:
    result = {}
    for case, names in rounds[0]["before"].items():
        result[case] = {}
        for name in names:
            before = [r["before"][case][name] for r in rounds]
            after = [r["after"][case][name] for r in rounds]
            ratio = statistics.median(a / b for a, b in zip(after, before, strict=True))
            result[case][name] = statistics.median(before), statistics.median(after), ratio
        rows = [
            [name, f"{b * 1e3:.3f}", f"{a * 1e3:.3f}", f"{ratio:.2f}"]
            for name, (b, a, ratio) in result[case].items()
        ]
        print(table(case, ["", "before, ms", "after, ms", "after / before"], rows), end="\n\n")
    return result


if __name__ == "__main__":
    main()
