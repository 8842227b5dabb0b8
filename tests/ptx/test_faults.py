"""What a kernel must not do, and what the interpreter does not know, are errors."""

import numpy as np
import pytest

from .error import Error, UnknownForm
from .machine import Machine
from .one_kernel import run

GIVEN = np.arange(4 * 64, dtype=np.uint32)
LOAD = "ld.global.v4.u32 {%r11, %r12, %r13, %r14}, [%rd4];"
STORE = "st.global.v4.u32 [%rd5], {%r11, %r12, %r13, %r14};"
FIRST = "setp.eq.u32 %p1, %r1, 0;\n"


def test_a_kernel_without_a_fault():
    assert run(LOAD + STORE, GIVEN).tobytes() == GIVEN.tobytes()


FAULTS = [
    ("out of bounds", LOAD.replace("%rd4", "%rd4+16"), "block 0, thread 63: ld.global.v4"),
    ("out of bounds", STORE.replace("%rd5", "%rd5+-16"), "thread 0: st.global"),
    ("out of bounds", "st.shared.u32 [buffer+1024], %r1;", "1024 bytes from the start of buffer"),
    ("out of bounds", "ld.param.u64 %rd1, [test_param_1+8];", "test_param_1 (8 bytes)"),
    ("misaligned", LOAD.replace("%rd4", "%rd4+8"), "thread 0"),
    ("misaligned", "st.shared.v2.f32 [buffer+4], {%f1, %f2};", "thread 0"),
    ("misaligned", "ld.global.u16 %rs1, [%rd4+1];", "thread 0"),
    ("read only", "st.global.u32 [%rd4], %r1;", "given (1024 bytes)"),
    ("divergent", FIRST + "@%p1 bar.sync 0;\nbar.sync 0;", "not all threads"),
    ("divergent", FIRST + "@%p1 ret;\nbar.sync 0;", "not all threads"),
    ("divergent", FIRST + "@%p1 shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;", "a part of a warp"),
    ("divergent", FIRST + "@!%p1 bar.warp.sync -1;", "a part of a warp"),
    ("endless", "$again:\nbra.uni $again;", "1001 steps"),
    ("unfinished", "cp.async.cg.shared.global [buffer], [%rd4], 16, 16;", "not waited for"),
    ("misaligned", "cp.async.cg.shared.global [buffer+8], [%rd4], 16, 16;", "thread 0"),
    ("not modelled", "cp.async.cg.shared.global [buffer], [%rd4], 16, 8;", "8"),
    ("not modelled", "shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, 1;", "a part of a warp"),
    ("trap", "trap;", "thread 0"),
]


@pytest.mark.parametrize("kind, body, text", FAULTS, ids=[f"{k}-{t}" for k, _, t in FAULTS])
def test_fault(kind, body, text):
    with pytest.raises(Error) as raised:
        run(body, GIVEN)
    assert raised.value.kind == kind
    assert text in str(raised.value)


def test_an_allocation_ends_at_its_last_byte():
    run(LOAD + STORE, GIVEN, found_bytes=16 * 64)
    with pytest.raises(Error, match=r"out of bounds.*thread 63: st\.global\.v4"):
        run(LOAD + STORE, GIVEN, found_bytes=16 * 64 - 1)


def test_a_masked_thread_accesses_nothing():
    body = "setp.lt.u32 %p1, %r1, 63;\n@%p1 " + LOAD.replace("%rd4", "%rd4+16")
    run(body, GIVEN)


def test_what_was_never_written_is_nan():
    body = "ld.shared.f32 %f1, [buffer];\nadd.rn.f32 %f2, %f1, %f3;\nst.global.f32 [%rd5], %f2;"
    found = run(body, GIVEN).view(np.float32)[::4]
    assert np.isnan(found).all()


COPY = """
mov.u32 %r2, buffer;
shl.b32 %r3, %r1, 4;
add.s32 %r3, %r2, %r3;
cp.async.cg.shared.global [%r3], [%rd4], 16, SIZE;
cp.async.commit_group;
cp.async.commit_group;
cp.async.wait_group LEFT;
ld.shared.v4.u32 {%r11, %r12, %r13, %r14}, [%r3];
cp.async.wait_group 0;
"""


@pytest.mark.parametrize(
    "left, wanted", [(0, GIVEN), (1, GIVEN), (2, np.uint32([2**32 - 1] * 256))]
)
def test_a_copy_arrives_when_its_group_is_waited_for(left, wanted):
    """There are two groups, of which the second one is empty."""
    body = COPY.replace("LEFT", str(left)).replace("SIZE", "16")
    assert run(body + STORE, GIVEN).tobytes() == wanted.tobytes()


def test_a_copy_of_nothing_writes_zeros_and_reads_nothing():
    body = COPY.replace("LEFT", "0").replace("SIZE", "0").replace("[%rd4]", "[%rd4+4096]")
    assert not run(body + STORE, GIVEN).any()


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.u32 %r2, %r1;",
        "add.f32 %f2, %f1, %f1;",  # which ptxas may contract with a product
        "add.rz.f32 %f2, %f1, %f1;",
        "add.s32 %r2, %r1;",
        "add.s64 %rd9, %rd1, %r1;",
        "cvt.rz.f32.f64 %f1, %fd1;",
        "ld.local.u32 %r2, [%rd1];",
        "ld.global.nc.u32 %r2, [%rd1];",
        "ld.global.v2.u32 {%r2, %r3, %r4}, [%rd4];",
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "shfl.sync.down.b32 %r2|%p2, %r1, 1, 31, -1;",
        "setp.lo.f32 %p1, %f1, %f2;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2}, {%r1}, {%r3}, {%f1, %f2};",
        "call.uni f;",
        "bra $nowhere;",
        "mov.u32 %r99, 0;",
    ],
)
def test_an_unknown_form_is_named(instruction):
    with pytest.raises(UnknownForm) as raised:
        run(instruction, GIVEN)
    assert instruction.rstrip(";") in str(raised.value)


def test_arguments_have_the_sizes_of_the_parameters(programs):
    with pytest.raises(ValueError, match=r"arguments of \[4\] bytes"):
        Machine(programs).launch("decide_kernel", 1, 32, b"\0\0\0\0")


def test_a_block_has_as_many_threads_as_it_was_compiled_for(programs):
    with pytest.raises(ValueError, match="288 threads, at most 256"):
        Machine(programs).launch("scale_kernel", 1, 288)
