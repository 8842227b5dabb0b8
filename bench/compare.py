"""Two checkouts of fastguard in one run: is a step slower than it was?

    python bench/compare.py BEFORE [AFTER] [--rounds N] [--json FILE]

Runs bench/optimizer_step.py of each checkout by turns, in processes of their own, and prints the
median over the rounds of each row's seconds and of its ratio, after / before, round by round. Rows
of torch run the same code in both: how far their ratios are from 1 is the noise of the comparison.
Each checkout needs its libraries built (``python setup.py build_ext --inplace``).
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
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
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
