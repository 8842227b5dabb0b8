"""Opcodes that compute a register from registers, each thread for itself."""

import numpy as np

from .numbers import (
    DTYPES,
    UNSIGNED,
    bits_of,
    fma32,
    fma64,
    twice,
)
from .program import opcode

TINY = np.float32(2.0**-126)


def elementwise(instruction, program, function, sources, result):
    """A step that applies ``function`` to operands of the types ``sources``."""
    to, *operands = instruction.operands
    if len(operands) != len(sources):
        raise ValueError(f"{len(operands)} operands in place of {len(sources)}")
    readers = [program.reader(x, t) for x, t in zip(operands, sources, strict=True)]
    write = program.writer(to, result)
    dtype = DTYPES[result]

    def execute(block, mask):
        value = function(*(read(block) for read in readers))
        if value.dtype != dtype:
            raise TypeError(f"{instruction.text}: {value.dtype} in place of {dtype}")
        write(block, value, mask)

    return {"execute": execute}


def same_type(pattern):
    """Registers a function of operands that all have the type at the end of the opcode."""

    def register(function):
        @opcode(pattern)
        def make(instruction, match, program):
            count = function.__code__.co_argcount
            return elementwise(instruction, program, function, count * [match["t"]], match["t"])

        return function

    return register


def flushed(x):
    """Subnormal floats become zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


INTEGERS = r"(?P<t>[su](?:16|32|64))"
FLOATS = r"(?P<t>f32|f64)"
BITS = r"(?P<t>b16|b32|b64|pred)"

# --- arithmetic -----------------------------------------------------------------------------------


@same_type(rf"add\.{INTEGERS}")
@same_type(rf"add\.rn\.{FLOATS}")
def add(a, b):
    return a + b


@same_type(rf"sub\.{INTEGERS}")
@same_type(rf"sub\.rn\.{FLOATS}")
def subtract(a, b):
    return a - b


@same_type(rf"mul\.lo\.{INTEGERS}")
@same_type(rf"mul\.rn\.{FLOATS}")
def multiply(a, b):
    return a * b


@opcode(r"mul\.wide\.(?P<t>[su](?:16|32))")
def multiply_wide(instruction, match, program):
    wide = twice(match["t"])

    def function(a, b):
        return a.astype(DTYPES[wide]) * b.astype(DTYPES[wide])

    return elementwise(instruction, program, function, 2 * [match["t"]], wide)


@opcode(r"mul\.hi\.(?P<t>[su](?:16|32))")
def multiply_high(instruction, match, program):
    type_ = match["t"]
    own, wide = DTYPES[type_], DTYPES[twice(type_)]

    def function(a, b):
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits_of(type_))).astype(own)

    return elementwise(instruction, program, function, 2 * [type_], type_)


@same_type(rf"mad\.lo\.{INTEGERS}")
def multiply_add(a, b, c):
    return a * b + c


@same_type(r"fma\.rn\.(?P<t>f32)")
def fused_multiply_add(a, b, c):
    return fma32(a, b, c)


@same_type(r"fma\.rn\.(?P<t>f64)")
def fused_multiply_add_64(a, b, c):
    return fma64(a, b, c)


@same_type(r"div\.(?P<t>[su](?:16|32|64))")
def divide_integers(a, b):
    """Towards zero. The result of a division by zero is not defined; here it is 0."""
    return (a - np.fmod(a, b)) // b


@same_type(rf"div\.rn\.{FLOATS}")
def divide(a, b):
    return a / b


@same_type(rf"rem\.{INTEGERS}")
def remainder(a, b):
    return np.fmod(a, b)


@same_type(rf"sqrt\.rn\.{FLOATS}")
def square_root(a):
    return np.sqrt(a)


@same_type(rf"rcp\.rn\.{FLOATS}")
def reciprocal(a):
    return a.dtype.type(1) / a


@same_type(r"rcp\.approx\.ftz\.(?P<t>f32)")
def reciprocal_approx(a):
    return flushed((1.0 / flushed(a).astype(np.float64)).astype(np.float32))


@same_type(r"ex2\.approx\.ftz\.(?P<t>f32)")
def power_of_two(a):
    return flushed(np.exp2(flushed(a).astype(np.float64)).astype(np.float32))


@same_type(r"neg\.(?P<t>s16|s32|s64|f32|f64)")
def negate(a):
    return -a


@same_type(rf"abs\.{FLOATS}")
@same_type(r"abs\.(?P<t>s16|s32|s64)")
def absolute(a):
    return np.abs(a)


@same_type(rf"copysign\.{FLOATS}")
def copy_sign(a, b):
    return np.copysign(b, a)


@same_type(rf"min\.{INTEGERS}")
@same_type(r"min\.NaN\.(?P<t>f32)")
def minimum(a, b):
    return np.where(a == b, np.where(np.signbit(a), a, b), np.minimum(a, b))


@same_type(rf"max\.{INTEGERS}")
@same_type(r"max\.NaN\.(?P<t>f32)")
def maximum(a, b):
    return np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))


@same_type(rf"min\.{FLOATS}")
def minimum_number(a, b):
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


@same_type(rf"max\.{FLOATS}")
def maximum_number(a, b):
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


# --- bits -----------------------------------------------------------------------------------------


@same_type(rf"and\.{BITS}")
def and_(a, b):
    return a & b


@same_type(rf"or\.{BITS}")
def or_(a, b):
    return a | b


@same_type(rf"xor\.{BITS}")
def xor(a, b):
    return a ^ b


@same_type(rf"not\.{BITS}")
def not_(a):
    return ~a


@opcode(r"shl\.(?P<t>b(?:16|32|64))")
def shift_left(instruction, match, program):
    bits = bits_of(match["t"])
    type_ = UNSIGNED[bits]

    def function(a, by):
        shifted = a << np.minimum(by, np.uint32(bits - 1)).astype(type_)
        return np.where(by >= bits, type_(0), shifted)

    return elementwise(instruction, program, function, [match["t"], "u32"], match["t"])


@opcode(r"shr\.(?P<t>[bus](?:16|32|64))")
def shift_right(instruction, match, program):
    bits = bits_of(match["t"])
    type_ = DTYPES[match["t"]].type

    def function(a, by):
        shifted = a >> np.minimum(by, np.uint32(bits - 1)).astype(type_)
        return shifted if match["t"][0] == "s" else np.where(by >= bits, type_(0), shifted)

    return elementwise(instruction, program, function, [match["t"], "u32"], match["t"])


@opcode(r"bfe\.u32")
def extract_bits(instruction, match, program):
    def function(a, begin, count):
        begin, count = (np.minimum(x & np.uint32(255), np.uint32(32)) for x in (begin, count))
        mask = (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
        return (a.astype(np.uint64) >> begin.astype(np.uint64) & mask).astype(np.uint32)

    return elementwise(instruction, program, function, 3 * ["u32"], "u32")


@opcode(r"bfi\.(?P<t>b32|b64)")
def insert_bits(instruction, match, program):
    """The low bits of the first operand in the place of some bits of the second one."""
    bits = bits_of(match["t"])
    type_ = UNSIGNED[bits]

    def function(a, b, begin, count):
        begin, count = (np.minimum(x & np.uint32(255), np.uint32(bits)) for x in (begin, count))
        ones = np.where(count >= bits, ~type_(0), (type_(1) << count.astype(type_)) - type_(1))
        here = np.where(begin >= bits, type_(0), ones << begin.astype(type_))
        return (b & ~here) | (a << begin.astype(type_) & here)

    return elementwise(instruction, program, function, [match["t"]] * 2 + ["u32"] * 2, match["t"])


# --- comparisons ----------------------------------------------------------------------------------

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def ordered(compare):
    """Of floats: false where one is a NaN."""
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def unordered(compare):
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


FLOAT_COMPARISONS = {
    **{name: ordered(compare) for name, compare in COMPARISONS.items()},
    **{f"{name}u": unordered(compare) for name, compare in COMPARISONS.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@opcode(r"setp\.(?P<how>\w+)\.(?P<t>[sub](?:16|32|64)|f32|f64)")
def compare(instruction, match, program):
    table = FLOAT_COMPARISONS if match["t"][0] == "f" else COMPARISONS
    function = table[match["how"]]
    return elementwise(instruction, program, function, 2 * [match["t"]], "pred")


@opcode(r"selp\.(?P<t>[sub](?:16|32|64)|f32|f64)")
def select(instruction, match, program):
    type_ = match["t"]

    def function(a, b, which):
        return np.where(which, a, b)

    return elementwise(instruction, program, function, [type_, type_, "pred"], type_)
