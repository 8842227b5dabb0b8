"""Builds fastguard's two shared libraries; everything else about the package is in pyproject.toml.

Both are plain libraries without any Python C API, loaded with ``torch.ops.load_library`` and
written against the LibTorch Stable ABI, so one build serves every CPython and every torch >= 2.11.

``FASTGUARD_CUDA=0``      builds the CPU library only.
``FASTGUARD_SANITIZE=1``  builds the CPU library under AddressSanitizer and UBSan
                          (a test marked ``slow`` runs the operators' tests on such a build).

For work on csrc::

    python setup.py build_ext --inplace   compiles what changed, and what includes it, and links
    python setup.py compile_commands      writes compile_commands.json, for clangd and clang-tidy

Objects stay below build/. An object is compiled again when its source, a header that it includes or
its command is newer or another; ``--force`` compiles all. MSVC compiles all each time.

A machine without a compiler still installs: the pure-torch references of ``fastguard.ops`` serve.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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

SANITIZE = []
if os.environ.get("FASTGUARD_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def isa_variants():
    """Flags of each CPU capability; the same kernel source is compiled once for each."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"default": []}  # on 64-bit ARM it has NEON
    if WINDOWS:
        return {"default": [], "avx2": ["/arch:AVX2"]}
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


class Group(NamedTuple):
    """Sources of the CPU library that are compiled with the same flags."""

    capability: str
    sources: list[str]
    flags: list[str]


def cpu_flags(capability, extra):
    """The flags of one group of sources."""
    # No contraction: every instruction set must give the same bits. No errno: sqrt vectorizes.
    flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    if WINDOWS:
        flags = ["/O2", "/std:c++20", "/EHsc"]
    if SANITIZE:
        # Less optimised, for with all checks inlined a file of kernels takes minutes.
        flags += [*SANITIZE, "-O1", "-g", "-fno-omit-frame-pointer"]
    return [f"-DFASTGUARD_CAPABILITY={capability}", "-Icsrc", *flags, *extra]


def nvcc():
    """The compiler, and the architectures that it compiles for."""
    return [shutil.which("nvcc", path=find_cuda_home() / "bin"), "--cudart=static", *GENCODE]


def sources(folder, suffix):
    # Relative paths: distutils mirrors an absolute one inside the build folder.
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(f"*{suffix}"))


def torch_folder():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise CompileError("torch is not installed in the environment that builds fastguard")
    return Path(spec.submodule_search_locations[0])


class Compilation(NamedTuple):
    """One source compiled to one object; paths are relative to the root, or absolute."""

    source: str
    object: Path
    command: list[str]  # without what names the file of the dependencies

    @classmethod
    def of(cls, compiler, flags, source, folder):
        """``source`` compiled into an object below ``folder``."""
        object_ = Path(folder, source).with_suffix(".o")
        return cls(source, object_, [*compiler, *flags, "-c", source, "-o", str(object_)])

    @property
    def dependencies(self):
        """The make rule that the compiler writes: the object, and all files that were read."""
        return self.object.with_suffix(".d")

    @property
    def record(self):
        """The command that made the object."""
        return self.object.with_suffix(".command")

    def is_current(self):
        """Whether the object is what this command would make of the files as they are."""
        made = (self.object, self.dependencies, self.record)
        if not all((ROOT / path).is_file() for path in made):
            return False
        if (ROOT / self.record).read_text(encoding="utf-8") != shlex.join(self.command):
            return False
        rule = (ROOT / self.dependencies).read_text(encoding="utf-8").replace("\\\n", " ")
        files = [ROOT / name for name in shlex.split(rule.partition(": ")[2])]
        newest = (ROOT / self.object).stat().st_mtime_ns
        return all(file.is_file() and file.stat().st_mtime_ns <= newest for file in files)

    def run(self):
        """Compile; whether that worked."""
        (ROOT / self.object).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / self.record).unlink(missing_ok=True)
        command = [*self.command, "-MD", "-MF", str(self.dependencies)]
        print(shlex.join(command), flush=True)
        try:
            worked = subprocess.run(command, cwd=ROOT).returncode == 0
        except OSError as error:
            raise CompileError(str(error)) from error
        if worked:
            (ROOT / self.record).write_text(shlex.join(self.command), encoding="utf-8")
        return worked


def compile_(compilations, force):
    """Compile what is not current, as many at a time as there are processors."""
    wanted = [each for each in compilations if force or not each.is_current()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        worked = list(pool.map(Compilation.run, wanted))
    failed = [each for each, done in zip(wanted, worked, strict=True) if not done]
    # Several at a time may be more than a machine has memory for.
    if failed := [each for each in failed if not each.run()]:
        raise CompileError(f"{', '.join(each.source for each in failed)} did not compile")


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

    def compilations(self, ext):
        """How each source of a library is compiled."""
        of = self.cpu_compilations if ext.name == "fastguard._cpu" else self.cuda_compilations
        return of(torch_folder())

    # --- the CPU library --------------------------------------------------------------------------

    def build_cpu(self, target, torch):
        if WINDOWS:
            objects = [
                each
                for group in self.cpu_groups(torch)
                for each in self.compiler.compile(
                    group.sources,
                    output_dir=str(Path(self.build_temp) / group.capability),
                    extra_postargs=group.flags,
                )
            ]
        else:
            compilations = self.cpu_compilations(torch)
            compile_(compilations, self.force)
            objects = [str(each.object) for each in compilations]
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=SANITIZE,
            target_lang="c++",
        )

    def cpu_compilations(self, torch):
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        return [
            Compilation.of(compiler, group.flags, source, Path(self.build_temp) / group.capability)
            for group in self.cpu_groups(torch)
            for source in group.sources
        ]

    def cpu_groups(self, torch):
        """The sources, by the capability that they are compiled for."""
        variants, bf16 = isa_variants(), {}
        for capability, extra in bf16_variants().items():
            if self.accepts(extra):
                bf16[capability] = extra
        kernels = sources("csrc/cpu", "_kernel.cpp")
        bf16_kernels = [s for s in kernels if s.endswith("_bf16_kernel.cpp")]
        plain_kernels = [s for s in kernels if s not in bf16_kernels]
        every = sources("csrc", ".cpp") + sources("csrc/cpu", ".cpp")
        system = "/external:I" if WINDOWS else "-isystem"
        known = [f"-DFASTGUARD_HAS_{capability.upper()}" for capability in variants | bf16]
        host = [TORCH_TARGET, f"{system}{torch / 'include'}", *known]
        yield Group("ops", [s for s in every if s not in kernels], cpu_flags("ops", host))
        for capability, extra in variants.items():
            yield Group(capability, plain_kernels, cpu_flags(capability, extra))
        for capability, extra in bf16.items():
            yield Group(capability, bf16_kernels, cpu_flags(capability, extra))

    def accepts(self, flags):
        """Whether the compiler knows them; gcc 10 does not know all."""
        command = [*self.compiler.compiler_so, *flags, "-fsyntax-only", "-xc++", os.devnull]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False  # there is none, as the build will tell

    # --- the CUDA library -------------------------------------------------------------------------

    def build_cuda(self, target, torch):
        compilations = self.cuda_compilations(torch)
        try:
            compile_(compilations, self.force)
            objects = [str(each.object) for each in compilations]
            libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
            link = [*nvcc(), "-shared", *objects, *libraries, "-o", str(target)]
            print(shlex.join(link), flush=True)
            if subprocess.run(link, cwd=ROOT).returncode != 0:
                raise CompileError("the objects do not link")
        except CompileError as error:
            message = f"nvcc failed: {error}; FASTGUARD_CUDA=0 builds the CPU library only"
            raise CompileError(message) from error

    def cuda_compilations(self, torch):
        if not list((torch / "lib").glob("*torch_cuda.*")):
            raise CompileError("the torch that builds fastguard has no CUDA; CPU library only")
        flags = [
            "-O3",
            "-std=c++20",
            "--compress-mode=size",
            "--fmad=false",  # as on the CPU: what is to be contracted is written as fma
            "-Xcompiler=/EHsc" if WINDOWS else "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-DUSE_CUDA",
            TORCH_TARGET,
            f'-DFASTGUARD_CUDA_ARCHS="{" ".join(CUDA_ARCHS)} PTX"',
            "-Icsrc",
            f"-isystem={torch / 'include'}",
            f"-isystem={find_cuda_home() / 'include'}",
        ]
        return [
            Compilation.of(nvcc(), flags, source, Path(self.build_temp) / "cuda")
            for source in sources("csrc/cuda", ".cu")
        ]


class CompileCommands(BuildLibraries):
    description = "write compile_commands.json, which clangd and clang-tidy read; compiles nothing"

    def build_extensions(self):
        entries = []
        for ext in self.extensions:
            try:
                compilations = self.compilations(ext)
            except CompileError as error:
                print(f"{ext.name} is left out: {error}", flush=True)
                continue
            for each in compilations:
                command = {"file": each.source, "arguments": each.command}
                entries.append({"directory": str(ROOT), **command, "output": str(each.object)})
        path = ROOT / "compile_commands.json"
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(entries)} commands", flush=True)


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


setup(
    ext_modules=list(libraries()),
    cmdclass={
        "bdist_wheel": Wheel,
        "build_ext": BuildLibraries,
        "compile_commands": CompileCommands,
    },
)
