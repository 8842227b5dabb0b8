"""What the kernels promise of their machine code, and where they do not keep it."""

from dataclasses import dataclass

from .loop import BITS


@dataclass(frozen=True)
class Promise:
    blocks: int = 1  # fit on an SM, as far as it is a matter of registers
    dynamic_shared: int = 0  # bytes of a block that the launch asks for
    moves: frozenset = frozenset()  # of the streaming loops, as Loop.moves
    in_flight: int = 0  # loads of a thread, except in loops that only copy words
    copies: bool = False  # has such loops
    calls: bool = False  # of the slow ways of a division or a root
    bytes: bool = False  # may be moved one by one
    threads: int = 256  # of a block: csrc/cuda/plan.cuh
    needs: tuple = ()  # beginnings of opcodes that must be there


def every_type(loads, stores):
    return {(elements, loads, stores) for elements in BITS}


def adamw(blocks, moments):
    """Beside 16-bit parameters the gradients have 16 bits or 32, and the moments 32."""
    moves = set()
    for elements, bits in BITS.items():
        stores = f"{1 + moments} x 128" if bits > 16 else f"1 x 64, {moments} x 128"
        if bits > 16:
            moves.add((elements, f"{2 + moments} x 128", stores))
        else:
            moves.add((elements, f"2 x 64, {moments} x 128", stores))
            moves.add((elements, f"1 x 64, {1 + moments} x 128", stores))
    return Promise(blocks, moves=frozenset(moves), in_flight=2 + moments, calls=True)


# Products of 16 x 8 x 16 from what four matrices of 8 x 8 at a time bring, 16 bytes of each row
# copied past the registers.
TENSOR_CORES = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4")
ORDINARY = ("FFMA", "LDS.128", "LDS.64")
COPIES = ("LDGSTS.E.BYPASS.128",)
ATTENTION_THREADS = 128  # csrc/cuda/attention_tile.cuh


def attention():
    """Two or three blocks on an SM, as far as there is shared memory: one waits, others work."""
    types = {"BFloat16": "bfloat16", "Float16": "float16", "float": "float32"}
    for name, elements in types.items():
        bits = BITS[elements]
        for saved, loads in {name: 2, "float": 1 + 32 // bits}.items():
            moves = frozenset([(elements, f"{loads} x 128", "1 x 128")])
            yield (
                f"attention_delta_kernel<{name},{saved}>",
                Promise(8, moves=moves, in_flight=loads, threads=ATTENTION_THREADS),
            )
        needs = (*(TENSOR_CORES if bits == 16 else ORDINARY), *COPIES, "STG.E.128")
        for width in (32, 64, 96, 128) if bits == 16 else (64, 128):
            # What csrc/cuda/attention_forward.cuh and attention_backward.cuh have as Tiles::bytes.
            row = width * bits // 8
            rows, keys = (64, 32) if bits > 16 else (128, 32) if width <= 64 else (64, 64)
            passing = 64 if row <= 128 else 32 if row <= 256 else 16
            forward = (rows + 2 * keys) * row
            backward = 2 * 64 * row + 2 * passing * (2 * row + 8)
            for kernel, shared in (
                ("attention_kernel", forward),
                ("attention_grad_query_kernel", backward),
                ("attention_grad_key_kernel", backward),
            ):
                blocks = 3 if kernel == "attention_kernel" and width <= 64 else 2
                yield (
                    f"{kernel}<{name},{width}>",
                    Promise(blocks, shared, bytes=True, threads=ATTENTION_THREADS, needs=needs),
                )


MEASURING = frozenset(every_type("1 x 128", "-"))
SCALING = frozenset(every_type("1 x 128", "1 x 128"))
# The sums of 16-bit gradients have 32.
ADDING = frozenset(
    (elements, "2 x 128" if bits > 16 else "1 x 64, 1 x 128", "1 x 128")
    for elements, bits in BITS.items()
)
COPYING = {("float32", "1 x 128", "1 x 128")}  # words, whatever they are
PROMISES = {
    "grad_norm_kernel": Promise(4, moves=MEASURING, in_flight=4),
    "clip_kernel": Promise(4, 32768, moves=MEASURING | SCALING, in_flight=4),
    "scale_kernel": Promise(4, moves=SCALING, in_flight=4),
    "adamw_kernel<false>": adamw(3, moments=2),
    "adamw_kernel<true>": adamw(2, moments=3),
    "accumulate_kernel": Promise(4, moves=ADDING, in_flight=2),
    "settle_kernel": Promise(moves=frozenset(COPYING), copies=True, bytes=True),
    "find_lost_kernel": Promise(bytes=True),
    "decide_kernel": Promise(),
    "guard_decide_kernel": Promise(),
    "expand_plan_kernel": Promise(),
    "upload_kernel": Promise(),
    **dict(attention()),
}


def problems(kernel, promise=None):
    """One sentence for each."""
    promise = promise or PROMISES[kernel.name]
    return [
        *_of_resources(kernel, promise),
        *_of_memory(kernel, promise),
        *_of_opcodes(kernel, promise),
        *_of_loops(kernel, promise),
    ]


def _of_resources(kernel, promise):
    if kernel.usage.stack or kernel.usage.local:
        yield f"{kernel.usage.stack} bytes of stack, {kernel.usage.local} of local memory"
    by_registers = kernel.blocks_by_registers(promise.threads)
    if by_registers < promise.blocks:
        yield (
            f"{kernel.usage.registers} registers: {by_registers} blocks fit on an "
            f"SM, not {promise.blocks}"
        )
    if kernel.usage.shared > 48 * 1024:
        yield f"{kernel.usage.shared} bytes of shared memory without asking: 48 KiB is the most"
    shared = kernel.usage.shared + promise.dynamic_shared
    if shared > 99 * 1024:
        yield f"{shared} bytes of shared memory: no block on sm_86, sm_89 and sm_120 gets so many"


def _of_memory(kernel, promise):
    for each in kernel.code:
        if each.kind in ("LDL", "STL"):
            yield f"spilled: {each}"
        # cooperative_groups meets at a counter by an address of its own.
        if each.kind in ("LD", "ST") and ".STRONG" not in each.opcode:
            yield f"not known to be global memory: {each}"
        if each.kind in ("LD", "ST", "LDG", "STG") and each.width == 8 and not promise.bytes:
            yield f"byte by byte: {each}"


def _of_opcodes(kernel, promise):
    for needed in promise.needs:
        if not any(each.opcode.startswith(needed) for each in kernel.code):
            yield f"no {needed}"


def _of_loops(kernel, promise):
    found = {loop.moves for loop in kernel.streaming_loops}
    for elements, loads, stores in sorted(promise.moves - found):
        yield f"no loop over {elements} loads {loads} and stores {stores}"
    for loop in kernel.streaming_loops:
        elements, loads, stores = loop.moves
        which = f"the loop at {loop.header:#x} over {elements}"
        if loop.moves not in promise.moves:
            yield f"{which} loads {loads} and stores {stores}"
        in_flight = 1 if promise.copies and loop.moves in COPYING else promise.in_flight
        if loop.in_flight < in_flight:
            yield f"{which} needs the first load after {loop.in_flight}, not {in_flight}"
        if stores == "-" and elements != "float64" and any(each.is_fp64 for each in loop.body):
            yield f"{which} takes the fp64 units"
        if not promise.calls and any(each.is_call for each in loop.body):
            yield f"{which} has a call"
