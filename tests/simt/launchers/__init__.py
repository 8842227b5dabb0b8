"""fastguard's CUDA launchers, run on tensors of the CPU through the executor.

``package`` makes a copy of fastguard with the kernels of csrc/cuda. ``gpu()``, in a process that
has loaded the copy, returns the launchers' simulated GPU.
"""

import contextlib
import ctypes
import functools
import shutil
from pathlib import Path

import torch

from tests.simt.build import ROOT, includes_as_flags, library

TORCH = Path(torch.__file__).parent
HOST = [*includes_as_flags([TORCH / "include"]), "-fvisibility=default", "-Wno-attributes"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as setup.py builds them
SCHEDULES = ("round_robin", "greedy", "random", "unfair")


def built():
    """The shared library of schemas, launchers, kernels, CUDA's replacement, and the executor."""
    launchers = [path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu")]
    ours = [path.relative_to(ROOT) for path in Path(__file__).parent.glob("*.cpp")]
    sources = {str(path): HOST + STABLE for path in [Path("csrc/ops.cpp"), *sorted(launchers)]}
    sources |= {str(path): HOST for path in sorted(ours)}
    libraries = TORCH / "lib"
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10", "-ldl"]
    return library("launchers", sources, link)


def package(folder):
    """Copy fastguard and its tests to ``folder``, with the launchers as the CPU's kernels."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "speech")
    for name in ("fastguard", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(built(), folder / "fastguard" / "_cpu.so")


class Gpu:
    """A GPU with two SMs for two blocks each. A kernel runs when it is launched."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_launches.restype = ctypes.c_char_p
        self.library.simt_replay.restype = ctypes.c_char_p
        self.options()

    def options(self, schedule="round_robin", seed=0, weak_memory=False):
        """Set the order of the threads of all further launches, as in ``simt.Options``."""
        number = SCHEDULES.index(schedule)
        self.library.simt_options(number, ctypes.c_uint64(seed), int(weak_memory))

    def launches(self):
        """(kernel, blocks, device, stream) of each launch since the last call."""
        lines = self.library.simt_launches().decode().splitlines()
        return [(name, *map(int, rest)) for name, *rest in map(str.split, lines)]

    def kernels(self):
        return [name for name, *_ in self.launches()]

    @contextlib.contextmanager
    def stream(self, number):
        """Set the current stream of all devices, in this thread."""
        self.library.simt_stream(number)
        yield
        self.library.simt_stream(0)

    @contextlib.contextmanager
    def on_device(self, device, *tensors):
        """Let the tensors count as on this device; -1 stands for no device."""
        for tensor in tensors:
            self.library.simt_place(ctypes.c_void_p(tensor.data_ptr()), device)
        yield
        self.library.simt_place_all_back()

    @contextlib.contextmanager
    def capture(self):
        """Record launches for ``replay``. Freed memory stays until ``forget_graph``."""
        self.library.simt_capture(1)
        try:
            yield
        finally:
            self.library.simt_capture(0)

    def replay(self):
        if (error := self.library.simt_replay()) is not None:
            raise RuntimeError(error.decode())

    def forget_graph(self):
        self.library.simt_forget_graph()


@functools.cache
def gpu():
    import fastguard

    return Gpu(Path(fastguard.__file__).with_name("_cpu.so"))
