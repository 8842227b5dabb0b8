"""The traffic of the CUDA kernels, counted on the executor of tests/simt: no GPU, and no time.

Called by ``python bench/norm_kernel.py --model counted``.
"""

import sys
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from fastguard import ops
from fastguard._extras import MissingExtra
from fastguard._table import table
from fastguard.guard.statistics import fresh_statistics, unseen
from fastguard.speech.models import build_model
from fastguard.thresholds import Fixed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.simt import NoCompiler
from tests.simt.kernels.ops import Device, kernels

SECTOR = 32  # bytes: what L2 and memory move at the least
BANDWIDTH = 3.0e12  # bytes a second, for the floor
ADAMW = (1e-3, 0.9, 0.98, 0.01, 1e-8, True, False, False)
BUILDING = {"upload_kernel", "expand_plan_kernel"}  # of the plan, while nothing has moved not run

NOTE = f"""\
Counted, not measured: the kernels ran thread by thread on the CPU, one tensor of each size of a
list, and what they moved was multiplied. Bytes are for each fp32 parameter: `memory` has every
32-byte sector that a launch touches once (what must move if the caches begin empty and nothing is
dropped from them), `asked` every sector of every request, also where L1 or L2 has it. The floor is
`memory` at {BANDWIDTH / 1e12} TB/s, no time of any GPU. Launches were counted on a list of several
tensors, none of which had moved; where one has, uploads (one for 1000 tensors) and one expansion
come first. The rows of torch and Apex are derived from their sources, as bench/counted.py says,
with every kernel streaming.
"""


def teacher():
    return Counter(p.numel() for p in build_model("teacher", vocab_size=32).parameters())


def llama_1b():
    """The shapes of a 1.1 B decoder: 22 layers of 2048, 4 key heads of 32, 5632 hidden."""
    layer = {2048 * 2048: 2, 2048 * 256: 2, 2048 * 5632: 3, 2048: 2}
    return Counter({n: 22 * k for n, k in layer.items()}) + Counter({32000 * 2048: 2, 2048: 1})


@dataclass(frozen=True)
class Traffic:
    memory: float = 0  # bytes
    asked: float = 0  # bytes
    requests: int = 0  # of the streaming loops: 16 bytes of each lane
    sectors: int = 0
    ideal: float = 0  # sectors that so many bytes take if none is wasted

    def plus(self, other, times=1):
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Traffic(*(a + times * b for a, b in pairs))


def steady_launches(report):
    """Those that a step takes while nothing has moved."""
    return [each for each in report.launches if each.kernel not in BUILDING]


def traffic(report):
    steady = steady_launches(report)
    touched = sum(each.loaded_sectors + each.stored_sectors for each in steady)
    moves = [s for s in report.of("load", "store", "atomic") if "build_plan" not in s.where]
    streams = [s for s in moves if s.bytes == 16 and "plan.cuh" not in s.where]
    return Traffic(
        touched * SECTOR,
        sum(s.sectors for s in moves) * SECTOR,
        sum(s.requests for s in streams),
        sum(s.sectors for s in streams),
        sum(s.calls for s in streams) * 16 / SECTOR,
    )


def aligned(numel):
    """As the allocator of a GPU gives it."""
    whole = torch.empty(numel + 128)
    return whole[-whole.data_ptr() // 4 % 128 :][:numel].fill_(1e-3)


def device(blocks=16):
    return Device(blocks=blocks, resident=blocks, count=True, step_limit=1 << 40)


def norm_and_verdict(*numels):
    gpu = device()
    cpu = torch.device("cpu")
    known = fresh_statistics(cpu)._replace(per_tensor=unseen(len(numels), cpu))
    grads = [aligned(numel) for numel in numels]
    gpu.grad_norm_decide_(grads, None, None, known, 0, Fixed(), 1.0, 10.0)
    return gpu.report


def adamw(*numels):
    gpu = device()
    size = ops.packed_offsets(numels)[-1]
    state = (aligned(size), aligned(size), torch.zeros(0), torch.ones(len(numels)))
    params, grads = ([aligned(numel) for numel in numels] for _ in range(2))
    decision = (torch.tensor(1.0, dtype=torch.float64), torch.tensor(0))
    gpu.adamw_(params, grads, *state, *decision, *ADAMW)
    return gpu.report


def clip_kept(chunks=64):
    """All of it in the shared memory of as many blocks."""
    gpu = device(chunks)
    numel = chunks * 8192
    gpu.clip_([aligned(numel)], 1e-3, float("inf"))
    return gpu.report, numel


def of_list(count, sizes):
    total = Traffic()
    for numel, times in sizes.items():
        total = total.plus(traffic(count(numel)), times)
    return total


def multi_tensor_launches(sizes, tensors_at_most, blocks_at_most, chunk=65536):
    """Of torch's and Apex's multi_tensor_apply: as many tensors and chunks as arguments hold.

    torch: include/ATen/native/cuda/MultiTensorApply.cuh of the wheel for CUDA 13; Apex:
    csrc/multi_tensor_apply.cuh.
    """
    launches = tensors = blocks = 0
    for numel in sizes.elements():
        tensors += 1
        for left in range(-(-numel // chunk), 0, -1):
            blocks += 1
            full = tensors == tensors_at_most and left == 1
            if full or blocks == blocks_at_most:
                launches, blocks, tensors = launches + 1, 0, int(left > 1)
    return launches + (blocks > 0)


def peers(sizes):
    """Name, launches, bytes a parameter. shared/notes/guard.md has the sources, line by line."""
    n = sum(sizes.values())
    norm = multi_tensor_launches(sizes, 770, 2240)
    scale = multi_tensor_launches(sizes, 770, 2240)
    # zeros, lpnorm_cleanup for each 400 tensors, stack, vector_norm, and four on the coefficient.
    clip = norm + 1 + -(-n // 400) + 1 + 1 + 4 + scale
    fused = multi_tensor_launches(sizes, 252, 2240) + 1  # and one that counts the steps
    # mul, lerp, mul, addcmul, sqrt, div, add, addcdiv over 2 or 3 lists, and two on the steps.
    foreach = 8 * multi_tensor_launches(sizes, 448, 2240) + 2
    # The norm's own clean-up, five of torch's on the coefficient, and the scaling.
    apex = multi_tensor_launches(sizes, 110, 320) + 1 + 5 + multi_tensor_launches(sizes, 64, 320)
    yield "torch clip_grad_norm_", clip, 12
    yield "torch clip_grad_norm_, AdamW(fused=True)", clip + fused, 40
    yield "torch clip_grad_norm_, AdamW (foreach)", clip + foreach, 92
    yield "Apex clip_grad_norm_, FusedAdam", apex + multi_tensor_launches(sizes, 36, 320), 40


def row(name, launches, params, found):
    per_request = f"{found.sectors / found.requests:.3f} of {found.ideal / found.requests:.3f}"
    memory, asked = found.memory / params, found.asked / params
    floor = f"{found.memory / BANDWIDTH * 1e3:.3f}"
    return [name, str(launches), f"{memory:.3f}", f"{asked:.3f}", per_request, floor]


def of_peer(name, launches, params, size):
    return [name, str(launches), f"{size:.0f}", "", "", f"{size * params / BANDWIDTH * 1e3:.3f}"]


HEADS = ["", "launches", "memory B", "asked B", "sectors/request", "floor ms"]


def main():
    try:
        kernels()
    except (MissingExtra, NoCompiler) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(NOTE)
    for name, sizes in (("teacher", teacher()), ("1.1 B decoder", llama_1b())):
        params = sum(sizes.elements())
        norm, step = of_list(norm_and_verdict, sizes), of_list(adamw, sizes)
        few = (9000, 5, 0, 300)
        n_norm, n_step = (len(steady_launches(f(*few))) for f in (norm_and_verdict, adamw))
        rows = [
            row("fastguard norm + verdict", n_norm, params, norm),
            row("fastguard AdamW", n_step, params, step),
            row("fastguard, both", n_norm + n_step, params, norm.plus(step)),
            *(of_peer(peer, launches, params, size) for peer, launches, size in peers(sizes)),
        ]
        title = f"{name}: {params / 1e6:.1f} M fp32 parameters in {sizes.total()} tensors"
        print(table(title, HEADS, rows), end="\n\n")
    kept, numel = clip_kept()
    rows = [row("fastguard clip_", len(steady_launches(kept)), numel, traffic(kept))]
    print(table("a list that fits into the blocks' shared memory", HEADS, rows))
