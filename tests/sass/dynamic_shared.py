"""The dynamic shared memory that the launches ask for, out of the kernels' headers."""

import functools
import os
import shutil
import subprocess

from tests.simt.build import NoCompiler, compiled, run, target

SOURCE = "tests/sass/dynamic_shared.cpp"


@functools.cache
def dynamic_shared():
    """Bytes of a block by the kernel's name. Raises NoCompiler without a C++20 compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NoCompiler(
            f"{SOURCE} needs a C++20 compiler; there is no {compiler!r} (CXX names one)"
        )
    object_ = compiled(compiler, SOURCE, ["-ffunction-sections", "-fdata-sections"])
    program = target(str(object_), "dynamic_shared", ".out")
    if not program.exists():
        # The headers' kernels call the executor of tests/simt. Nothing calls them here, so the
        # linker drops them.
        run([compiler, "-Wl,--gc-sections", str(object_)], program)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in map(str.split, lines.splitlines())}
