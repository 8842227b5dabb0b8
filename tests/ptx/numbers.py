"""PTX's types, and the roundings that numpy does not have."""

import ctypes
import functools
import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

DTYPES = {
    **{f"{kind}{bits}": np.dtype(t) for kind in ("b", "u") for bits, t in UNSIGNED.items()},
    **{f"s{bits}": np.dtype(t) for bits, t in SIGNED.items()},
    **{f"f{bits}": np.dtype(t) for bits, t in FLOAT.items()},
    "bf16": np.dtype(np.uint16),
    "pred": np.dtype(bool),
}


@functools.cache
def bits_of(type_):
    """The size of a type; that of a predicate is 1."""
    return 1 if type_ == "pred" else int(re.sub(r"\D", "", type_))


def twice(type_):
    """The type of double the size."""
    return f"{type_[0]}{2 * bits_of(type_)}"


def literal(text, type_):
    """A constant of an instruction as an array of one element."""
    dtype = DTYPES[type_]
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        of_float = UNSIGNED[32 if match[1] else 64](int(match[1] or match[2], 16))
        bits = np.array([of_float])
        if bits.dtype.itemsize != dtype.itemsize:
            raise ValueError(f"{text} is no {type_}")
        return bits.view(dtype)
    number = int(text.rstrip("U"), 0)
    if type_ == "pred":
        return np.array([number != 0])
    width = 8 * dtype.itemsize
    return np.array([number % 2**width], UNSIGNED[width]).view(dtype)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x):
    """Rounds to nearest, ties to even; every NaN becomes 0x7fff."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def to_float16(x):
    """The same for float16. numpy rounds it well, but keeps what a NaN carries."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def fma32(a, b, c):
    """a * b + c, rounded once.

    The product is exact in float64. The sum, rounded to 53 bits and then to 24, may differ from one
    that is rounded once only if the first rounding hits the middle of two floats, or if the result
    is subnormal. Then the sum is rounded to odd, which keeps the second rounding right.
    """
    product = a.astype(np.float64) * b
    total = product + c
    low = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    if (low == np.uint64(0x10000000)).any() or (np.abs(total) < 2.0**-126).any():
        total = sum_to_odd(product, c.astype(np.float64), total)
    return total.astype(np.float32)


def sum_to_odd(x, y, total):
    """x + y rounded to odd, where ``total`` is the sum rounded to nearest."""
    of_y = total - x
    error = (x - (total - of_y)) + (y - of_y)
    inexact = np.isfinite(total) & (error != 0)
    even = total.view(np.uint64) & np.uint64(1) == 0
    other = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact & even, other, total)


@functools.cache
def fused():
    """The C library's fma, element by element."""
    fma = ctypes.CDLL("libm.so.6").fma
    fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return np.frompyfunc(fma, 3, 1)


def fma64(a, b, c):
    return fused()(a, b, c).astype(np.float64)


def saturated(x, type_):
    """A float, without digits after its point, as an integer. A NaN becomes 0 or, as PTX has it
    if either type has 64 bits, the sign bit alone."""
    dtype = DTYPES[type_]
    limits = np.iinfo(dtype)
    high = x >= float(limits.max)
    low = x <= float(limits.min)
    wide = max(x.dtype.itemsize, dtype.itemsize) == 8
    of_nan = np.array([1 << 8 * dtype.itemsize - 1 if wide else 0], UNSIGNED[8 * dtype.itemsize])
    inside = np.where(high | low | np.isnan(x), 0, x).astype(dtype)
    result = np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))
    return np.where(np.isnan(x), of_nan.view(dtype), result)
