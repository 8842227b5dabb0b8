"""Builds fastguard's two shared libraries; everything else about the package is in pyproject.toml.

Both are plain libraries without any Python C API, loaded with ``torch.ops.load_library`` and
written against the LibTorch Stable ABI, so one build serves every CPython and every torch >= 2.11.

``FASTGUARD_CUDA=0``      builds the CPU library only.
``FASTGUARD_SANITIZE=1``  builds the CPU library under AddressSanitizer and UBSan
                          (a test marked ``slow`` runs the operators' tests on such a build).

A machine without a compiler still installs: the pure-torch references of ``fastguard.ops`` serve.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
WINDOWS = sys.platform == "win32"

# sm_80 code also serves 8.6 to 8.9; the PTX of the newest serves what comes after it.
CUDA_ARCHS = ("80", "90", "100", "120")
GENCODE = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
GENCODE += [f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]


def isa_variants():
    """Flags of each CPU capability; the same kernel source is compiled once for each."""
    if platform.machine().lower() not in ("x86_64", "amd64") or WINDOWS:
        return {"default": []}
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    avx512 += ["-mprefer-vector-width=512"]
    return {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": avx512}


def bf16_variants():
    """The same for products of bf16 numbers, csrc/cpu/*_bf16_kernel.cpp."""
    avx512 = isa_variants().get("avx512")
    if avx512 is None or not sys.platform.startswith("linux"):
        return {}
    bf16 = [*avx512, "-mavx512bf16"]
    return {"avx512_bf16": bf16, "amx": [*bf16, "-mamx-tile", "-mamx-bf16"]}


def find_cuda_home():
    """The CUDA toolkit's folder, or None. A folder without the runtime's headers is not one."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # An nvcc on the PATH may be a wrapper or a link far from its toolkit: ask it.
        dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE):
            candidates.append(top[1].strip())
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for home in (Path(c) for c in candidates if c):
        if shutil.which("nvcc", path=home / "bin") and (home / "include/cuda_runtime.h").is_file():
            return home
    return None


def sources(folder, suffix):
    # Relative paths: distutils mirrors an absolute one inside the build folder.
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(f"*{suffix}"))


def torch_folder():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise CompileError("torch is not installed in the environment that builds fastguard")
    return Path(spec.submodule_search_locations[0])


class BuildLibraries(build_ext):
    """Compiles each "extension" to a plain shared library beside the Python files."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + (".dll" if WINDOWS else ".so")

    def get_export_symbols(self, ext):
        return []  # no PyInit: the library registers its ops when it is loaded

    def build_extensions(self):
        # What an earlier build left must not pass for the result of this one.
        folders = [Path(self.build_lib, "fastguard")]
        folders += [ROOT / "fastguard"] if self.inplace else []
        for folder in folders:
            for name in ("_cpu", "_cuda"):
                (folder / self.get_ext_filename(name)).unlink(missing_ok=True)
        super().build_extensions()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        build = self.build_cpu if ext.name == "fastguard._cpu" else self.build_cuda
        build(target, torch_folder())

    def build_cpu(self, target, torch):
        # No contraction: every instruction set must give the same bits. No errno: sqrt vectorizes.
        flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno"]
        flags += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
        if WINDOWS:
            flags = ["/O2", "/std:c++20", "/EHsc"]
        link = []
        if os.environ.get("FASTGUARD_SANITIZE") == "1":
            link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
            # Less optimised, for with all checks inlined a file of kernels takes minutes.
            flags += [*link, "-O1", "-g", "-fno-omit-frame-pointer"]

        def compile_(files, capability, extra):
            return self.compiler.compile(
                files,
                output_dir=str(Path(self.build_temp) / capability),
                macros=[("FASTGUARD_CAPABILITY", capability)],
                include_dirs=["csrc"],
                extra_postargs=flags + extra,
            )

        variants, bf16 = isa_variants(), {}
        for capability, extra in bf16_variants().items():
            if self.accepts(extra):
                bf16[capability] = extra
        system = "/external:I" if WINDOWS else "-isystem"
        kernels = sources("csrc/cpu", "_kernel.cpp")
        rest = [
            s for s in sources("csrc", ".cpp") + sources("csrc/cpu", ".cpp") if s not in kernels
        ]
        bf16_kernels = [s for s in kernels if s.endswith("_bf16_kernel.cpp")]
        objects = compile_(
            rest,
            "ops",
            [
                TORCH_TARGET,
                f"{system}{torch / 'include'}",
                *(f"-DFASTGUARD_HAS_{capability.upper()}" for capability in variants | bf16),
            ],
        )
        for capability, extra in variants.items():
            objects += compile_(sorted({*kernels} - {*bf16_kernels}), capability, extra)
        for capability, extra in bf16.items():
            objects += compile_(bf16_kernels, capability, extra)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=link,
            target_lang="c++",
        )

    def accepts(self, flags):
        """Whether the compiler knows them; gcc 10 does not know all."""
        command = [*self.compiler.compiler_so, *flags, "-fsyntax-only", "-xc++", os.devnull]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False  # there is none, as the build will tell

    def build_cuda(self, target, torch):
        if not list((torch / "lib").glob("*torch_cuda.*")):
            raise CompileError("the torch that builds fastguard has no CUDA; CPU library only")
        home = find_cuda_home()
        command = [
            shutil.which("nvcc", path=home / "bin"),
            "-shared",
            "-O3",
            "-std=c++20",
            "--compress-mode=size",
            "--fmad=false",  # as on the CPU: what is to be contracted is written as fma
            "--cudart=static",
            *GENCODE,
            "-Xcompiler=/EHsc" if WINDOWS else "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-DUSE_CUDA",
            TORCH_TARGET,
            f'-DFASTGUARD_CUDA_ARCHS="{" ".join(CUDA_ARCHS)} PTX"',
            "-Icsrc",
            f"-isystem={torch / 'include'}",
            f"-isystem={home / 'include'}",
            f"-L{torch / 'lib'}",
            "-ltorch_cpu",
            "-ltorch_cuda",
            *sources("csrc/cuda", ".cu"),
            "-o",
            str(target),
        ]
        # All architectures at a time may be more than a machine has memory for.
        for threads in ("--threads=0", "--threads=1"):
            print(" ".join([*command, threads]), flush=True)
            if subprocess.run([*command, threads], cwd=ROOT).returncode == 0:
                return
        raise CompileError("nvcc failed; FASTGUARD_CUDA=0 builds the CPU library only")


class Wheel(bdist_wheel):
    """No Python C API: one wheel of a platform serves every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def libraries():
    yield Extension(
        "fastguard._cpu", sources("csrc", ".cpp") + sources("csrc/cpu", ".cpp"), optional=True
    )
    if os.environ.get("FASTGUARD_CUDA") == "0":
        return
    if find_cuda_home():
        yield Extension("fastguard._cuda", sources("csrc/cuda", ".cu"), optional=True)
    else:
        print(
            "fastguard: no CUDA toolkit found (bin/nvcc and include/cuda_runtime.h under "
            "CUDA_HOME, on the PATH or in /usr/local/cuda): CPU library only",
            flush=True,
        )


setup(ext_modules=list(libraries()), cmdclass={"bdist_wheel": Wheel, "build_ext": BuildLibraries})
