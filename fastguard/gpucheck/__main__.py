"""``python -m fastguard.gpucheck``: all checks that need a machine with a GPU.

The command builds the CUDA library if it is missing. It compares every operator with its reference
over a grid of sizes, dtypes and layouts, runs whole guarded steps and the tests marked ``cuda``,
and measures times beside torch's. It also writes its output to a file that users can attach to an
issue.
"""

import argparse
import functools
import logging
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastguard._command import exit_status
from fastguard._io import terminal

from . import machine, timing
from .cases import QUICK, Grid
from .checks import Check, DeviceLost, lost_device, run_check
from .guarded import GUARDED
from .operators import OPERATORS
from .properties import PROPERTIES
from .report import Report

#: Fills a section of the report.
Part = Callable[[], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.gpucheck",
        description=__doc__.split("\n", 1)[1].strip(),
        epilog="Exit status: 0 all is well or there is no GPU, 1 something failed, 2 wrong usage, "
        "130 stopped by Ctrl-C (the report holds what was done).",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the report's file (default: fastguard_gpucheck_GPU_DATE.txt in this folder)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and smaller tensors")
    parser.add_argument(
        "--repeats", type=_positive, default=21, help="of each timing (default: %(default)s)"
    )
    parser.add_argument("--no-tests", action="store_true", help="leave out `pytest -m cuda`")
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda",
        help="cuda, or cuda:1 and so on; cpu tries this command itself (default: %(default)s)",
    )
    parser.add_argument("--built", type=Path, help=argparse.SUPPRESS)  # the log of a build
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"must be cuda or cpu, got {text}")
    return device


@terminal.command
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: _run(args, sys.argv[1:] if argv is None else argv), OSError)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    if args.device.type == "cuda":
        if (reason := machine.no_gpu()) is not None:
            print(reason)
            return 0
        args.device = torch.device("cuda", args.device.index or 0)
        if args.device.index >= torch.cuda.device_count():
            print(f"error: no {args.device}: {torch.cuda.device_count()} found", file=sys.stderr)
            return 2
        if args.built is None and machine.can_build():
            return _build_and_start_again(argv)
        torch.cuda.set_device(args.device)
    path = args.output or default_path(args.device)
    try:
        report = Report(path)
    except OSError as error:
        print(f"error: cannot write the report: {error}; choose --output", file=sys.stderr)
        return 2
    guard_log = logging.getLogger("fastguard")
    level = guard_log.level
    guard_log.setLevel(logging.ERROR)  # the checks give bad batches on purpose; hide the warnings
    try:
        return check(report, args.device, parts(report, args))
    finally:
        guard_log.setLevel(level)
        report.close()


def _build_and_start_again(argv: list[str]) -> int:
    """Build, and run the command again in a new process, which loads the new library."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "build.log")
        try:
            machine.build(log)
            again = [sys.executable, "-m", "fastguard.gpucheck", *argv, "--built", str(log)]
            return subprocess.run(again).returncode
        except KeyboardInterrupt:
            return 130


def default_path(device: torch.device) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine.name(device)).strip("-")
    return Path(f"fastguard_gpucheck_{name}_{time.strftime('%Y-%m-%d-%H%M')}.txt")


def parts(report: Report, args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """The titles of the report's sections in order, each with the function that writes it."""
    device, grid = args.device, QUICK if args.quick else Grid()

    def run(checks: list[Check]) -> Part:
        def run_all():
            for each in checks:
                run_check(each, device, grid, report)

        return run_all

    def environment():
        if args.built is not None:
            machine.say_built(report, args.built)
        machine.environment(report, device)

    workloads = [w for w in timing.WORKLOADS if not args.quick or w.count < 1e8]
    yield "Environment", environment
    yield "Operators against their references in float64 on the CPU", run(OPERATORS)
    yield "Operators together", run(PROPERTIES)
    yield "Guarded steps", run(GUARDED)
    if not args.no_tests and device.type == "cuda":
        yield "Tests", functools.partial(machine.tests, report)
    times = functools.partial(timing.measure, report, device, args.repeats, workloads)
    yield f"Times, measured on this {machine.name(device)}", times


def check(report: Report, device: torch.device, parts: Iterable[tuple[str, Part]]) -> int:
    """Write all sections, also after a failure in one; returns the exit status."""
    report.line(f"fastguard gpucheck, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    stopped = False
    try:
        for title, fill in parts:
            report.section(title)
            _fill(report, device, title, fill)
    except DeviceLost as error:
        report.fail(
            "all that was to come",
            f"FAILED  CUDA's context is broken, {error}\nThe rest cannot run. To see which kernel "
            "it was, start again with CUDA_LAUNCH_BLOCKING=1 set, or under compute-sanitizer.",
        )
    except KeyboardInterrupt:
        stopped = True
    report.section("Result")
    if stopped:
        report.line("stopped by Ctrl-C: the result covers the checks that ran before")
    report.line(f"FAILED: {', '.join(report.failed)}" if report.failed else "nothing failed")
    report.line(f"This report is in {report.path.resolve()}: please attach it to an issue.")
    return 130 if stopped else int(bool(report.failed))


def _fill(report: Report, device: torch.device, title: str, fill: Part) -> None:
    try:
        fill()
    except DeviceLost:
        raise
    except Exception:
        report.fail(title, f"FAILED  {traceback.format_exc()}")
        if (lost := lost_device(device)) is not None:
            raise DeviceLost(f"in {title}: {lost}") from None


if __name__ == "__main__":
    sys.exit(main())
