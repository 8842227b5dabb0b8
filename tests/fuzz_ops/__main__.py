"""``python -m tests.fuzz_ops``: runs cases for a given time, in separate processes."""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastguard import ops
from tests import fuzz_ops
from tests.guard_pages import Plain

from .case import draw, run_case

ROOT = Path(__file__).resolve().parents[2]


def run_batch(seed: int, seconds: float) -> None:
    """Run cases until the time is over; print a line of JSON for each begin, failure and end."""
    print(json.dumps({"capability": ops.cpu_info().get("chosen")}), flush=True)
    torch.set_num_threads(1 + seed % 2)
    counts = collections.Counter()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        print(json.dumps({"begins": number}), flush=True)
        try:
            counts[" ".join(run_case(seed, number))] += 1
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            print(json.dumps({"case": f"{seed}:{number}", "failed": said[:1000]}), flush=True)
        number += 1
    print(json.dumps({"counts": counts}), flush=True)


def start_batch(seed: int, seconds: float, capability: str) -> tuple[dict, list[str]]:
    """Run a batch in a new process; returns the counts of accepted and refused cases, failures."""
    command = [sys.executable, "-m", "tests.fuzz_ops", "--batch", str(seed), "--seconds"]
    try:
        done = subprocess.run(
            [*command, str(seconds)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "FASTGUARD_CPU_CAPABILITY": capability}, timeout=seconds + 120,
        )  # fmt: skip
        printed, status, said = done.stdout, done.returncode, done.stderr[-500:]
    except subprocess.TimeoutExpired as error:
        printed, status, said = (error.stdout or b"").decode(), "timeout", ""
    lines = [json.loads(line) for line in printed.splitlines()]
    failures = [f"{line['case']} {line['failed']}" for line in lines if "failed" in line]
    if status != 0:
        begun = [line["begins"] for line in lines if "begins" in line]
        where = f"case {seed}:{begun[-1]}" if begun else "before the first case"
        failures.append(f"{where} under {capability} ended with status {status}: {said}")
    counts = next((line["counts"] for line in lines if "counts" in line), {})
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_ops", description=fuzz_ops.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", metavar="SEED:NUMBER", help="run this one in this process")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch is not None:
        run_batch(args.batch, args.seconds)
        return 0
    if args.case:
        seed, number = map(int, args.case.split(":"))
        print(draw(seed, number, Plain())[:2])
        print(*run_case(seed, number))
        return 0
    counts, failures = fuzz(args.seconds, args.seed)
    for failure in failures:
        print(failure)
    for key, count in sorted(counts.items()):
        print(f"{count:8} {key}")
    print(f"{sum(counts.values())} cases, {len(failures)} failures")
    return 1 if failures else 0


def fuzz(seconds: float, seed: int) -> tuple[collections.Counter, list[str]]:
    """Run batches of at most 20 seconds, with each instruction set in turn."""
    counts, failures = collections.Counter(), []
    capabilities = ops.cpu_info()["compiled"].split()
    end, batch = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1:
        capability = capabilities[batch % len(capabilities)]
        found, failed = start_batch(1000 * seed + batch, min(left, 20.0), capability)
        counts.update(found)
        failures += failed
        batch += 1
    return counts, failures


if __name__ == "__main__":
    sys.exit(main())
