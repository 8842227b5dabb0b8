"""Opcodes that copy or convert registers, each thread for itself."""

import numpy as np

from .arithmetic import elementwise
from .numbers import (
    DTYPES,
    UNSIGNED,
    bits_of,
    from_bfloat16,
    saturated,
    to_bfloat16,
    to_float16,
)
from .program import opcode


@opcode(r"mov\.(?P<t>[sub](?:16|32|64)|f32|f64|pred)")
def move(instruction, match, program):
    to, source = instruction.operands
    if source[0] == "{":
        return pack(instruction, match, program)
    if to[0] == "{":
        return unpack(instruction, match, program)
    return elementwise(instruction, program, lambda a: a, [match["t"]], match["t"])


def parts_of(text, type_, program):
    """The names within braces, the type and the size in bits of each."""
    names = program.list_of(text)
    bits = bits_of(type_) // len(names)
    return names, f"b{bits}", bits


def pack(instruction, match, program):
    names, part, bits = parts_of(instruction.operands[1], match["t"], program)
    readers = [program.reader(name, part) for name in names]
    write = program.writer(instruction.operands[0], f"b{bits * len(names)}")
    whole = UNSIGNED[bits * len(names)]

    def execute(block, mask):
        shifted = (read(block).astype(whole) << whole(i * bits) for i, read in enumerate(readers))
        write(block, sum(shifted, start=whole(0)), mask)

    return {"execute": execute}


def unpack(instruction, match, program):
    names, part, bits = parts_of(instruction.operands[0], match["t"], program)
    read = program.reader(instruction.operands[1], f"b{bits * len(names)}")
    writers = [program.writer(name, part) for name in names]
    whole = UNSIGNED[bits * len(names)]

    def execute(block, mask):
        value = read(block).copy()
        for i, write in enumerate(writers):
            write(block, (value >> whole(i * bits)).astype(UNSIGNED[bits]), mask)

    return {"execute": execute}


@opcode(r"cvta\.to\.global\.u64")
def to_global(instruction, match, program):
    """Generic addresses of global memory are the same numbers."""
    return elementwise(instruction, program, lambda a: a, ["u64"], "u64")


CONVERSIONS = [
    # integers; to floats; from floats; between floats
    (r"(?P<to>[su](?:8|16|32|64))\.(?P<of>[su](?:8|16|32|64))", lambda a, to: a.astype(DTYPES[to])),
    (r"rn\.(?P<to>f32|f64)\.(?P<of>[su](?:32|64))", lambda a, to: a.astype(DTYPES[to])),
    (r"rzi\.(?P<to>[su](?:32|64))\.(?P<of>f32|f64)", lambda a, to: saturated(np.trunc(a), to)),
    (r"(?P<to>f64)\.(?P<of>f32)", lambda a, to: a.astype(np.float64)),
    (r"rn\.(?P<to>f32)\.(?P<of>f64)", lambda a, to: a.astype(np.float32)),
    (r"(?P<to>f32)\.(?P<of>f16)", lambda a, to: a.astype(np.float32)),
    (r"(?P<to>f32)\.(?P<of>bf16)", lambda a, to: from_bfloat16(a)),
    (r"rn\.(?P<to>f16)\.(?P<of>f32)", lambda a, to: to_float16(a).view(np.float16)),
    (r"rn\.(?P<to>bf16)\.(?P<of>f32)", lambda a, to: to_bfloat16(a)),
]


def register_conversion(pattern, function):
    @opcode(rf"cvt\.{pattern}")
    def convert(instruction, match, program):
        def converted(a):
            return function(a, match["to"])

        return elementwise(instruction, program, converted, [match["of"]], match["to"])


for conversion in CONVERSIONS:
    register_conversion(*conversion)


@opcode(r"cvt\.rn\.(?P<t>bf16|f16)x2\.f32")
def convert_two(instruction, match, program):
    """The first operand becomes the upper half."""
    rounded = to_bfloat16 if match["t"] == "bf16" else to_float16

    def function(high, low):
        return rounded(high).astype(np.uint32) << np.uint32(16) | rounded(low)

    return elementwise(instruction, program, function, ["f32", "f32"], "b32")
