"""Small kernels for the interpreter's own tests."""

import struct

import numpy as np

from . import library
from .machine import Machine
from .parse import sources

THREADS = 64

# A kernel with two arrays: a thread takes 16 bytes from the first one and gives 16 bytes back.
KERNEL = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry test(
.param .u64 test_param_0,
.param .u64 test_param_1
)
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<29>;
.reg .b32 %f<29>;
.reg .b64 %rd<29>;
.reg .b64 %fd<9>;
.shared .align 16 .b8 buffer[1024];
ld.param.u64 %rd1, [test_param_0];
ld.param.u64 %rd2, [test_param_1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 16;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
BODY
ret;
}
"""


def run(body, given, threads=THREADS, found_bytes=None, step_limit=1000, shift=0):
    """What the kernel writes: 16 bytes a thread. ``given`` has as many."""
    text = KERNEL.replace("BODY", body)
    given = np.ascontiguousarray(given)
    found = np.zeros(16 * threads, np.uint8)
    machine = Machine(library.finder(sources(text), str), step_limit=step_limit)
    machine.memory.allow(given.ctypes.data, given.nbytes, "given", False)
    machine.memory.allow(found.ctypes.data, found_bytes or found.nbytes, "found")
    addresses = (given.ctypes.data + shift, found.ctypes.data)
    machine.launch("test", 1, threads, *(struct.pack("<Q", x) for x in addresses))
    return found


def apply(instruction, *operands, to):
    """One instruction over columns of 32 or 64 bits. Its operands are %r11.. or %fd1.. ."""
    columns = [np.asarray(x) for x in operands]
    count = len(columns[0])
    wide = any(x.dtype.itemsize == 8 for x in columns)
    rows = np.zeros((count, 2 if wide else 4), columns[0].dtype)
    for i, column in enumerate(columns):
        rows[:, i] = column
    loads = "ld.global.v2.f64 {%fd1, %fd2}, [%rd4];" if wide else ""
    loads = loads or "ld.global.v4.u32 {%r11, %r12, %r13, %r14}, [%rd4];"
    size = np.dtype(to).itemsize
    store = "st.global.u64 [%rd5], %rd20;" if size == 8 else "st.global.u32 [%rd5], %r20;"
    threads = -(-count // 32) * 32
    rows = np.concatenate([rows, np.ones((threads - count, rows.shape[1]), rows.dtype)])
    found = run(f"{loads}\n{instruction}\n{store}", rows, threads)
    return found.view(to).reshape(threads, -1)[:count, 0]
