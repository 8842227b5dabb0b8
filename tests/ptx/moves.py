"""Opcodes that move data: loads, stores, atomics and asynchronous copies."""

import numpy as np

from .error import Error
from .numbers import DTYPES, UNSIGNED, bits_of
from .program import opcode

TYPE = r"(?P<t>[sub](?:8|16|32|64)|f32|f64)"
VECTOR = r"(?:\.v(?P<n>2|4))?"


@opcode(rf"ld\.(?P<space>param|shared|global)(?:\.cs)?{VECTOR}\.{TYPE}")
def load(instruction, match, program):
    return loads(instruction, match, program)


@opcode(rf"ld\.acquire\.gpu(?P<space>)(?P<n>)\.{TYPE}")
def load_acquire(instruction, match, program):
    return loads(instruction, match, program) | {"is_seen": True}


def loads(instruction, match, program):
    to, source = instruction.operands
    names = program.list_of(to)
    if len(names) != int(match["n"] or 1):
        raise ValueError(f"{len(names)} registers")
    type_ = match["t"]
    writers = [program.writer(name, type_) for name in names]
    addresses = program.address(source)
    size, dtype = bits_of(type_) // 8, DTYPES[type_]
    space = space_of(match["space"])

    def execute(block, mask):
        lanes = block.active(mask)
        found = space(block).load(addresses(block)[lanes], size, len(names), lanes)
        for column, write in enumerate(writers):
            values = np.zeros(block.threads, dtype)
            values[lanes] = found[:, column].view(dtype)
            write(block, values, mask)

    return {"execute": execute}


@opcode(rf"st\.(?P<space>shared|global)(?:\.cs)?{VECTOR}\.{TYPE}")
def store(instruction, match, program):
    to, source = instruction.operands
    names = program.list_of(source)
    if len(names) != int(match["n"] or 1):
        raise ValueError(f"{len(names)} registers")
    bits = bits_of(match["t"])
    readers = [program.reader(name, f"b{bits}" if name[0] == "%" else match["t"]) for name in names]
    addresses = program.address(to)
    space = space_of(match["space"])

    def execute(block, mask):
        lanes = block.active(mask)
        values = np.empty((block.threads, len(names)), UNSIGNED[bits])
        for column, read in enumerate(readers):
            values[:, column] = read(block).view(UNSIGNED[bits])
        space(block).store(addresses(block)[lanes], values[lanes], lanes)

    return {"execute": execute}


def space_of(name):
    """A function of a block. Addresses of no named space are those of global memory here."""
    if name == "shared":
        return lambda block: block.shared
    if name == "param":
        return lambda block: block.parameters
    return lambda block: block.memory


@opcode(r"atom(?:\.global\.add|\.add\.release\.gpu)\.u32")
def atomic_add(instruction, match, program):
    to, place, operand = instruction.operands
    addresses, read = program.address(place), program.reader(operand, "u32")
    write = program.writer(to, "u32")

    def execute(block, mask):
        before = np.zeros(block.threads, np.uint32)
        where, by = addresses(block), np.broadcast_to(read(block), block.threads)
        for lane in block.launch.order_of(block.active(mask)):
            one, at = np.array([lane]), where[lane : lane + 1]
            old = block.memory.load(at, 4, 1, one)
            block.memory.store(at, old + by[lane], one)
            before[lane] = old[0, 0]
        write(block, before, mask)

    return {"execute": execute, "is_seen": True}


@opcode(r"membar\.gl")
def fence(instruction, match, program):
    """Stores are seen at once in this machine; tests/ptx/promises.py asks for the fences."""
    return {"execute": lambda block, mask: None}


# --- asynchronous copies --------------------------------------------------------------------------
# They arrive as late as they may: when the thread waits for their group. Until then their
# destination is poison.


@opcode(r"cp\.async\.cg\.shared\.global")
def copy_async(instruction, match, program):
    to, source, size, given = instruction.operands
    if size != "16":
        raise ValueError(f"{size} bytes")
    to, source = program.address(to), program.address(source)
    bytes_given = program.reader(given, "u32")

    def execute(block, mask):
        lanes = block.active(mask)
        given = np.broadcast_to(bytes_given(block), block.threads)[lanes]
        if not np.isin(given, (0, 16)).all():
            raise Error("not modelled", f"copies of {set(given.tolist())} bytes")
        places, copied = to(block)[lanes], given == 16
        poison = np.full((len(lanes), 4), 0xFFFFFFFF, np.uint32)
        block.shared.store(places, poison, lanes)
        block.copies.append((places, source(block)[lanes], copied, lanes))

    return {"execute": execute}


@opcode(r"cp\.async\.commit_group")
def commit_group(instruction, match, program):
    def execute(block, mask):
        whole_block(mask)
        block.groups_of_copies.append(block.copies)
        block.copies = []

    return {"execute": execute}


@opcode(r"cp\.async\.wait_group")
def wait_group(instruction, match, program):
    (left,) = (int(operand) for operand in instruction.operands)

    def execute(block, mask):
        whole_block(mask)
        arriving = max(len(block.groups_of_copies) - left, 0)
        for group in block.groups_of_copies[:arriving]:
            for copy in group:
                arrive(block, *copy)
        del block.groups_of_copies[:arriving]

    return {"execute": execute}


def arrive(block, places, sources, copied, lanes):
    values = np.zeros((len(lanes), 4), np.uint32)
    if copied.any():
        values[copied] = block.memory.load(sources[copied], 4, 4, lanes[copied])
    block.shared.store(places, values, lanes)


def whole_block(mask):
    if mask is not None:
        raise Error("not modelled", "a group of copies of a part of a block")
