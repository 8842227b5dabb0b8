"""The machine and the checkout: a description, a build if a library is missing, the tests."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fastguard import env
from fastguard.ops import _library

from .report import Report, tail

#: The folder of setup.py and tests/, unless the package was installed without them.
CHECKOUT = Path(__file__).resolve().parent.parent.parent


def no_gpu() -> str | None:
    """The reason why there is nothing to check; None on a machine with a GPU."""
    if torch.cuda.is_available():
        return None
    why = "torch finds no CUDA device; `nvidia-smi` must list one, and its driver must be as new "
    why += f"as CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} was built without CUDA; install one with, see pytorch.org"
    return (
        "no CUDA device: nothing to check here; run `python -m fastguard.gpucheck` on a machine "
        f"with an NVIDIA GPU ({why})"
    )


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def free_memory(device: torch.device) -> float:
    """Free memory of the GPU in bytes; infinite for the CPU, whose memory is not checked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


# --- what is there ------------------------------------------------------------------------------


def environment(report: Report, device: torch.device) -> None:
    report.facts(describe(device) | env.describe())
    problems = {"CPU": _library.cpu_problem, "CUDA": _library.cuda_problem}
    for name, problem in problems.items():
        if problem is not None and (name == "CPU" or device.type == "cuda"):
            report.fail(
                f"{name} library",
                f"FAILED  the {name} library is not in use: {problem}\n        {suggestion(name)}\n"
                "        The following checks run the pure-torch references in its place.",
            )


def describe(device: torch.device) -> dict[str, str]:
    commit = "installed without its sources"
    if (CHECKOUT / "setup.py").is_file():  # otherwise git might find an unrelated repository
        commit = _output("git", "-C", CHECKOUT, "describe", "--always", "--dirty")
    facts = {"fastguard commit": commit}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "GPU": gpu.name,
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": str(gpu.multi_processor_count),
            "memory": f"{gpu.total_memory / 2**30:.1f} GiB, {free_memory(device) / 2**30:.1f} free",
            "driver": _output(*driver).split("\n")[0],
            "CUDA of torch": str(torch.version.cuda),
        }
    return facts


def _output(*command) -> str:
    try:
        run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    return run.stdout.strip() or "?"


def suggestion(name: str) -> str:
    if name == "CUDA" and torch.version.cuda is None:
        return "Install a torch with CUDA (pytorch.org), then `pip install -e .` once more."
    tool = "a C++20 compiler" if name == "CPU" else f"the CUDA toolkit {torch.version.cuda} (nvcc)"
    if not (CHECKOUT / "setup.py").is_file():
        return f"Install {tool} and build from a checkout of the sources: `pip install -v -e .`"
    return (
        f"Install {tool}, put it on the PATH, then `python setup.py build_ext --inplace` in "
        f"{CHECKOUT} shows what is wrong"
    )


# --- a build ------------------------------------------------------------------------------------


def can_build() -> bool:
    """Whether a library is missing that this machine has the tools and the sources for."""
    missing = _library.cuda_problem is not None and torch.version.cuda is not None
    return missing and (CHECKOUT / "setup.py").is_file() and find_nvcc() is not None


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def build(log: Path) -> None:
    """Build in place; the output of the compilers goes to ``log``. setup.py does not fail."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    print(
        f"the CUDA library is not in use ({_library.cuda_problem}), but nvcc is here: "
        f"{find_nvcc()}\nbuilding it, some minutes: {' '.join(command)} in {CHECKOUT}",
        flush=True,
    )
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, cwd=CHECKOUT, stdout=file, stderr=subprocess.STDOUT)


def say_built(report: Report, log: Path) -> None:
    if _library.cuda_problem is None:
        report.line("The CUDA library was missing; this command built it.\n")
    else:
        said = tail(log.read_text(encoding="utf-8", errors="replace"), 40)
        report.line(f"The build of the CUDA library failed. The end of its output:\n{said}\n")


# --- tests --------------------------------------------------------------------------------------


def tests(report: Report) -> None:
    """Run ``pytest -m cuda`` on the tests of the checkout."""
    if not (CHECKOUT / "tests" / "conftest.py").is_file():
        report.line(
            "passed over: this installation has no tests/ beside it; they are in a checkout"
        )
        return
    if missing := [m for m in ("pytest", "hypothesis") if importlib.util.find_spec(m) is None]:
        report.line(f"passed over: no {' and no '.join(missing)}; `pip install -e .[test]`")
        return
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    report.line(" ".join(["python", *command[1:]]))
    run = subprocess.run(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    report.line(tail(run.stdout, 40 if run.returncode else 3))
    if run.returncode != 0:
        report.fail("pytest -m cuda", f"FAILED  pytest ended with {run.returncode}")
