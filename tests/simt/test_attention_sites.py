"""Attention's CUDA kernels: every barrier and bound is needed, and what is moved."""

import itertools
import re

import pytest

from tests import simt
from tests.simt.attention_cases import BF16, F16, F32, PRECISION, SCHEDULES, both, inputs

from .build import ROOT
from .kernels.attention import AttentionDevice
from .test_kernels import bits, same

pytestmark = pytest.mark.usefixtures("attention_compiler")

CASES = {
    "bfloat16, 40 of 64 columns": {
        **{"heads": 2, "kv_heads": 1, "head_dim": 40, "value_dim": 24, "mask": "shown"},
        **{"padding": "some", "dropout_p": 0.3, "return_unrounded": True},
    },
    "float16, 128 columns, causal": {
        **{"dtype": F16, "head_dim": 128, "value_dim": 120, "queries": 130, "keys": 130},
        **{"is_causal": True, "mask": "added, operands' dtype", "softcap": 2.0},
    },
    "float32, 64 columns": {
        **{"dtype": F32, "head_dim": 60, "value_dim": 64, "dropout_p": 0.2, "padding": "some"},
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_result_is_the_same_on_every_schedule(case, seed):
    """The seed also draws the order of the sums in an mma, which no GPU changes between runs."""
    arguments = inputs(**CASES[case])
    results = [
        bits(both(AttentionDevice(schedule=s, seed=seed, weak_memory=s != "random"), arguments))
        for s in SCHEDULES
    ]
    assert all(same(result, results[0]) for result in results[1:])


class Both:
    """Forward and backward with the reports of each."""

    def __init__(self, **options):
        self.forward, self.backward = AttentionDevice(**options), AttentionDevice(**options)

    def attention(self, *arguments):
        return self.forward.attention(*arguments)

    def attention_backward(self, *arguments):
        return self.backward.attention_backward(*arguments)

    def removable(self):
        return {*self.forward.report.removable(), *self.backward.report.removable()}


@pytest.fixture(scope="module")
def sites():
    """Where each barrier, wait and bound is, and the cases that meet it."""
    found = {}
    for case in CASES:
        device = Both()
        both(device, inputs(**CASES[case]))
        for site in device.removable():
            found.setdefault(site, []).append(case)
    return found


def caught(site, cases, expected):
    for case, (seed, schedule) in itertools.product(cases, enumerate(SCHEDULES)):
        options = {"schedule": schedule, "seed": seed, "removed": frozenset([site])}
        try:
            found = bits(both(Both(**options), inputs(**CASES[case])))
        except simt.Error:
            return True
        if not same(found, expected(case, seed)):
            return True
    return False


def test_every_barrier_wait_and_bound_is_needed(sites):
    """The kernels with one barrier, wait or bound taken away: each is noticed."""
    known = {}

    def expected(case, seed):
        if (case, seed) not in known:
            known[case, seed] = bits(both(Both(seed=seed), inputs(**CASES[case])))
        return known[case, seed]

    assert [site for site, cases in sites.items() if not caught(site, cases, expected)] == []


def test_every_barrier_wait_and_bound_is_met(sites):
    text = re.compile(r"\b(within|__syncthreads|__syncwarp|wait_async(<\d>)?)\(")
    met = {site.rsplit(":", 1)[0] for site in sites}
    for path in sorted((ROOT / "csrc/cuda").glob("attention*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if text.search(line.split("//")[0]):
                assert f"{path.relative_to(ROOT)}:{number}" in met


def counted(**problem):
    device = Both(count=True)
    both(device, inputs(**problem))
    return device.forward.report, device.backward.report


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_shared_memory_is_read_without_bank_conflicts(dtype, width):
    reports = counted(dtype=dtype, head_dim=width, value_dim=width, is_causal=True)
    for report in reports:
        if dtype != F32:
            assert report.total("calls", "ldmatrix") > 0
            assert report.total("conflicts", "ldmatrix", "shared_store") == 0
        assert report.total("conflicts", "shared_load") == 0


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [128, 256])
def test_memory_is_read_and_written_in_proportion_to_the_length(dtype, length):
    """Of what is read and written each sector counts once: nothing of T x S is among it."""
    options = {"dtype": dtype, "queries": length, "keys": length, "return_stats": False}
    forward, backward = counted(heads=2, kv_heads=2, **options)
    size = 2 * length * 64 * (2 if dtype == BF16 else 4)  # bytes of a tensor
    rows = 2 * length * 4  # of a number for each row
    (launch,) = forward.launches
    assert (launch.loaded_sectors * 32, launch.stored_sectors * 32) == (3 * size, size + rows)
    moved = [(x.kernel, 32 * x.loaded_sectors, 32 * x.stored_sectors) for x in backward.launches]
    assert moved == [
        ("attention_delta_kernel", 2 * size + rows, size + 2 * rows),
        ("attention_grad_query_kernel", 4 * size + 2 * rows, size),
        ("attention_grad_key_kernel", 4 * size + 2 * rows, 2 * size),
    ]
    for report in (forward, backward):
        for site in report.of("copy_async", "load", "store"):
            if site.bytes == 16:
                assert site.sectors == site.calls * 16 / 32, site


def test_tiles_without_a_visible_key_are_left_out():
    def products(**problem):
        return [r.total("requests", "mma") for r in counted(queries=256, keys=256, **problem)]

    whole = products()
    assert whole == [2 * 256 * 256 * 64 // 2048, 7 * 256 * 256 * 64 // 2048]
    # Of 2 x 8 tiles of 128 x 32 there are 12 at or below the diagonal, of 4 x 4 of 64 x 64 10.
    assert products(is_causal=True) == [whole[0] * 12 // 16, whole[1] * 10 // 16]
    assert products(padding="of the first tiles") == [n * 3 // 4 for n in whole]
