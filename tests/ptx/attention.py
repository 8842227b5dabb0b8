"""Attention's operators, run by the kernels' PTX.

A :class:`PtxAttention` has the functions of tests/simt's AttentionDevice, and gives the same
arguments to the kernels. The launches and the layouts are those of csrc/cuda/attention.cu.
"""

import math
import struct

from tests.simt.kernels.attention import NAMES, AttentionDevice

from . import library
from .machine import STEP_LIMIT, Machine, Order

THREADS = 128
TYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "float"}


class PtxAttention(AttentionDevice):
    def __init__(self, order=None, programs=None, step_limit=STEP_LIMIT):
        super().__init__()
        self.order = order or Order()
        self.programs = programs or library.programs()
        self.step_limit = step_limit

    def run(self, op, given, tensors, **more):
        machine = Machine(self.programs, self.order, self.step_limit)
        type_ = NAMES[given[0].dtype]
        tensors = {name: described(x) for name, x in tensors.items()}
        arguments = Arguments(machine, tensors, given, type_)
        run = forward if op == "attention" else backward
        run(machine, arguments, **more)


def described(x):
    """Where a tensor begins, its storage, and its strides."""
    if x is None:
        return None
    storage = x.untyped_storage()
    return x.data_ptr(), storage.data_ptr(), storage.nbytes(), x.stride()


class Arguments:
    def __init__(self, machine, tensors, given, type_):
        self.machine = machine
        self.tensors = tensors
        self.type = type_
        query, key, value, *self.options = given
        self.batch, self.heads, self.queries, self.head_dim = query.shape
        self.kv_heads, self.keys, self.value_dim = key.size(1), key.size(2), value.size(3)
        self.bytes = query.element_size()
        self.width = self.compiled_width(max(self.head_dim, self.value_dim))

    def compiled_width(self, columns):
        widths = (32, 64, 96, 128) if self.bytes == 2 else (64, 128)
        return next(width for width in widths if width >= columns)

    def pointer(self, name, writable=False):
        """The address of a tensor, which kernels may then access; 0 for None."""
        if self.tensors.get(name) is None:
            return 0
        data, storage, nbytes, _ = self.tensors[name]
        self.machine.memory.allow(storage, nbytes, name, writable)
        return data

    def strides(self, name, count):
        found = self.tensors.get(name)
        return found[3][:count] if found else (0,) * count

    def of_heads(self, name, writable=False):
        return struct.pack("<Q3q", self.pointer(name, writable), *self.strides(name, 3))

    def attention(self):
        """The bytes of csrc/cuda/attention.cuh's Attention."""
        _, _, _, _, dropout_p, scale, softcap, clamp = self.options
        kept = max(math.floor((1 - dropout_p) * 65536 + 0.5), 1)
        sizes = (self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.value_dim)
        numbers = struct.pack("<6i3fIf", *sizes, scale, softcap, clamp, kept, 65536 / kept)
        return numbers + bytes(-len(numbers) % 8) + self.masks()

    def masks(self):
        is_causal = self.options[3]
        kinds = ("shown", "added", "narrow")
        kind = next((kind for kind in kinds if self.tensors[kind] is not None), "shown")
        return struct.pack(
            "<QQqq3Q4q?7x",
            self.pointer("seed"),
            self.pointer("padding"),
            *self.strides("padding", 2),
            *(self.pointer(kind) for kind in kinds),
            *self.strides(kind, 4),
            is_causal,
        )

    def launch(self, kernel, parameters, blocks, argument, dynamic_shared=0):
        name = f"{kernel}<{','.join(map(str, parameters))}>"
        self.machine.launch(name, blocks, THREADS, argument, dynamic_shared=dynamic_shared)


def forward(machine, a):
    """As csrc/cuda/attention_forward.cuh's ForwardTiles has it."""
    strips = 2 if a.bytes == 2 and a.width <= 64 else 1
    rows = 64 * strips
    keys = 64 if a.bytes == 2 and strips == 1 else 32
    argument = a.attention()
    argument += b"".join(a.of_heads(name) for name in ("query", "key", "value"))
    argument += a.of_heads("output", True) + a.of_heads("unrounded", True)
    results = (a.pointer("logsumexp", True), a.pointer("stats", True))
    argument += struct.pack("<QQq", *results, a.batch * a.heads * a.queries)
    blocks = a.batch * a.heads * -(-a.queries // rows)
    shared = (rows + 2 * keys) * a.width * a.bytes
    a.launch("attention_kernel", [TYPES[a.type], a.width], blocks, argument, shared)


def backward(machine, a, terms_rows):
    """As csrc/cuda/attention_backward.cuh's BackwardTiles has it."""
    argument = a.attention() + struct.pack("<ii", a.batch, terms_rows)
    inputs = ("query", "key", "value", "output", "unrounded", "grad_output")
    argument += b"".join(a.of_heads(name) for name in inputs)
    argument += struct.pack("<Q", a.pointer("logsumexp"))
    argument += a.of_heads("passed", True) + struct.pack("<Q", a.pointer("terms", True))
    argument += b"".join(a.of_heads(f"grad_{name}", True) for name in ("query", "key", "value"))

    type_ = TYPES[a.type]
    row = a.width * a.bytes
    passing = 64 if row <= 128 else 32 if row <= 256 else 16
    shared = 2 * 64 * row + 2 * passing * (2 * row + 8)
    saved = type_ if a.tensors["output"] is not None else "float"
    a.launch(
        "attention_delta_kernel",
        [type_, saved],
        a.batch * a.heads * terms_rows // 16,
        argument,
    )
    blocks = a.batch * a.heads * -(-a.queries // 64)
    a.launch("attention_grad_query_kernel", [type_, a.width], blocks, argument, shared)
    blocks = a.batch * a.kv_heads * -(-a.keys // 64)
    a.launch("attention_grad_key_kernel", [type_, a.width], blocks, argument, shared)
