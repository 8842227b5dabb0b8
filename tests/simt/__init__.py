"""Runs the CUDA kernels on the CPU, one fiber for each thread, with checks that find races.

``load`` compiles a pybind11 module; its functions take ``Options``, return a ``Report`` and raise
``Error``. README.md says what this proves, what it cannot see, and how to bind a kernel.
"""

from dataclasses import dataclass

import numpy as np

from .build import NoCompiler, load

__all__ = ["Error", "Launched", "NoCompiler", "Options", "Report", "Site", "load", "placed"]

# Sites of these kinds do nothing if they are in ``Options.removed``.
REMOVABLE = ("barrier", "grid_sync", "syncwarp", "fence", "wait", "within")


@dataclass(frozen=True)
class Options:
    """The options of a launch; simt::Options in report.h documents them."""

    schedule: str = "round_robin"  # or "greedy", "random", "unfair"
    seed: int = 0
    resident: int = 4
    weak_memory: bool = False
    block_races: bool = False
    count: bool = False
    step_limit: int = 1 << 20
    removed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Site:
    """One place where a kernel calls the machine; simt::Site in report.h documents the counts."""

    kind: str
    where: str
    bytes: int
    calls: int
    requests: int
    sectors: int
    wavefronts: int
    conflicts: int


@dataclass(frozen=True)
class Launched:
    """One launch and the 32-byte sectors that it touched, each counted once; 0 unless counting."""

    kernel: str
    loaded_sectors: int
    stored_sectors: int


@dataclass(frozen=True)
class Report:
    """The counts of all launches of one machine."""

    launches: tuple[Launched, ...]
    sites: tuple[Site, ...]

    def of(self, *kinds):
        return [site for site in self.sites if site.kind in kinds]

    def total(self, count, *kinds):
        """``count``, a field of ``Site``, summed over the sites of these kinds."""
        return sum(getattr(site, count) for site in self.of(*kinds))

    def bytes(self, *kinds):
        return sum(site.calls * site.bytes for site in self.of(*kinds))

    def removable(self):
        return sorted({site.where for site in self.of(*REMOVABLE)})


class Error(Exception):
    """The first error of a launch, which ended it."""

    def __init__(self, text, kind, kernel, block, thread, where):
        super().__init__(text)
        self.kind = kind
        self.kernel = kernel
        self.block = block
        self.thread = thread
        self.where = where


def placed(array, offset=0):
    """A copy that begins ``offset`` bytes after an address with the alignment of cudaMalloc."""
    room = np.empty(array.nbytes + offset + 256, np.uint8)
    first = -room.ctypes.data % 256 + offset
    copy = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
