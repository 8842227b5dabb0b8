"""The executor's findings about fastguard's CUDA kernels: races, bounds, traffic.

tests/ops and tests/optim compare the results of the kernels, as those of the CPU's kernels.
"""

import itertools
import math
import re

import pytest
import torch

from fastguard import ops
from fastguard.thresholds import AdaGC, AutoClip
from tests import tensors

from . import Error
from .build import ROOT
from .kernels.ops import Device

F64 = torch.float64
OPTIONS = (1e-2, 0.9, 0.98, 0.1, 1e-8, True)


def drawn(*sizes, dtype=torch.float32, offset=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(n + offset, generator=generator).to(dtype) for n in sizes]
    return [w[offset:] for w in whole]


def gradients():
    """Tensors of all dtypes: one and several chunks, heads and tails, a NaN or Inf in each."""
    grads = drawn(20_000, 5, 0, offset=1) + drawn(8192, 8193)
    grads += drawn(9_003, dtype=torch.bfloat16, offset=3) + drawn(9_001, dtype=F64)
    grads += drawn(33, dtype=torch.float16, offset=5)
    grads[0][[9_000, 11_000, 19_999]] = torch.tensor([math.inf, math.nan, math.nan])
    grads[1][2] = math.nan
    permuted = drawn(90 * 100)[0].view(90, 100).t()
    permuted[99, 3] = math.inf
    return [*grads, permuted]


def finite(dtypes=(torch.float32, torch.bfloat16, torch.float16, F64)):
    sizes = (20_000, 8_193, 300, 5, 0)
    return [
        *(g for i, d in enumerate(dtypes) for g in drawn(*sizes, dtype=d, seed=i)),
        *(g for i, d in enumerate(dtypes) for g in drawn(8_200, 3, dtype=d, offset=1, seed=i)),
    ]


def statistics(n):
    numbers = torch.tensor([120.0, 100.0, 2.0, 0.5], dtype=F64)
    windows = [torch.arange(40, dtype=F64)[torch.randperm(40)] / 10 + 1 for _ in range(2)]
    columns = torch.tensor([[0.5], [-1.0], [0.7], [3.0]], dtype=F64).repeat(1, n)
    return ops.Statistics(numbers, *windows, columns)


def scalar(value):
    return torch.tensor(value, dtype=F64)


def flat(*results):
    """All tensors of nested results."""
    for result in results:
        if isinstance(result, torch.Tensor):
            yield result
        elif result is not None:
            yield from flat(*result)


def run_grad_norm(device):
    return device.grad_norm(gradients())


def run_repeatedly(device):
    return device.grad_norm(finite(), repeats=2)


def run_many_tensors(device):
    return device.grad_norm(drawn(*([3] * 600)))


def run_many_chunks(device):
    return device.grad_norm(drawn(8192 * 300))


def decided(device, threshold, grads):
    torch.manual_seed(1)
    known = statistics(len(grads))
    scaling = ops.Scaling(torch.tensor([8.0]), torch.tensor([0], dtype=torch.int32), 2.0, 0.5, 2)
    found = device.grad_norm_decide_(
        grads, scalar(0.01), scalar(1.0), known, 5, threshold, 1.0, 1e3, scaling=scaling
    )
    return found, known, scaling[:2]


def run_grad_norm_decide(device):
    return decided(device, AutoClip(), finite())


def run_grad_norm_decide_adagc(device):
    return decided(device, AdaGC(), drawn(*([50] * 300)))


def run_guard_decide(device):
    torch.manual_seed(2)
    known, norms = statistics(300), torch.rand(300, dtype=F64)
    measured = ops.GradNorm(norms.square().sum().sqrt(), norms, None)
    return device.guard_decide_(measured, None, None, known, 5, AdaGC(), 1.0, 1e3), known


def run_decide(device):
    return device.decide(scalar(3.0), 1.0, 10.0)


def run_scale(device):
    grads = finite()
    device.scale_(grads, torch.linspace(0.1, 1.0, len(grads), dtype=F64))
    return grads


def run_clip(device):
    grads = finite((F64, torch.float32, torch.bfloat16, torch.float16))  # float64 is not kept
    return device.clip_(grads, 1.0, math.inf), grads


def run_adamw(device, amsgrad=True, verdict=1, dtypes=(torch.float32, torch.bfloat16)):
    params, grads = finite(dtypes), finite(dtypes)
    if F64 not in dtypes:
        grads = [g.float() if i % 2 else g for i, g in enumerate(grads)]
    size = ops.packed_offsets(p.numel() for p in params)[-1]
    moment = F64 if F64 in dtypes else torch.float32
    m, v, largest = (g.abs() for g in drawn(size, size, size, dtype=moment))
    steps = torch.arange(len(params), dtype=torch.float32)
    state = (m, v, largest if amsgrad else largest[:0], steps)
    coefs = torch.linspace(0.1, 1.0, len(params), dtype=F64)
    device.adamw_(params, grads, *state, coefs, torch.tensor(verdict), *OPTIONS, amsgrad, False)
    return params, state


def run_adamw_of_the_first_step(device):
    params, grads = drawn(*([40] * 64)), drawn(*([40] * 64), seed=1)
    size = ops.packed_offsets([40] * 64)[-1]
    state = (torch.zeros(size), torch.zeros(size), torch.zeros(0), torch.zeros(64))
    rest = (scalar(1.0), torch.tensor(0), *OPTIONS, False, False)
    device.adamw_(params, grads, *state, *rest)
    return params, state


def run_adamw_float64(device):
    return run_adamw(device, amsgrad=False, dtypes=(F64,))


def run_adamw_masters(device, verdict=1):
    """Some parameters were written by others, and are not their rounded masters."""
    params, grads = finite((torch.bfloat16, torch.float16)), finite((torch.bfloat16, torch.float16))
    grads = [g.float() if i % 3 == 0 else g for i, g in enumerate(grads)]
    offsets = ops.packed_offsets(p.numel() for p in params)
    m, v, master = (g.abs() for g in drawn(*[offsets[-1]] * 3))
    for p, offset in list(zip(params, offsets, strict=False))[::2]:
        p.copy_(ops.packed_view(master, p, offset))
    state = (m, v, torch.zeros(0), torch.arange(len(params), dtype=torch.float32))
    rest = (scalar(0.5), torch.tensor(verdict), *OPTIONS, False, False, master)
    device.adamw_(params, grads, *state, *rest)
    return params, state, master


def run_accumulate(device):
    sums = [g.to(F64 if g.dtype == F64 else torch.float32) for g in finite()]
    window = torch.ones(3, dtype=F64)
    device.accumulate_(sums, finite(), torch.tensor(0), window, 0.5)
    return sums, window


def run_settle(device):
    buffers = [*drawn(20_001, 7), torch.tensor(5), *drawn(300, offset=1), *finite()]
    buffers += [torch.ones(300, dtype=torch.complex64), *drawn(9_000, 9_000)]
    saved = [torch.zeros_like(b) for b in buffers]
    owners = torch.arange(len(buffers)) // 2
    for buffer in (buffers[0], buffers[4], buffers[-1]):
        buffer[-1] = math.nan
    lost = device.settle_(buffers, saved, torch.tensor(0), owners)
    assert lost.count_nonzero() == 6
    return buffers, saved, lost


def run_without_tensors(device):
    window = torch.zeros(3, dtype=F64)
    device.accumulate_([], [], torch.tensor(0), window, 0.5)
    device.settle_([], [], torch.tensor(0), torch.zeros(0, dtype=torch.int64))
    return window


RUNS = [
    run_without_tensors,
    run_grad_norm,
    run_repeatedly,
    run_many_tensors,
    run_many_chunks,
    run_grad_norm_decide,
    run_grad_norm_decide_adagc,
    run_guard_decide,
    run_decide,
    run_scale,
    run_clip,
    run_adamw,
    run_adamw_of_the_first_step,
    run_adamw_float64,
    run_adamw_masters,
    run_accumulate,
    run_settle,
]
SCHEDULES = [
    *({"schedule": "greedy", "seed": seed, "weak_memory": seed % 2 == 0} for seed in range(4)),
    *({"schedule": "round_robin", "seed": seed, "block_races": True} for seed in range(2)),
    *({"schedule": "random", "seed": seed, "weak_memory": True} for seed in range(2)),
    *({"schedule": "unfair", "seed": seed, "weak_memory": seed % 2 == 0} for seed in range(12)),
]


def bits(results):
    return tensors.bits(flat(results))


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_the_result_is_the_same_on_every_schedule_and_for_any_number_of_blocks(run):
    expected = bits(run(Device()))
    for blocks, options in zip(itertools.cycle((1, 2, 5, 16)), SCHEDULES[::2], strict=False):
        assert same(bits(run(Device(blocks=blocks, resident=16, **options))), expected)


@pytest.fixture(scope="module")
def sites():
    """The place of each barrier, fence and bound of the kernels, and the runs that reach it."""
    found = {}
    for run in RUNS:
        device = Device()
        run(device)
        for site in device.report.removable():
            found.setdefault(site, []).append(run)
    return found


def caught(site, runs):
    """Whether an error or a wrong result in some order of the threads shows a disabled site."""
    expected = {run: bits(run(Device())) for run in runs}
    for options, run in itertools.product(SCHEDULES, runs):
        try:
            found = bits(run(Device(blocks=4, resident=4, removed=frozenset([site]), **options)))
        except Error:
            return True
        if not same(found, expected[run]):
            return True
    return False


def test_every_barrier_fence_and_bound_is_needed(sites):
    """Each barrier, fence and bound is disabled once, and that is noticed each time."""
    assert [site for site, runs in sites.items() if not caught(site, runs)] == []


def test_every_barrier_fence_and_bound_is_met(sites):
    text = re.compile(r"\b(within|__syncthreads|__threadfence|grid_sync)\(")
    met = {site.rsplit(":", 1)[0] for site in sites}
    for path in sorted((ROOT / "csrc/cuda").glob("*.cuh")):
        if path.name in ("device.cuh", "tensor_core.cuh") or "attention" in path.name:
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if text.search(line.split("//")[0]):
                assert f"{path.relative_to(ROOT)}:{number}" in met


def counted(blocks=8):
    return Device(blocks=blocks, resident=blocks, count=True)


def aligned(numel):
    """The tensor with the alignment of a GPU's allocator."""
    whole = drawn(numel + 128)[0]
    return whole[-whole.data_ptr() // 4 % 128 :][:numel]


def moved(device):
    """The bytes of the sectors that the last kernel loaded and stored, each counted once."""
    last = device.report.launches[-1]
    return 32 * last.loaded_sectors, 32 * last.stored_sectors


def assert_no_sector_is_wasted(device):
    streams = [s for s in device.report.of("load", "store") if s.bytes == 16]
    assert {s.where.split(":")[0] for s in streams} > {"csrc/cuda/plan.cuh"}
    for site in streams:
        if "plan.cuh" not in site.where:
            assert site.sectors == site.calls * 16 / 32, site


def test_norm_and_verdict_move_four_bytes_an_element():
    device, numel = counted(), 8192 * 64
    decided(device, AutoClip(), [aligned(numel)])
    loaded, stored = moved(device)
    assert 4 * numel <= loaded + stored < 4 * numel * 1.01
    assert_no_sector_is_wasted(device)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 28), (torch.bfloat16, 22)])
def test_adamw_moves_each_array_once(dtype, size):
    device, numel = counted(), 8192 * 64
    param, grad = (aligned(numel).to(dtype) for _ in range(2))
    state = (aligned(numel), aligned(numel), torch.zeros(0), torch.ones(1))
    device.adamw_([param], [grad], *state, scalar(0.5), torch.tensor(1), *OPTIONS, False, False)
    loaded, stored = moved(device)
    assert size * numel <= loaded + stored < size * numel * 1.01
    assert_no_sector_is_wasted(device)


@pytest.mark.parametrize("grads, size", [(torch.bfloat16, 30), (torch.float32, 32)])
def test_adamw_moves_each_array_once_with_masters(grads, size):
    device, numel = counted(), 8192 * 64
    param, grad = aligned(numel).bfloat16(), aligned(numel).to(grads)
    state = (aligned(numel), aligned(numel), torch.zeros(0), torch.ones(1))
    rest = (scalar(0.5), torch.tensor(1), *OPTIONS, False, False, aligned(numel))
    device.adamw_([param], [grad], *state, *rest)
    loaded, stored = moved(device)
    assert size * numel <= loaded + stored < size * numel * 1.01
    assert_no_sector_is_wasted(device)


def test_clip_reads_and_writes_once_what_its_blocks_keep():
    device, numel = counted(16), 8192 * 16
    device.clip_([aligned(numel)], 1e-3, math.inf)
    asked = sum(s.sectors for s in device.report.of("load", "store") if s.bytes == 16) * 32
    building = {"upload_kernel", "expand_plan_kernel", "clip_kernel"}
    assert {launch.kernel for launch in device.report.launches} == building
    assert 8 * numel <= asked < 8 * numel * 1.05
    assert device.report.total("conflicts", "shared_load", "shared_store") == 0


def test_clip_writes_nothing_where_nothing_is_clipped():
    device = counted()
    grads = [aligned(20_000), aligned(3)]
    before = bits(grads)
    device.clip_(grads, 1e9, math.inf)
    assert same(bits(grads), before)
    assert moved(device)[1] < 1000


@pytest.mark.parametrize("verdict", [2, 3, 77, -1])
def test_a_skip_reads_the_verdict_and_stores_nothing(verdict):
    device = counted()
    run_adamw(device, verdict=verdict)
    assert moved(device) == (32, 0)
    device = counted()
    run_adamw_masters(device, verdict)
    assert moved(device) == (32, 0)


def test_misaligned_arrays_waste_few_sectors():
    """A gradient that begins 4 bytes after a sector, as DDP's views of its buckets may."""
    device, numel = counted(), 8192 * 16
    param, grad = aligned(numel), aligned(numel + 1)[1:]
    state = (aligned(numel), aligned(numel), torch.zeros(0), torch.ones(1))
    device.adamw_([param], [grad], *state, scalar(0.5), torch.tensor(1), *OPTIONS, False, False)
    asked = sum(s.sectors for s in device.report.of("load", "store")) * 32
    assert asked < 1.1 * 28 * numel
