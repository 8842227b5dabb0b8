"""``python -m fastguard.env``: what was built, and what this machine chose of it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, ops
from ._command import exit_status
from ._io import terminal
from ._table import facts
from .ops import _library


def describe() -> dict[str, str]:
    """One line of text per fact, in the order in which one asks for them."""
    cpu, cuda = ops.cpu_info(), ops.cuda_info()
    return {
        "python": platform.python_version(),
        "torch running": torch.__version__,
        "torch built against": f"{cpu['torch']} (Stable ABI, target 2.11)" if cpu else "-",
        "CPU kernels": f"built by {cpu['compiler']}"
        if cpu
        else f"not in use: {_library.cpu_problem}",
        "instruction sets compiled": cpu.get("compiled", "-"),
        "instruction set chosen": _chosen(cpu.get("chosen", "-")),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "CUDA kernels": (
            f"sm {cuda['archs']}, nvcc {cuda['toolkit']}"
            if cuda
            else f"not in use: {_library.cuda_problem}"
        ),
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
        or "none",
    }


def _chosen(name: str) -> str:
    """The default one has vectors on ARM, and none elsewhere."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return "default (NEON)" if arm and name == "default" else name


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    lines = said.splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version() -> str:
    """fastguard's version, and the commit of a checkout, with + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} at {commit.strip()}"


@terminal.command
def main() -> int:
    """Exit status: 0 done, 1 the output could not be written, 130 stopped by Ctrl-C."""
    return exit_status(_print, OSError)


def _print() -> None:
    print("\n".join(facts(describe())))


if __name__ == "__main__":
    sys.exit(main())
