"""The CPU's kernels compiled for ARM with NEON, run by qemu: no ARM machine is needed.

kernels.cpp prints the results of all kernels on fixed inputs. Those of the optimizer and of
gradients are bitwise equal on every instruction set. Sums of layers and of attention have another
order, and another exp. The operators themselves are not run: torch for ARM is not at hand.
"""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# As in setup.py, with less optimisation.
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-DFASTGUARD_CAPABILITY=default", "-Icsrc"]
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ULPS = 8  # of the largest element of a result: sums of up to 74 products, in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name -> elements of each result, of this machine and of ARM."""
    folder = tmp_path_factory.mktemp("arm")
    compilers = {"here": "g++", "arm": "aarch64-linux-gnu-g++"}
    for program in (*compilers.values(), "qemu-aarch64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is absent: apt-get install g++-aarch64-linux-gnu qemu-user")
    sources = sorted(Path(ROOT, "csrc/cpu").glob("*_kernel.cpp"))
    sources = [str(s) for s in sources if not s.name.endswith("_bf16_kernel.cpp")]
    found = {}
    for name, compiler in compilers.items():
        program = folder / name
        command = [compiler, *FLAGS, "tests/arm/kernels.cpp", *sources, "-static"]
        subprocess.run([*command, "-o", str(program)], cwd=ROOT, check=True)
        run = ["qemu-aarch64", str(program)] if name == "arm" else [str(program)]
        printed = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = [parsed(line) for line in printed.splitlines()]
    return found


def parsed(line):
    """What must be equal, the name of the result, and its elements."""
    words = line.split()
    first = next((i for i, word in enumerate(words) if is_number(word)), len(words))
    return words[0], " ".join(words[1:first]), [float.fromhex(word) for word in words[first:]]


def is_number(word):
    return word.startswith(("0x", "-0x", "nan", "inf", "-inf"))


def is_same(a, b):
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def test_the_same_results_are_printed(results):
    here, arm = ([(name, len(elements)) for _, name, elements in r] for r in results.values())
    assert here == arm
    assert len(here) > 200


def test_gradients_and_optimizer_have_the_same_bits(results):
    for (kind, name, here), (_, _, arm) in zip(*results.values(), strict=True):
        if kind == "bits":
            differ = [(i, a, b) for i, (a, b) in enumerate(zip(here, arm, strict=True))
                      if not is_same(a, b)]  # fmt: skip
            assert not differ, (name, differ[:3])


def test_layers_and_attention_are_near(results):
    for (kind, name, here), (_, _, arm) in zip(*results.values(), strict=True):
        if kind == "near":
            epsilon = next(EPSILON[word] for word in name.split() if word in EPSILON)
            assert all(map(math.isfinite, here)), name
            most = ULPS * epsilon * max(1.0, *map(abs, here))
            worst = max(abs(a - b) for a, b in zip(here, arm, strict=True))
            assert worst <= most, (name, worst)


def test_the_arm_build_has_vectors_of_floats():
    """A build that fell back to arrays would have the same results."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("aarch64-linux-gnu-g++ is absent")
    command = ["aarch64-linux-gnu-g++", *FLAGS, "-E", "-dM", "-include", "cpu/vector.h"]
    macros = subprocess.run(
        [*command, "-xc++", os.devnull], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert "#define FASTGUARD_NEON" in macros
