"""The PTX of the CUDA library: what setup.py put into it, or what nvcc makes of a source."""

import functools

from tests.sass import cuobjdump

from . import arithmetic, conversions, moves, warps  # noqa: F401  they register the opcodes
from .parse import parse, sources
from .program import Program


@functools.cache
def embedded():
    """The sources of the kernels in the built library, by (target, name)."""
    return sources(cuobjdump.run("-ptx", str(cuobjdump.LIBRARY)))


@functools.cache
def programs():
    """The built library's kernels as functions of their readable names."""
    return finder(embedded())


def finder(found, name_of=cuobjdump.readable):
    """A function that gives the program of a kernel, made when it is first asked for."""
    by_name = {name_of(name): (target, name) for target, name in found}

    @functools.cache
    def program(name):
        key = by_name[name]
        return Program(parse(*key, *found[key]))

    program.names = sorted(by_name)
    return program
