"""The command: see tests/mutants/__init__.py."""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  every child needs it; it is loaded once
import pytest
import torch

from tests.simt import left_out

from . import Mutant, cpp, python

ROOT = Path(__file__).resolve().parents[2]
#: For each file the tests that have to see its mutants, the quickest first.
TESTS = {
    "fastguard/guard/grad_guard.py": (
        "guard/grad_guard guard/attached guard/outliers guard/rollback guard/accumulation "
        "guard/step_warnings guard/parameters guard/buffers guard/scale_search "
        "guard/distributed"
    ),
    "fastguard/guard/update.py": "guard/update guard/attached guard/peers",
    "fastguard/guard/attached.py": "guard/attached",
    "fastguard/guard/grad_scaler.py": (
        "guard/grad_scaler guard/attached guard/scale_search guard/accumulation guard/update"
    ),
    "fastguard/optim/fused.py": (
        "optim/checks optim/adam_torch optim/adam optim/packed_state optim/masters"
    ),
    "fastguard/optim/masters.py": "optim/masters",
    "fastguard/optim/packed_state.py": (
        "optim/checks optim/adam_torch optim/packed_state optim/adam optim/masters"
    ),
    "fastguard/optim/checks.py": "optim/checks guard/update",
    "fastguard/guard/accumulation.py": "guard/accumulation guard/distributed",
    "fastguard/guard/buffers.py": "guard/buffers guard/rollback",
    "fastguard/guard/rollback.py": "guard/rollback",
    "fastguard/guard/distributed.py": "guard/distributed",
    "fastguard/guard/parameters.py": "guard/parameters guard/grad_guard guard/update",
    "fastguard/clip.py": "clip clip_distributed",
    "fastguard/_tensors.py": "clip clip_distributed",
    "fastguard/guard/accounting.py": (
        "guard/budget guard/on_skip guard/grad_guard guard/rollback guard/guard_device"
    ),
    "fastguard/guard/decision.py": (
        "guard/grad_guard guard/outliers guard/rollback guard/parameters guard/distributed"
    ),
    "fastguard/guard/state.py": "guard/grad_guard guard/attached guard/rollback guard/tensor_norms",
    "fastguard/guard/report.py": "guard/report guard/scale_search guard/grad_guard",
    "fastguard/guard/report_files.py": (
        "guard/report guard/scale_search guard/grad_guard guard/outliers"
    ),
    "fastguard/guard/step_warnings.py": "guard/step_warnings",
    "fastguard/guard/lr_scheduler.py": "guard/attached",
    "fastguard/guard/module_names.py": "guard/module_names guard/parameters",
    "fastguard/thresholds.py": (
        "guard/grad_guard guard/outliers ops/guard_decide ops/guard_thresholds"
    ),
    "fastguard/guard/statistics.py": (
        "guard/tensor_norms guard/outliers guard/grad_guard guard/scale_search "
        "guard/step_warnings guard/accumulation"
    ),
    "csrc/decide.h": "guard/outliers guard/grad_guard ops/guard_decide ops/guard_thresholds",
}
_FAILED = 70  # the status of a child that could not run the tests


def files_of_tests(file: str) -> list[str]:
    """For "guard/report": tests/guard/test_report.py and its parts test_report_*.py."""
    found = []
    for name in TESTS[file].split():
        folder, _, stem = name.rpartition("/")
        files = sorted((ROOT / "tests" / folder).glob(f"test_{stem}*.py"))
        if not files:
            raise SystemExit(f"error: no tests/{folder}/test_{stem}*.py; mend TESTS")
        found += [str(path.relative_to(ROOT)) for path in files]
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", default="0", help="of the sample")
    args = parser.parse_args()
    if unknown := set(args.files) - TESTS.keys():
        parser.error(f"no tests are known for {', '.join(sorted(unknown))}: add them to TESTS")
    torch.set_num_threads(1)  # fork only copies the thread that calls it
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_of_the_repository(Path(folder) / "tree")
        for file in args.files or TESTS:
            drawn = sample(file, (tree / file).read_text(encoding="utf-8"), args.sample, args.seed)
            rows.append((file, *run_file(tree, file, drawn)))
    print(f"\n{'file':32} {'mutants':>7} {'caught':>7} {'survivors':>9}")
    for file, caught, survivors in rows:
        print(f"{file:32} {caught + len(survivors):7} {caught:7} {len(survivors):9}")
    caught, lived = sum(row[1] for row in rows), sum(len(row[2]) for row in rows)
    share = caught / max(1, caught + lived)
    print(f"{'all':32} {caught + lived:7} {caught:7} {lived:9}   {share:.1%} caught")
    for file, _, survivors in rows:
        for mutant in survivors:
            print(f"survived: {file}:{mutant.line}: {mutant.what}")
    return 0


def sample(file: str, source: str, count: int, seed: str) -> list[Mutant]:
    """A random sample, which depends on the file, the seed and the number of mutants."""
    every = (cpp if file.endswith(".h") else python).mutants(source)
    drawn = random.Random(f"{file} {seed}").sample(range(len(every)), min(count, len(every)))
    return [every[i]() for i in sorted(drawn)]


def run_file(tree: Path, file: str, drawn: list[Mutant]) -> tuple[int, list[Mutant]]:
    """The number of the file's mutants that its tests saw, and the mutants that they missed."""
    place, tests = tree / file, files_of_tests(file)
    original = place.read_text(encoding="utf-8")
    library = cpp.CpuLibrary(tree, file) if file.endswith(".h") else None
    start = time.monotonic()
    if (status := in_a_child(tree, tests, limit=3600)) != 0:
        raise SystemExit(f"{' '.join(tests)} fail without a mutant: status {status}")
    limit = 60 + 3 * (time.monotonic() - start)
    caught, survivors = 0, []
    for mutant in drawn:
        place.write_text(mutant.source, encoding="utf-8")
        if library is not None and not library.build():
            continue  # it does not compile, so it is no mutant
        status = in_a_child(tree, tests, limit)
        if status == _FAILED:
            raise SystemExit(f"the tests of {file}:{mutant.line} could not be run: {mutant.what}")
        print(f"{'survived' if status == 0 else 'caught'}: {file}:{mutant.line}: {mutant.what}")
        sys.stdout.flush()
        caught += status != 0
        survivors += [mutant] if status == 0 else []
    place.write_text(original, encoding="utf-8")
    if library is not None:
        library.build()
    return caught, survivors


def in_a_child(tree: Path, tests: list[str], limit: float) -> int | str:
    """pytest's status in a fork of this process, which has loaded torch; "late" after the limit."""
    child = os.fork()
    if child == 0:
        status = _FAILED
        with contextlib.suppress(BaseException):
            status = int(_pytest(tree, tests))
        os._exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _pytest(tree: Path, tests: list[str]) -> int:
    os.setsid()  # to end its processes with it
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "fastguard")]:
        del sys.modules[name]
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    return pytest.main([*options, *tests], plugins=[left_out])


def copy_of_the_repository(tree: Path) -> Path:
    """A copy of all tracked files in their present state, and of the built libraries."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    libraries = [f"fastguard/{name}" for name in ("_cpu.so", "_cuda.so")]
    for name in [*listed, *libraries]:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


if __name__ == "__main__":
    sys.exit(main())
