"""``python -m tests.sass`` prints the tables of docs/results/sass.txt."""

import sys
from importlib import metadata

from fastguard import ops
from fastguard._extras import MissingExtra
from fastguard._table import aligned

from . import LIBRARY, PROMISES, dynamic_shared_of, kernels

RESOURCES = """\
What each kernel takes of a thread and of a block; how many blocks are to fit on an SM, and how many
do by their registers and by their shared memory, which the launch adds to.
"""
STREAMS = """
The loops that move the tensors as far as they are aligned: widths in bits for one vector of each
array; loads issued when the first is needed; vectors in a pass; instructions of the body for each
element, those for the fp64 units among them, and calls. A body also has ways that are seldom taken:
the calls, for divisions and roots of unusual numbers, and on sm_80 and sm_90 all of Adam beside all
of AdamW.
"""

TILES = """
Attention's kernels: how many of these instructions they are written with, not how many run.
"""


def columns(heads, rows):
    """Lines of columns: numbers to the right, words to the left."""
    words = [i for i, cell in enumerate(rows[-1]) if isinstance(cell, str)]
    return aligned([list(map(str, row)) for row in (heads, *rows)], left=words)


def resources(found):
    heads = (
        *("sm", "kernel", "threads", "registers", "stack", "shared", "+launch"),
        *("blocks/SM", "by registers", "by shared", "LDL/STL", "LDG.128", "STG.128"),
    )
    rows = []
    for kernel in found:
        promise = PROMISES[kernel.name]
        dynamic = dynamic_shared_of(kernel, promise)
        kinds = [each.kind for each in kernel.code]
        wide = [each.kind for each in kernel.code if each.width == 128]
        rows.append(
            (
                *(f"sm_{kernel.arch}", kernel.name, promise.threads),
                *(kernel.usage.registers, kernel.usage.stack),
                *(kernel.usage.shared, dynamic, promise.blocks),
                kernel.blocks_by_registers(promise.threads),
                kernel.blocks_by_shared(promise.threads, dynamic),
                kinds.count("LDL") + kinds.count("STL"),
                *(wide.count("LDG"), wide.count("STG")),
            )
        )
    return columns(heads, rows)


def streams(found):
    heads = (
        *("sm", "kernel", "elements", "loads", "stores", "in flight"),
        *("unrolled", "instructions", "fp64", "calls"),
    )
    rows = []
    for kernel in found:
        for loop in sorted(kernel.streaming_loops, key=lambda loop: loop.moves):
            an_element = loop.elements_a_pass
            count = sum(each.kind != "NOP" for each in loop.body) / an_element
            fp64 = sum(each.is_fp64 for each in loop.body) / an_element
            rows.append(
                (
                    *(f"sm_{kernel.arch}", kernel.name, *loop.moves, loop.in_flight),
                    *(loop.unrolled, round(count, 1), round(fp64, 1)),
                    sum(each.is_call for each in loop.body),
                )
            )
    return columns(heads, rows)


def tiles(found):
    opcodes = ("HMMA", "FFMA", "LDSM", "LDS", "LDGSTS", "STG", "MUFU.EX2", "BAR")
    rows = [
        (f"sm_{kernel.arch}", kernel.name, *(_count(kernel, opcode) for opcode in opcodes))
        for kernel in found
        if PROMISES[kernel.name].needs
    ]
    return columns(("sm", "kernel", *opcodes), rows)


def _count(kernel, opcode):
    parts = opcode.split(".")
    return sum(each.opcode.split(".")[: len(parts)] == parts for each in kernel.code)


def report(found):
    """The text of the tables for ``found``, the result of :func:`kernels`."""
    order = list(PROMISES)
    found = sorted(found.values(), key=lambda each: (order.index(each.name), int(each.arch)))
    return "\n".join([RESOURCES, *resources(found), STREAMS, *streams(found), TILES, *tiles(found)])


def main():
    """Exit status: 0 done, 1 without the library, 2 without the extra that brings cuobjdump."""
    if not LIBRARY.is_file():
        print(
            f"error: there is no {LIBRARY}: build it with nvcc, pip install -v -e .",
            file=sys.stderr,
        )
        return 1
    try:
        found = kernels()
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    nvcc, cuobjdump = ops.cuda_info()["toolkit"], metadata.version("nvidia-cuda-cuobjdump")
    print(f"python -m tests.sass > docs/results/sass.txt  (nvcc {nvcc}, cuobjdump {cuobjdump})\n")
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
