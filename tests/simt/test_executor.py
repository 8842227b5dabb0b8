"""The executor finds what it is there to find, and nothing else."""

import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import simt

from .build import ROOT

SCHEDULES = [
    (schedule, seed)
    for schedule in ("round_robin", "greedy", "random", "unfair")
    for seed in (0, 7)
]


@cache
def kernels():
    try:
        return simt.load("executor_kernels", ["tests/simt/kernels/bindings.cpp"])
    except simt.NoCompiler as error:
        pytest.skip(str(error))


def drawn(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


# --- each runs one kernel and says whether its result is right, NaN never being so ----------------


def reduce(options, n=1500, blocks=6):
    x, partial = drawn(n), np.full(blocks, np.nan)
    ended, total = np.zeros(1, np.uint32), np.full(1, np.nan)
    report = kernels().reduce(options, blocks, x, partial, ended, total)
    return report, abs(total[0] - x.sum(dtype=np.float64)) < 1e-9


def normalise(options, n=1500, blocks=6):
    x, partial = np.abs(drawn(n)), np.full(blocks, np.nan)
    wanted = x / x.sum(dtype=np.float64)
    report = kernels().normalise(options, blocks, x, partial)
    return report, np.allclose(x, wanted, rtol=1e-6, atol=0)


def transpose(options, padded=True, rows=70, columns=50):
    x, y = drawn(rows, columns), np.full((columns, rows), np.nan, np.float32)
    report = kernels().transpose(options, padded, x, y)
    return report, np.array_equal(y, x.T)


def reverse(options, warps=2):
    x, y = drawn(32 * warps), np.full(32 * warps, np.nan, np.float32)
    report = kernels().reverse(options, x, y)
    return report, np.array_equal(y, x.reshape(warps, 32)[:, ::-1].ravel())


def histogram(options, n=300):
    x = np.random.default_rng(3).integers(1, 15, n).astype(np.int32)
    counts, total = np.zeros(16, np.int32), np.zeros(1)
    least, greatest, lock = np.array([[99], [-99], [0]], np.int32)
    report = kernels().histogram(options, x, counts, total, least, greatest, lock)
    right = np.array_equal(counts, np.bincount(x, minlength=16)) and total[0] == x.sum()
    return report, right and (least, greatest, lock) == (x.min(), x.max(), 2)


KERNELS = [reduce, normalise, transpose, reverse, histogram]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("schedule, seed", SCHEDULES + [("random", seed) for seed in range(1, 7)])
def test_no_false_alarm(kernel, schedule, seed):
    options = simt.Options(
        schedule, seed, resident=1 + seed % 4, weak_memory=True, block_races=True, count=True
    )
    _, right = kernel(options)
    assert right


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_every_removed_site_is_noticed(kernel, schedule, seed):
    sites = kernel(simt.Options())[0].removable()
    assert sites
    for site in sites:
        options = simt.Options(schedule, seed, weak_memory=True, removed=frozenset({site}))
        try:
            _, right = kernel(options)
        except simt.Error as error:
            # read_only: another array may begin where one ends.
            assert error.kind in ("race", "out_of_bounds", "read_only"), error
        else:
            assert not right, f"{site} is removed and nothing has changed"


FAULTS = {
    "load_beyond": "out_of_bounds",
    "load_before": "out_of_bounds",
    "load_across": "misaligned",
    "shared_beyond": "out_of_bounds",
    "shared_before": "out_of_bounds",
    "shared_across": "misaligned",
    "write_after_write": "race",
    "read_after_write": "race",
    "write_after_read": "race",
    "shuffle_is_no_fence": "race",
    "atomic_and_plain": "race",
    "other_barrier": "divergent",
    "other_collective": "divergent",
    "lane_ends_first": "divergent",
    "lane_ends_last": "divergent",
    "half_at_the_barrier": "dead_lock",
    "half_a_mask": "partial_mask",
    "odd_width": "bad_width",
    "grid_sync_alone": "not_cooperative",
    "no_end": "run_away",
}


def fault(name, options, blocks=1, writable=True):
    x = np.zeros(64, np.float32)
    with pytest.raises(simt.Error) as raised:
        kernels().fault(options, name, blocks, writable, x)
    return raised.value


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_every_fault_is_named(name, schedule, seed):
    error = fault(name, simt.Options(schedule, seed, step_limit=1000))
    assert error.kind == FAULTS[name], error
    assert error.kernel == name
    assert error.where.startswith("tests/simt/kernels/faults.cuh:")
    assert error.block == "(0, 0, 0)"


def test_what_may_only_be_read_is_not_written():
    error = fault("blocks_disagree", simt.Options(), writable=False)
    assert error.kind == "read_only"


def test_blocks_that_store_different_values_are_an_error_on_demand():
    kernels().fault(simt.Options(), "blocks_disagree", 2, True, np.zeros(64, np.float32))
    error = fault("blocks_disagree", simt.Options(block_races=True), blocks=2)
    assert error.kind == "race"


def test_a_race_and_a_dead_lock_say_who_and_where():
    text = str(fault("write_after_read", simt.Options()))
    assert "thread (63, 0, 0)" in text and "reads byte 62" in text and "`dynamic_shared`" in text
    assert "was written by thread 31 at tests/simt/kernels/faults.cuh:" in text
    text = str(fault("half_at_the_barrier", simt.Options()))
    assert "32 at barrier tests/simt/" in text and "32 at syncwarp tests/simt/" in text


def test_a_tensor_may_begin_anywhere_in_its_storage():
    x, y = simt.placed(drawn(256), offset=4), np.zeros(256, np.float32)
    kernels().copy(simt.Options(), 1, x, 0, 1, y)
    np.testing.assert_array_equal(x, y)
    with pytest.raises(simt.Error, match="whose address is 4 above a multiple of 16") as raised:
        kernels().copy(simt.Options(), 4, x, 0, 4, y)
    assert raised.value.kind == "misaligned"


def test_memory_is_allowed_once():
    x = drawn(256)
    with pytest.raises(ValueError, match="overlaps"):
        kernels().copy(simt.Options(), 1, x, 0, 1, x)


@pytest.mark.parametrize("options", [{"schedule": "fair"}, {"resident": 0}, {"step_limit": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=str(*options.values())):
        reverse(simt.Options(**options))


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, offset, stride, requests, sectors",
    [
        (1, 0, 1, 8, 4),  # whole sectors
        (4, 0, 4, 2, 16),  # whole sectors, a quarter of the requests
        (1, 1, 1, 8, 5),  # a word too late: one sector more
        (1, 0, 2, 8, 8),  # every other word
        (1, 0, 8, 8, 32),  # a sector for each lane
        (1, 0, 0, 8, 1),  # the same word for all
    ],
)
def test_sectors_of_known_patterns(n, offset, stride, requests, sectors):
    x, y = simt.placed(np.zeros(2048, np.float32)), np.zeros(256, np.float32)
    report = kernels().copy(simt.Options(count=True), n, x, offset, stride, y)
    (load,) = report.of("load")
    assert (load.requests, load.sectors) == (requests, requests * sectors)
    assert report.bytes("load") == report.bytes("store") == y.nbytes


def test_a_block_that_is_not_full_makes_its_last_request_with_fewer_lanes():
    report = kernels().copy(
        simt.Options(count=True), 1, np.zeros(40, np.float32), 0, 1, np.zeros(40, np.float32)
    )
    assert (report.total("calls", "load"), report.total("requests", "load")) == (40, 2)


@pytest.mark.parametrize(
    "n, stride, wavefronts, conflicts",
    [
        (1, 1, 1, 0),
        (1, 2, 2, 1),
        (1, 32, 32, 31),
        (1, 33, 1, 0),
        (2, 1, 2, 0),  # half warps
        (2, 2, 4, 2),
        (4, 1, 4, 0),  # quarter warps
        (4, 2, 8, 4),
    ],
)
def test_bank_conflicts_of_known_strides(n, stride, wavefronts, conflicts):
    out = np.zeros(32, np.float32)
    (load,) = kernels().stride(simt.Options(count=True), n, stride, out).of("shared_load")
    assert (load.requests, load.wavefronts, load.conflicts) == (1, wavefronts, conflicts)


def test_padding_frees_a_transposed_copy_of_bank_conflicts():
    conflicts = {
        padded: transpose(simt.Options(count=True), padded, 64, 64)[0].total(
            "conflicts", "shared_load"
        )
        for padded in (False, True)
    }
    assert conflicts == {False: 4 * 32 * 31, True: 0}


def test_barriers_and_launches_are_counted():
    report, _ = reduce(simt.Options(), n=1500, blocks=6)
    assert [launch.kernel for launch in report.launches] == ["reduce_kernel"]
    assert report.total("requests", "barrier") == 6 + 6 + 1  # two in each block, one in the last
    assert report.total("calls", "atomic") == 6


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31])
def test_shuffles(width, argument):
    values = np.arange(100, 132)
    out = np.zeros((4, 32), np.int64)
    kernels().shuffle(simt.Options(), values, argument, width, out)
    lane = np.arange(32)
    first = lane // width * width
    for row, source in enumerate(
        [first + argument % width, lane ^ argument, lane + argument]  # as PTX says: shfl.idx, bfly
    ):
        source = np.where(source < first + width, source, lane)
        np.testing.assert_array_equal(out[row], values[source])


def test_votes():
    out = np.zeros((4, 32), np.int64)
    for values in (np.zeros(32, np.int64), np.ones(32, np.int64), np.arange(32)):
        kernels().shuffle(simt.Options(), values, 0, 32, out)
        odd = values % 2
        ballot = int((odd << np.arange(32)).sum())
        assert (out[3] == ballot * 4 + odd.any() * 2 + odd.all()).all()


# --- numbers --------------------------------------------------------------------------------------


def test_every_float16_and_bfloat16_is_read_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(
        kernels().float16_to_float(bits), bits.view(np.float16).astype(np.float32)
    )
    wanted = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(kernels().bfloat16_to_float(bits), wanted)


def halves_of(x):
    """numpy's and torch's conversions of x, with a GPU's NaN."""
    with np.errstate(over="ignore"):
        float16 = x.astype(np.float16).view(np.uint16)
    bfloat16 = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return [np.where(np.isnan(x), 0x7FFF, half) for half in (float16, bfloat16)]


def check_rounding(x):
    float16, bfloat16 = halves_of(x)
    np.testing.assert_array_equal(kernels().float16_from_float(x), float16)
    np.testing.assert_array_equal(kernels().bfloat16_from_float(x), bfloat16)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_any_float_is_rounded_as_by_numpy_and_torch(bits):
    check_rounding(np.array(bits, np.uint32).view(np.float32))


def test_ties_and_their_neighbours_are_rounded_as_by_numpy_and_torch():
    half = np.arange(1 << 16, dtype=np.uint16)
    for below in (half.view(np.float16).astype(np.float32), half.astype(np.uint32) << 16):
        bits = below.view(np.uint32)
        for beyond in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001):
            check_rounding((bits + np.uint32(beyond)).view(np.float32))


# --- the build ------------------------------------------------------------------------------------


def test_without_a_compiler_the_error_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(simt.NoCompiler, match="no-such-compiler"):
        simt.load("executor_kernels", ["tests/simt/kernels/bindings.cpp"])


def test_nvcc_compiles_the_kernels(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    source = tmp_path / "kernels.cu"
    headers = sorted((ROOT / "tests/simt/kernels").glob("*.cuh"))
    source.write_text("".join(f'#include "{header}"\n' for header in headers))
    flags = ["-std=c++20", "-arch=sm_80", "-Icsrc", "-Itests"]
    output = tmp_path / "kernels.o"
    subprocess.run(["nvcc", *flags, "-c", source, "-o", output], cwd=ROOT, check=True)
