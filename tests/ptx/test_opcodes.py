"""Single instructions, beside fractions and integers of Python, and torch."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch

from .one_kernel import apply, run

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3e38, 1e-40, -1e-45, 65519.0, 65520.0, math.inf, -math.inf]
SPECIAL = np.float32([*SPECIAL, math.nan])


def floats(n=400, seed=0, spread=30):
    """Random floats of many sizes."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(n) * 2.0 ** rng.integers(-spread, spread, n)
    return drawn.astype(np.float32)


def pairs():
    """All pairs of special floats, and random ones."""
    first, second = np.repeat(SPECIAL, len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))
    return np.append(first, floats(seed=1)), np.append(second, floats(seed=2))


def integers(dtype, n=300, seed=0):
    ends = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    whole = rng.integers(ends.min, ends.max, n, dtype, endpoint=True)
    small = rng.integers(0, 70, n).astype(dtype)
    return np.concatenate([[dtype(x) for x in (ends.min, ends.max, 0, 1)], whole, small])


def assert_bits(found, wanted):
    """Equal to the bit, where all NaNs are one."""
    assert found.dtype == wanted.dtype
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    number = ~np.isnan(found)
    assert found[number].tobytes() == wanted[number].tobytes()


# --- floats ---------------------------------------------------------------------------------------

OPERATIONS = {
    "add.rn.f32": torch.add,
    "sub.rn.f32": torch.sub,
    "mul.rn.f32": torch.mul,
    "div.rn.f32": torch.div,
    "copysign.f32": lambda a, b: torch.copysign(b, a),
}


@pytest.mark.parametrize("opcode", OPERATIONS)
def test_float_operation(opcode):
    a, b = pairs()
    found = apply(f"{opcode} %r20, %r11, %r12;", a, b, to=np.float32)
    assert_bits(found, OPERATIONS[opcode](torch.from_numpy(a), torch.from_numpy(b)).numpy())


@pytest.mark.parametrize("opcode", ["min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32"])
def test_minimum_and_maximum(opcode):
    """-0 is below +0. Without .NaN a NaN loses against a number."""
    choose = min if opcode.startswith("min") else max

    def wanted(a, b):
        numbers = [x for x in (a, b) if not math.isnan(x)]
        if len(numbers) < (2 if "NaN" in opcode else 1):
            return math.nan
        return choose(numbers, key=lambda x: (x, math.copysign(1, x)))

    a, b = pairs()
    found = apply(f"{opcode} %r20, %r11, %r12;", a, b, to=np.float32)
    assert_bits(found, np.float32([wanted(*x) for x in zip(a.tolist(), b.tolist(), strict=True)]))


def nearest(exact):
    """A fraction as the nearest float32, ties to even."""
    if exact == 0:
        return 0.0
    unit = Fraction(2) ** max(math.frexp(float(exact))[1] - 24, -149)
    return float(round(exact / unit) * unit)


def fraction_of_fma(a, b, c):
    return Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))


def assert_rounded_once(a, b, c):
    found = apply("fma.rn.f32 %r20, %r11, %r12, %r13;", a, b, c, to=np.float32)
    exact = [fraction_of_fma(*x) for x in zip(a, b, c, strict=True)]
    assert_bits(found, np.float32([nearest(x) for x in exact]))


@pytest.mark.parametrize("spread", [3, 40])
def test_fma(spread):
    rng = np.random.default_rng(3)
    a, b = floats(seed=4, spread=spread), floats(seed=5, spread=spread)
    near = -a.astype(np.float64) * b * (1 + rng.integers(-2, 3, len(a)) * 2.0**-23)
    c = np.where(rng.random(len(a)) < 0.5, near.astype(np.float32), floats(seed=6, spread=spread))
    assert_rounded_once(a, b, c)


@pytest.mark.parametrize("sign", [1, -1])
def test_fma_is_rounded_once(sign):
    """The sum is below the middle of two floats, also subnormal ones, by less than 53 bits show."""
    scales = np.float32([2.0**-24, 2.0**-75])
    a = sign * scales * np.float32(1 + 2.0**-18)
    b = np.float32([1.0, 2.0**-75]) * np.float32(1 - 2.0**-18)
    c = sign * np.float32([1 + 2.0**-23, 2.0**-127 + 2.0**-149])
    assert_rounded_once(a, b, c)


def test_fma_of_doubles_is_rounded_once():
    a, b = np.float64([1 + 2**-30, 3.0]), np.float64([1 - 2**-30, 1 / 3])
    c = np.float64([-1.0, -1.0])
    body = "fma.rn.f64 %rd20, %fd1, %fd2, 0dBFF0000000000000;"
    found = apply(body, a, b, to=np.float64)
    assert_bits(found, np.float64([float(fraction_of_fma(*x)) for x in zip(a, b, c, strict=True)]))


def test_approximations_flush_subnormal_numbers():
    x = np.float32([0.5, 1e-40, -1e-40, 3e38, -127.5, math.inf, math.nan])
    found = apply("rcp.approx.ftz.f32 %r20, %r11;", x, to=np.float32)
    assert_bits(found, np.float32([2, math.inf, -math.inf, 0, -1 / 127.5, 0, math.nan]))
    found = apply("ex2.approx.ftz.f32 %r20, %r11;", x, to=np.float32)
    assert_bits(found, np.float32([2**0.5, 1, 1, math.inf, 0, math.inf, math.nan]))


@pytest.mark.parametrize("how", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("of_nan", [False, True])
def test_comparison_of_floats(how, of_nan):
    """eq to ge are false of a NaN, equ to geu are true."""
    a, b = pairs()
    opcode = f"setp.{how}{'u' if of_nan else ''}.f32"
    found = apply(f"{opcode} %p1, %r11, %r12;\nselp.u32 %r20, 1, 0, %p1;", a, b, to=np.uint32)
    wanted = [
        of_nan if math.isnan(x) or math.isnan(y) else getattr(operator, how)(x, y)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert found.astype(bool).tolist() == wanted


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bits(name, dtype):
    halves = torch.arange(0, 2**15, 37, dtype=torch.int16).view(dtype).float()
    between = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([SPECIAL, between.numpy(), floats()])
    found = apply(f"cvt.rn.{name}.f32 %rs1, %r11;\ncvt.u32.u16 %r20, %rs1;", x, to=np.uint32)
    wanted = torch.from_numpy(x).to(dtype)
    found = torch.from_numpy(found.astype(np.int32)).to(torch.int16).view(dtype)
    assert torch.equal(torch.nan_to_num(found, 1.5), torch.nan_to_num(wanted, 1.5))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_two_halves_the_first_one_above():
    body = "cvt.rn.bf16x2.f32 %r20, %r11, %r12;"
    found = apply(body, np.float32([1.0]), np.float32([-2.0]), to=np.uint32)
    assert found.tolist() == [0x3F80C000]


def test_a_float_too_large_for_an_integer():
    x = np.float64([1.9, -1.9, 1e30, -1e30, math.nan, 2.0**62])
    found = apply("cvt.rzi.s64.f64 %rd20, %fd1;", x, to=np.int64)
    assert found.tolist() == [1, -1, 2**63 - 1, -(2**63), -(2**63), 2**62]
    found = apply("cvt.rzi.u32.f64 %r20, %fd1;", x, to=np.uint32)
    assert found.tolist() == [1, 0, 2**32 - 1, 0, 2**31, 2**32 - 1]


def test_a_sign_is_extended_or_not():
    x = np.int32([-5, 7])
    assert apply("cvt.s64.s32 %rd20, %r11;", x, to=np.int64).tolist() == [-5, 7]
    assert apply("cvt.u64.u32 %rd20, %r11;", x, to=np.int64).tolist() == [2**32 - 5, 7]


# --- integers -------------------------------------------------------------------------------------


def signed(x, bits):
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


INTEGER_OPERATIONS = {
    "mul.lo.s32": lambda a, b: signed(a * b, 32),
    "mul.hi.u32": lambda a, b: (a % 2**32) * (b % 2**32) >> 32,
    "div.s32": lambda a, b: signed(int(Fraction(a, b)), 32),
    "rem.s32": lambda a, b: a - b * int(Fraction(a, b)),
    "shl.b32": lambda a, b: (a << min(b % 2**32, 32)) % 2**32,
    "shr.u32": lambda a, b: a % 2**32 >> min(b % 2**32, 32),
    "shr.s32": lambda a, b: a >> min(b % 2**32, 32),
    "min.s32": min,
    "add.s32": lambda a, b: signed(a + b, 32),
    "sub.s32": lambda a, b: signed(a - b, 32),
    "xor.b32": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("opcode", INTEGER_OPERATIONS)
def test_integer_operation(opcode):
    a, b = integers(np.int32, seed=1), np.roll(integers(np.int32, seed=2), 150)
    b = np.where(b == 0, 3, b).astype(np.int32)
    found = apply(f"{opcode} %r20, %r11, %r12;", a, b, to=np.int32)
    function = INTEGER_OPERATIONS[opcode]
    wanted = [signed(function(*x), 32) for x in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.tolist() == wanted


def test_wide_products_and_bits():
    a, b = np.int32([-3, 2**31 - 1]), np.int32([2**30, -(2**31)])
    found = apply("mul.wide.s32 %rd20, %r11, %r12;", a, b, to=np.int64)
    assert found.tolist() == [-3 * 2**30, (2**31 - 1) * -(2**31)]
    found = apply("bfe.u32 %r20, %r11, 8, 8;", np.uint32([0x12345678]), to=np.uint32)
    assert found.tolist() == [0x56]
    body = "bfi.b32 %r20, %r11, %r12, 8, 4;"
    assert apply(body, np.uint32([0xAB]), np.uint32([0x12345678]), to=np.uint32) == [0x12345B78]
    body = "mov.b64 %rd20, {%r11, %r12};"
    assert apply(body, np.uint32([1]), np.uint32([2]), to=np.uint64).tolist() == [2**33 + 1]
    body = "mov.b64 %rd9, {%r11, %r12};\n{ .reg .b32 t; mov.b64 {t, %r20}, %rd9; }"
    assert apply(body, np.uint32([1]), np.uint32([2]), to=np.uint32).tolist() == [2]


def test_a_predicate_and_its_opposite():
    body = """
    mov.u32 %r20, 0;
    setp.gt.u32 %p1, %r11, 5;
    @%p1 mov.u32 %r20, 1;
    @!%p1 mov.u32 %r20, 2;
    """
    assert apply(body, np.uint32([4, 6, 5]), to=np.uint32).tolist() == [2, 1, 2]


def test_threads_part_in_a_loop_and_meet_again():
    """Each thread adds its own number of times; then the warp adds up all results."""
    body = """
    mov.u32 %r20, 0;
    $loop:
    setp.ge.u32 %p1, %r20, %r11;
    @%p1 bra $done;
    add.s32 %r20, %r20, 1;
    bra.uni $loop;
    $done:
    """
    body += "".join(
        f"shfl.sync.bfly.b32 %r21|%p2, %r20, {n}, 31, -1;\nadd.s32 %r20, %r20, %r21;\n"
        for n in (16, 8, 4, 2, 1)
    )
    found = apply(body, np.arange(64, dtype=np.uint32), to=np.uint32)
    assert found.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_lanes_wait_for_those_that_come_later_in_the_text():
    """Odd lanes take a way round below the shuffle."""
    body = """
    and.b32 %r2, %r1, 1;
    setp.eq.u32 %p1, %r2, 1;
    mov.u32 %r20, %r1;
    @%p1 bra $round;
    $together:
    shfl.sync.bfly.b32 %r20|%p2, %r20, 1, 31, -1;
    bra.uni $end;
    $round:
    add.s32 %r20, %r20, 100;
    bra.uni $together;
    $end:
    """
    found = apply(body, np.zeros(64, np.uint32), to=np.uint32)
    assert found.tolist() == [i - 1 if i % 2 else i + 101 for i in range(64)]


# --- warps ----------------------------------------------------------------------------------------


def test_shuffle_within_groups_of_four():
    body = "shfl.sync.idx.b32 %r20|%p1, %r11, 2, 7199, -1;"
    found = apply(body, np.arange(64, dtype=np.uint32), to=np.uint32)
    assert found.tolist() == [i // 4 * 4 + 2 for i in range(64)]


def test_ballot():
    body = """
    setp.lt.u32 %p1, %r1, 37;
    mov.u32 %r12, -1;
    vote.sync.ballot.b32 %r20, %p1, %r12;
    """
    found = apply(body, np.zeros(64, np.uint32), to=np.uint32)
    assert found.tolist() == [2**32 - 1] * 32 + [0b11111] * 32


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_product_of_matrices_from_shared_memory(name, dtype):
    """a (16, 16) and b (16, 8), row by row in shared memory, become a @ b + 1."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    # Lane l stores 16 bytes: half a row of a, then (lanes below 16) a row of b.
    body = f"""
    mov.u32 %r2, buffer;
    shl.b32 %r3, %r1, 4;
    add.s32 %r4, %r2, %r3;
    ld.global.v4.u32 {{%r11, %r12, %r13, %r14}}, [%rd4];
    st.shared.v4.u32 [%r4], {{%r11, %r12, %r13, %r14}};
    setp.lt.u32 %p1, %r1, 16;
    @%p1 ld.global.v4.u32 {{%r11, %r12, %r13, %r14}}, [%rd4+512];
    @%p1 st.shared.v4.u32 [%r4+512], {{%r11, %r12, %r13, %r14}};
    bar.sync 0;
    and.b32 %r5, %r1, 15;
    shl.b32 %r5, %r5, 5;
    shr.u32 %r6, %r1, 4;
    shl.b32 %r6, %r6, 4;
    add.s32 %r7, %r2, %r5;
    add.s32 %r7, %r7, %r6;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r7];
    shr.u32 %r8, %r5, 1;
    add.s32 %r8, %r8, %r2;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r15, %r16}}, [%r8+512];
    mov.f32 %f1, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%f2, %f3, %f4, %f5}},
        {{%r11, %r12, %r13, %r14}}, {{%r15, %r16}}, {{%f1, %f1, %f1, %f1}};
    st.global.v4.f32 [%rd5], {{%f2, %f3, %f4, %f5}};
    """
    given = torch.cat([a.flatten(), b.flatten()]).view(torch.int16).numpy()
    found = run(body, given, threads=32).view(np.float32).reshape(32, 4)
    wanted = (a.double() @ b.double() + 1).float().numpy()
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        ours = [wanted[row, column], wanted[row, column + 1]]
        ours += [wanted[row + 8, column], wanted[row + 8, column + 1]]
        np.testing.assert_allclose(found[lane], ours, rtol=1e-6)
