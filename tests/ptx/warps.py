"""Opcodes of whole warps: shuffles, votes, matrices; and jumps and barriers."""

import numpy as np

from .block import WARP
from .error import Error
from .numbers import from_bfloat16
from .program import opcode

LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4


def registers(block, readers, warps):
    """The values of some registers as (warps, lanes) each."""
    return [np.broadcast_to(read(block), block.threads)[warps] for read in readers]


def put(block, write, values, warps, mask):
    """Writes (warps, lanes) to a register."""
    whole = np.zeros(block.threads, values.dtype)
    whole[warps] = values
    write(block, whole, mask)


def of_all_lanes(text, program):
    """A function that checks that an instruction names all lanes of a warp, as ours do."""
    read = program.reader(text, "u32")

    def check(block):
        if (read(block) != 0xFFFFFFFF).any():
            raise Error("not modelled", "an instruction of a part of a warp")

    return check


# --- shuffles and votes ---------------------------------------------------------------------------


@opcode(r"shfl\.sync\.(?P<how>bfly|idx)\.b32")
def shuffle(instruction, match, program):
    to, source, which, clamp, members = instruction.operands
    check_members = of_all_lanes(members, program)
    to, _, inside = to.partition("|")
    write, write_inside = program.writer(to, "b32"), program.writer(inside or "_", "pred")
    readers = [program.reader(source, "b32"), *(program.reader(x, "u32") for x in (which, clamp))]
    is_xor = match["how"] == "bfly"

    def execute(block, mask):
        check_members(block)
        warps = block.whole_warps(mask)
        values, which, clamp = registers(block, readers, warps)
        segment = clamp >> 8 & 31
        last = (LANE & segment) | (clamp & 31 & ~segment)
        lane = LANE ^ (which & 31) if is_xor else (LANE & segment) | (which & 31 & ~segment)
        valid = lane <= last
        lane = np.where(valid, lane, LANE)
        put(block, write, np.take_along_axis(values, lane, 1), warps, mask)
        put(block, write_inside, valid, warps, mask)

    return {"execute": execute, "of_warps": True}


@opcode(r"vote\.sync\.ballot\.b32")
def ballot(instruction, match, program):
    to, source, members = instruction.operands
    write, read = program.writer(to, "b32"), program.reader(source, "pred")
    check_members = of_all_lanes(members, program)

    def execute(block, mask):
        check_members(block)
        warps = block.whole_warps(mask)
        (votes,) = registers(block, [read], warps)
        bits = (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        put(block, write, np.repeat(bits[:, None], WARP, 1), warps, mask)

    return {"execute": execute, "of_warps": True}


@opcode(r"bar\.warp\.sync")
def warp_barrier(instruction, match, program):
    (members,) = instruction.operands
    check_members = of_all_lanes(members, program)

    def execute(block, mask):
        check_members(block)
        block.whole_warps(mask)

    return {"execute": execute, "of_warps": True}


# --- matrices -------------------------------------------------------------------------------------


@opcode(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>1|2|4)(?P<trans>\.trans)?\.shared\.b16")
def load_matrices(instruction, match, program):
    to, source = instruction.operands
    count = int(match["n"])
    writers = [program.writer(name, "b32") for name in program.list_of(to)]
    if len(writers) != count:
        raise ValueError(f"{len(writers)} registers")
    addresses = program.address(source)

    def execute(block, mask):
        warps = block.whole_warps(mask)
        giving = warps[:, : 8 * count]
        places = addresses(block)[giving].ravel()
        rows = block.shared.load(places, 4, 4, giving.ravel())
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(len(warps), count, 8, 8)
        if match["trans"]:
            matrices = matrices.swapaxes(2, 3)
        for i, write in enumerate(writers):
            low, high = (matrices[:, i, GROUP, 2 * IN_GROUP + j].astype(np.uint32) for j in (0, 1))
            put(block, write, low | high << np.uint32(16), warps, mask)

    return {"execute": execute, "of_warps": True}


# The rows and columns of each register's elements, from the PTX manual, "Matrix Fragments for
# mma.m16n8k16 with floating point type".
A_ELEMENTS = [(GROUP + 8 * (i % 2), 2 * IN_GROUP + 8 * (i // 2)) for i in range(4)]
B_ELEMENTS = [(2 * IN_GROUP + 8 * i, GROUP) for i in range(2)]
D_ELEMENTS = [(GROUP + 8 * (i // 2), 2 * IN_GROUP + i % 2) for i in range(4)]


@opcode(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<t>bf16|f16)\.(?P=t)\.f32")
def multiply_matrices(instruction, match, program):
    to, *sources = ([*program.list_of(operand)] for operand in instruction.operands)
    if [len(names) for names in (to, *sources)] != [4, 4, 2, 4]:
        raise ValueError("a fragment of another size")
    a, b, c = sources
    readers = [program.reader(name, "b32") for name in a + b]
    readers += [program.reader(name, "f32") for name in c]
    writers = [program.writer(name, "f32") for name in to]
    halves = bfloat16_halves if match["t"] == "bf16" else float16_halves

    def execute(block, mask):
        warps = block.whole_warps(mask)
        values = registers(block, readers, warps)
        left, right, sums = (np.zeros((len(warps), 16, n)) for n in (16, 8, 8))
        for (row, column), value in zip(A_ELEMENTS, values[:4], strict=True):
            left[:, row, column], left[:, row, column + 1] = halves(value)
        for (row, column), value in zip(B_ELEMENTS, values[4:6], strict=True):
            right[:, row, column], right[:, row + 1, column] = halves(value)
        for (row, column), value in zip(D_ELEMENTS, values[6:], strict=True):
            sums[:, row, column] = value
        product = (left @ right + sums).astype(np.float32)
        for (row, column), write in zip(D_ELEMENTS, writers, strict=True):
            put(block, write, product[:, row, column], warps, mask)

    return {"execute": execute, "of_warps": True}


def bfloat16_halves(words):
    low, high = words.astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)
    return from_bfloat16(low), from_bfloat16(high)


def float16_halves(words):
    low, high = words.astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)
    return low.view(np.float16), high.view(np.float16)


# --- jumps and barriers ---------------------------------------------------------------------------


@opcode(r"bra(?:\.uni)?")
def branch(instruction, match, program):
    (label,) = instruction.operands
    to = program.kernel.labels[label]

    def jump(block, at, active, taken):
        block.branch(to, at, active, taken)

    return {"jump": jump}


@opcode(r"ret|exit")
def end(instruction, match, program):
    def jump(block, at, active, taken):
        block.end(at, active, taken)

    return {"jump": jump}


@opcode(r"bar\.sync|barrier\.sync")
def barrier(instruction, match, program):
    if instruction.operands != ("0",):
        raise ValueError("another barrier than 0 of all threads")

    def jump(block, at, active, taken):
        block.barrier(at, active, taken)

    return {"jump": jump}


@opcode(r"trap")
def trap(instruction, match, program):
    def execute(block, mask):
        raise Error("trap", "the kernel ends with an error", thread=int(block.active(mask)[0]))

    return {"execute": execute}
