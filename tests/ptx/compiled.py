"""The PTX that nvcc makes for one architecture, with the flags of setup.py."""

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from setuptools.errors import CompileError

from . import library
from .parse import sources

ROOT = Path(__file__).parents[2]


def setup_module():
    """setup.py as a module, with setup() itself switched off."""
    spec = importlib.util.spec_from_file_location("fastguard_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def commands():
    """The command for each source of the CUDA library; none without a toolkit."""
    setup = setup_module()
    if setup.find_cuda_home() is None:
        return []
    builder = SimpleNamespace(build_temp="build")
    try:
        each = setup.BuildLibraries.cuda_compilations(builder, setup.torch_folder())
    except CompileError:
        return []
    return [compilation.command for compilation in each]


def programs(arch, folder):
    """The kernels as functions of their names, compiled in ``folder``."""
    found = {}
    for i, command in enumerate(commands()):
        to = folder / f"{i}.ptx"
        kept = [word for word in command[: command.index("-o")] if not word.startswith("-gencode")]
        kept[kept.index("-c")] = "-ptx"
        subprocess.run([*kept, f"-arch=compute_{arch}", "-o", str(to)], cwd=ROOT, check=True)
        found |= sources(to.read_text(encoding="utf-8"))
    return library.finder(found)
