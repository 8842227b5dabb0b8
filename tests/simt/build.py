"""Compiles kernels and the executor into a Python module."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastguard._extras import require

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "simt"
FLAGS = [
    *["-O2", "-g1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFASTGUARD_SIMT", "-Icsrc", "-Itests"],
]


class NoCompiler(RuntimeError):
    pass


def load(name, sources):
    """The pybind11 module ``name`` of these sources, paths below the repository's root.

    Raises MissingExtra without pybind11, NoCompiler without a compiler.
    """
    includes = [require("pybind11", "test").get_include(), sysconfig.get_path("include")]
    module = library(name, {source: includes_as_flags(includes) for source in sources})
    spec = importlib.util.spec_from_file_location(name, module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def library(name, sources, link=()):
    """The shared library of the executor and these sources. Each source has its own flags."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NoCompiler(f"simt needs a C++20 compiler; there is no {compiler!r} (CXX names one)")
    executor = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/simt").glob("*.cpp"))
    flags = {source: [] for source in executor} | sources
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compiled(compiler, source, flags[source]), flags))
    made = target("".join(map(str, [*objects, *link])), name, ".so")
    if not made.exists():
        run([compiler, "-shared", *map(str, objects), *link], made)
    return made


def includes_as_flags(folders):
    return [f"-isystem{folder}" for folder in folders]


def compiled(compiler, source, flags):
    """The object file of one source, compiled anew if it, a header or a flag has changed."""
    command = [compiler, *FLAGS, *flags, "-c", "-x", "c++", source]
    headers = [
        path.read_text(encoding="utf-8")
        for folder in ("csrc", "tests/simt")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".h", ".cuh")
    ]
    text = "\0".join([*command, (ROOT / source).read_text(encoding="utf-8"), *headers])
    target_ = target(text, Path(source).stem, ".o")
    if not target_.exists():
        run(command, target_)
    return target_


def target(text, name, suffix):
    return CACHE / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"


def run(command, target):
    """Run a command that writes ``target``, which appears whole or not at all.

    Two processes may build the same file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    # Sources and includes are relative, so that reports name sites by paths below the root.
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    if done.stderr:
        print(done.stderr)
    os.replace(partial, target)
