"""What setup.py builds, with and without the tools; and that it holds under sanitizers."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import env, ops
from fastguard.ops import _library

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py as a module, with setup() itself switched off."""
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: None)
    spec = importlib.util.spec_from_file_location("fastguard_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder, headers=True):
    """Something that looks like a CUDA toolkit."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={folder}' >&2\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_a_cuda_home_without_headers_is_not_a_toolkit(setup_module, tmp_path, monkeypatch):
    real = toolkit(tmp_path / "real")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "bare", headers=False)))
    monkeypatch.setenv("CUDA_PATH", str(real))
    assert setup_module.find_cuda_home() == real


def test_a_wrapper_on_the_path_leads_to_its_toolkit(setup_module, tmp_path, monkeypatch):
    real = toolkit(tmp_path / "real")
    wrapper = tmp_path / "usr" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_module.find_cuda_home() == real


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")


@needs_compiler
def test_what_changed_is_compiled_again_and_nothing_else(
    setup_module, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    header, one, two = (tmp_path / name for name in ("a header.h", "one.cpp", "two.cpp"))
    header.write_text("constexpr int value = 1;\n")
    one.write_text('#include "a header.h"\nint one() { return value; }\n')
    two.write_text("int two() { return 2; }\n")

    def compiled(flags=("-I.",), force=False):
        """The sources that were compiled."""
        compilations = [
            setup_module.Compilation.of(["g++"], flags, source, "build")
            for source in ("one.cpp", "two.cpp")
        ]
        capfd.readouterr()
        setup_module.compile_(compilations, force)
        assert all((tmp_path / each.object).is_file() for each in compilations)
        return sorted(re.findall(r" -c (\S+) ", capfd.readouterr().out))

    def change(path, text):
        """Write the file some seconds after all else was written."""
        for file in tmp_path.rglob("*.*"):
            before = file.stat().st_mtime_ns - 10**10
            os.utime(file, ns=(before, before))
        path.write_text(text)

    assert compiled() == ["one.cpp", "two.cpp"]
    assert compiled() == []
    assert compiled(force=True) == ["one.cpp", "two.cpp"]
    assert compiled(["-I.", "-O2"]) == ["one.cpp", "two.cpp"]
    assert compiled(["-I.", "-O2"]) == []
    change(two, "int two() { return 3; }\n")
    assert compiled(["-I.", "-O2"]) == ["two.cpp"]
    change(header, "constexpr int value = 2;\n")
    assert compiled(["-I.", "-O2"]) == ["one.cpp"]
    header.unlink()
    with pytest.raises(setup_module.CompileError, match=r"^one\.cpp did not compile$"):
        compiled(["-I.", "-O2"])


def test_compile_commands_name_every_source_and_compile_none(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastguard").mkdir()
    shutil.copy(ROOT / "fastguard" / "__init__.py", tmp_path / "fastguard")
    done = subprocess.run(
        [sys.executable, "setup.py", "compile_commands"], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "FASTGUARD_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    sources = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("csrc/**/*.cpp")}
    assert {entry["file"] for entry in entries} == sources
    assert all(entry["directory"] == str(tmp_path) for entry in entries)
    assert all(entry["output"] in entry["arguments"] for entry in entries)
    assert not list(tmp_path.rglob("*.o"))


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
    )


def build(folder, **environment):
    """Build into ``folder``, as pip does in its isolated environment."""
    return run(
        sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp",
        folder / "temp", PYTHONWARNINGS="ignore", **environment,
    )  # fmt: skip


def test_the_package_of_this_environment_has_its_kernels():
    """A broken build would leave the references in use and every other test green."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler on this machine")
    assert _library.cpu_problem is None
    assert ops.cpu_info()["compiled"].split()[0] == "default"


def test_the_cuda_library_loads_without_a_gpu():
    """Its code is for every architecture promised; the op itself needs a GPU to run."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    assert _library.cuda_problem is None
    assert ops.cuda_info()["archs"] == "80 90 100 120 PTX"
    library = Path(fastguard.__file__).with_name("_cuda.so")
    needed = run("readelf", "-d", library).stdout
    assert "libtorch_cuda" in needed
    assert "libcudart" not in needed  # static


@pytest.mark.parametrize("name", ["_cpu.so", "_cuda.so"])
def test_no_python_c_api(name):
    library = Path(fastguard.__file__).with_name(name)
    if not library.is_file():
        pytest.skip(f"{name} was not built here")
    symbols = run("nm", "-D", "--undefined-only", library).stdout
    assert "aoti_torch" in symbols or "torch_" in symbols
    assert not re.findall(r"\b_?Py[A-Z]\w+", symbols)


@pytest.mark.parametrize(
    "runs, capabilities", [(False, (75, 110)), (True, (80, 89, 90, 103, 121, 130))]
)
def test_a_gpu_without_a_binary_gets_the_references(capabilities, runs, monkeypatch):
    """Binaries serve the later minor versions of their generation, PTX what comes after 120."""
    monkeypatch.setattr(_library, "cuda_info", lambda: {"archs": "80 90 100 120 PTX"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number in capabilities:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, n=number: divmod(n, 10))
        assert _library.runs_on.__wrapped__(torch.device("cuda", 0)) == runs


@pytest.mark.cuda
@pytest.mark.parametrize("norm", [0.0, 0.3, 7.0, 50.0, float("inf"), float("nan")])
def test_decide_on_cuda(norm):
    total_norm = torch.tensor(norm, dtype=torch.float64)
    here, there = ops.decide_ref(total_norm, 0.5, 10.0), ops.decide(total_norm.cuda(), 0.5, 10.0)
    assert [t.item() for t in here] == [t.item() for t in there]


def test_env_says_what_was_built():
    printed = run(sys.executable, "-m", "fastguard.env")
    assert printed.returncode == 0, printed.stderr
    for key, value in env.describe().items():
        assert f"{key:26} {value}" in printed.stdout.splitlines()
    assert torch.__version__ in printed.stdout


def without_libraries(folder):
    """A copy of the package as an installation without a compiler leaves it."""
    shutil.copytree(
        ROOT / "fastguard",
        folder / "fastguard",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return folder


_CLIP = """
import torch, fastguard
p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.full((4,), 3.0)
print(fastguard.clip_grad_norm_([p], 3.0).item(), p.grad.tolist())
p.grad[2] = float("nan")
print(fastguard.GradGuard([p]).step(torch.optim.SGD([p], lr=1.0)).first_nonfinite)
"""


def test_without_libraries_the_references_serve_and_one_line_says_so(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _CLIP], cwd=without_libraries(tmp_path), capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    norm, *grads = result.stdout.splitlines()[0].split(" ", 1)
    assert float(norm) == 6.0
    assert grads == [str([1.5] * 4)] or "1.49999" in grads[0]
    assert result.stdout.splitlines()[1] == "parameter 0[2]"
    warnings = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1
    assert "pure-torch references" in warnings[0]
    assert "was not built" in warnings[0]


@pytest.mark.slow
def test_builds_without_cuda_and_without_a_compiler(tmp_path):
    cpu_only = build(tmp_path / "cpu", FASTGUARD_CUDA="0")
    assert cpu_only.returncode == 0, cpu_only.stderr
    built = {p.name for p in (tmp_path / "cpu" / "fastguard").iterdir()}
    assert built == {"_cpu.so"}
    none = build(tmp_path / "none", CC="/no/compiler", CXX="/no/compiler", FASTGUARD_CUDA="0")
    assert none.returncode == 0, none.stderr
    assert not list(tmp_path.glob("none/**/*.so"))


def test_nothing_of_an_instruction_set_runs_when_the_library_is_loaded():
    """A machine that does not have it would die of it: the kernels' tables are constants."""
    library = ROOT / "fastguard" / "_cpu.so"
    if shutil.which("nm") is None or not library.is_file():
        pytest.skip("no nm, or no library")
    symbols = run("nm", "-C", str(library)).stdout
    assert "attention_kernels_avx512" in symbols
    assert re.findall(r"_GLOBAL__sub_I_.*kernel.*", symbols) == []


@pytest.mark.slow
def test_native_code_under_sanitizers(tmp_path):
    """The operators' tests on a build under AddressSanitizer and UBSan."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler on this machine")
    folder = without_libraries(tmp_path / "sanitized")
    built = build(folder, FASTGUARD_CUDA="0", FASTGUARD_SANITIZE="1")
    assert built.returncode == 0, built.stderr
    assert (folder / "fastguard" / "_cpu.so").is_file(), built.stderr
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    asan = run("g++", "-print-file-name=libasan.so").stdout.strip()
    ubsan = run("g++", "-print-file-name=libubsan.so").stdout.strip()
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "LD_PRELOAD": f"{asan} {ubsan}",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         # Without the CUDA kernels on the executor: it switches stacks, and is not sanitized.
         "-k", "not opcheck and not cuda and not lanes and not warps and not random and not 1e-06 "
         "and not instruction_set and not rows_times and not compiles",
         "--ignore=tests/ops/test_twins.py",  # it reads the sources, which are not there
         "--ignore=tests/ops/test_attention_memory.py",  # the sanitizer needs more address space
         "tests/ops", "tests/optim/test_adam.py", "tests/optim/test_packed_state.py",
         "tests/optim/test_adam_state_dict.py", "tests/test_clip.py", "tests/test_clip_orders.py",
         "tests/test_fuzz_ops.py"],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "AddressSanitizer" not in result.stderr
    assert "runtime error" not in result.stderr
    drawn = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_ops", "--seconds", "30", "--seed", "2"],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stdout[-3000:] + drawn.stderr[-3000:]


def test_the_version_has_one_home():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastguard.__version__)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "fastguard.__version__" }' in project
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastguard.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {fastguard.__version__}" in changes
