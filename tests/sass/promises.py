"""The promises of the kernels about their machine code, and the check of them."""

from dataclasses import dataclass

from .dynamic_shared import dynamic_shared
from .loop import BITS


@dataclass(frozen=True)
class Promise:
    blocks: int = 1  # the number of blocks on an SM that the registers allow
    dynamic_shared: bool = False  # whether the launch asks for dynamic shared memory
    moves: frozenset = frozenset()  # Loop.moves of the streaming loops
    in_flight: int = 0  # loads in flight of a thread, except in loops that only copy words
    copies: bool = False  # whether the kernel has such loops
    calls: bool = False  # whether loops may call the slow paths of divisions and roots
    bytes: bool = False  # whether single bytes may be moved
    threads: int = 256  # the threads of a block: csrc/cuda/plan.cuh
    needs: tuple = ()  # prefixes of opcodes that must be there


def every_type(loads, stores):
    return {(elements, loads, stores) for elements in BITS}


def adamw(blocks, moments, masters=False):
    """Gradients of 16-bit parameters have 16 or 32 bits; the moments have 32.

    Masters, which only 16-bit parameters have, move as another moment does.
    """
    moves = set()
    moments += masters
    for elements, bits in BITS.items():
        if masters and bits > 16:
            continue
        stores = f"{1 + moments} x 128" if bits > 16 else f"1 x 64, {moments} x 128"
        if bits > 16:
            moves.add((elements, f"{2 + moments} x 128", stores))
        else:
            moves.add((elements, f"2 x 64, {moments} x 128", stores))
            moves.add((elements, f"1 x 64, {1 + moments} x 128", stores))
    return Promise(blocks, moves=frozenset(moves), in_flight=2 + moments, calls=True)


# Products of 16 x 8 x 16, loads of four matrices of 8 x 8 at a time, and copies of 16 bytes that
# bypass the registers.
TENSOR_CORES = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4")
ORDINARY = ("FFMA", "LDS.128", "LDS.64")
COPIES = ("LDGSTS.E.BYPASS.128",)
ATTENTION_THREADS = 128  # csrc/cuda/attention_tile.cuh


def attention():
    """Two or three blocks on an SM, if there is enough shared memory: one waits, others work."""
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
            for kernel in (
                "attention_kernel",
                "attention_grad_query_kernel",
                "attention_grad_key_kernel",
            ):
                blocks = 3 if kernel == "attention_kernel" and width <= 64 else 2
                yield (
                    f"{kernel}<{name},{width}>",
                    Promise(blocks, True, bytes=True, threads=ATTENTION_THREADS, needs=needs),
                )


MEASURING = frozenset(every_type("1 x 128", "-"))
SCALING = frozenset(every_type("1 x 128", "1 x 128"))
# The sums of 16-bit gradients have 32 bits.
ADDING = frozenset(
    (elements, "2 x 128" if bits > 16 else "1 x 64, 1 x 128", "1 x 128")
    for elements, bits in BITS.items()
)
COPYING = {("float32", "1 x 128", "1 x 128")}  # words of any dtype
PROMISES = {
    "grad_norm_kernel": Promise(4, moves=MEASURING, in_flight=4),
    "clip_kernel": Promise(4, True, moves=MEASURING | SCALING, in_flight=4),
    "scale_kernel": Promise(4, moves=SCALING, in_flight=4),
    "adamw_kernel<false,false>": adamw(3, moments=2),
    "adamw_kernel<true,false>": adamw(2, moments=3),
    "adamw_kernel<false,true>": adamw(2, moments=2, masters=True),
    "adamw_kernel<true,true>": adamw(2, moments=3, masters=True),
    "accumulate_kernel": Promise(4, moves=ADDING, in_flight=2),
    "settle_kernel": Promise(moves=frozenset(COPYING), copies=True, bytes=True),
    "find_lost_kernel": Promise(bytes=True),
    "decide_kernel": Promise(),
    "guard_decide_kernel": Promise(),
    "expand_plan_kernel": Promise(),
    "upload_kernel": Promise(),
    **dict(attention()),
}


def dynamic_shared_of(kernel, promise):
    """Bytes of a block that the launch asks for."""
    return dynamic_shared()[kernel.name] if promise.dynamic_shared else 0


def problems(kernel, promise=None):
    """One sentence for each broken promise."""
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
    shared = kernel.usage.shared + dynamic_shared_of(kernel, promise)
    if shared > 99 * 1024:
        yield f"{shared} bytes of shared memory: no block on sm_86, sm_89 and sm_120 gets so many"


def _of_memory(kernel, promise):
    for each in kernel.code:
        if each.kind in ("LDL", "STL"):
            yield f"spilled: {each}"
        # The barrier of cooperative_groups has a counter at an address that it loads itself.
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
