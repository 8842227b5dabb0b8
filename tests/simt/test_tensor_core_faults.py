"""Faults planted in a matrix product, each of which the executor names."""

import numpy as np
import pytest

from tests import simt
from tests.simt.tensor_core_cases import SCHEDULES, kernels

FAULTS = {
    "read_before_the_wait": "race",
    "others_read_before_the_wait": "race",
    "read_before_the_barrier": "race",
    "barrier_before_the_wait": "race",
    "wait_for_too_few": "race",
    "wait_without_a_commit": "race",
    "fill_what_is_being_filled": "race",
    "fill_what_others_read": "race",
    "change_the_source": "race",
    "end_before_the_wait": "not_awaited",
    "end_before_zeros_arrive": "not_awaited",
    "copy_from_beyond": "out_of_bounds",
    "copy_from_across": "misaligned",
    "copy_to_beyond": "out_of_bounds",
    "copy_to_across": "misaligned",
    "ldmatrix_beyond": "out_of_bounds",
    "ldmatrix_across": "misaligned",
    "ldmatrix_without_syncwarp": "race",
    "overwrite_what_ldmatrix_reads": "race",
    "half_at_the_ldmatrix": "divergent",
    "other_mma": "divergent",
    "half_a_warp_ends_before_the_mma": "divergent",
}


@pytest.mark.parametrize("weak_memory", [False, True])
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_every_fault_is_named(name, schedule, seed, weak_memory):
    x = simt.placed(np.zeros(256, np.float32))
    with pytest.raises(simt.Error) as raised:
        kernels().fault(simt.Options(schedule, seed, weak_memory=weak_memory), name, x)
    assert raised.value.kind == FAULTS[name], raised.value
    assert raised.value.kernel == name
    assert raised.value.where.startswith("tests/simt/kernels/async_faults.cuh:")


def test_a_read_too_soon_says_who_fills_it():
    x = simt.placed(np.zeros(256, np.float32))
    with pytest.raises(simt.Error, match="which is being filled by thread 62 at tests/simt/k"):
        kernels().fault(simt.Options(), "others_read_before_the_wait", x)
