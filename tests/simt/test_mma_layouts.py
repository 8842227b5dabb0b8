"""The layouts of mma and ldmatrix on the executor, as the tables of PTX's ISA give them."""

import numpy as np
import pytest

from tests import simt
from tests.simt.tensor_core_cases import ROUNDING, SCHEDULES, decoded, encoded, kernels

LANE = np.arange(32)

GROUP, IN_GROUP = LANE // 4, LANE % 4  # PTX: groupID, threadID_in_group


def places_of_a(dtype):
    """Row and column of each element of each lane's registers, in their order."""
    if dtype == "tf32":
        rows = [GROUP + (8 if i in (1, 3) else 0) for i in range(4)]
        columns = [IN_GROUP + (4 if i in (2, 3) else 0) for i in range(4)]
    else:
        rows = [GROUP + (0 if i < 2 or 4 <= i < 6 else 8) for i in range(8)]
        columns = [IN_GROUP * 2 + (i & 1) + (0 if i < 4 else 8) for i in range(8)]
    return np.stack(rows, 1), np.stack(columns, 1)


def places_of_b(dtype):
    if dtype == "tf32":
        rows = [IN_GROUP, IN_GROUP + 4]
    else:
        rows = [IN_GROUP * 2 + (i & 1) + (0 if i < 2 else 8) for i in range(4)]
    return np.stack(rows, 1), np.stack([GROUP] * len(rows), 1)


def places_of_d():
    rows = [GROUP + (0 if i < 2 else 8) for i in range(4)]
    columns = [IN_GROUP * 2 + (i & 1) for i in range(4)]
    return np.stack(rows, 1), np.stack(columns, 1)


def mma(dtype, a, b, d, options):
    """d + a b by one instruction."""
    registers = [
        np.ascontiguousarray(encoded(matrix, dtype)[places]).view(np.uint32)
        for matrix, places in ((a, places_of_a(dtype)), (b, places_of_b(dtype)))
    ]
    sums = np.ascontiguousarray(np.asarray(d, np.float32)[places_of_d()])
    getattr(kernels(), f"mma_{dtype}")(options, *registers, sums)
    result = np.full((16, 8), np.nan, np.float32)
    result[places_of_d()] = sums
    return result


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_mma_has_the_layout_of_ptx(dtype, schedule, seed):
    draw = np.random.default_rng(seed).integers
    depth = 8 if dtype == "tf32" else 16
    a, b, d = (draw(-99, 99, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    result = mma(dtype, a, b, d, simt.Options(schedule, seed))
    np.testing.assert_array_equal(result, d + a @ b)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_nan_and_inf_pass_through_an_mma(dtype):
    depth = 8 if dtype == "tf32" else 16
    a, b, d = np.zeros((16, depth)), np.ones((depth, 8)), np.zeros((16, 8))
    a[3, 5], a[9, 1], b[2, 4] = np.nan, np.inf, -np.inf
    result = mma(dtype, a, b, d, simt.Options())
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(result, a @ b)


def test_tf32_drops_the_low_bits():
    a, b = np.zeros((16, 8), np.float32), np.eye(8, dtype=np.float32)
    a[0] = np.array([0x3F801FFF, 0xBF803FFF], np.uint32).view(np.float32).repeat(4)
    result = mma("tf32", a, b, np.zeros((16, 8)), simt.Options())
    np.testing.assert_array_equal(result[0], np.repeat(np.float32([1, -(1 + 2**-10)]), 4))


def test_the_seed_draws_the_order_of_the_sum():
    draw = np.random.default_rng(3).standard_normal
    a, b, d = (encoded(draw(shape), "float16") for shape in ((16, 16), (16, 8), (16, 8)))
    a, b, d = (decoded(x, "float16") for x in (a, b, d))
    results = [mma("float16", a, b, d, simt.Options(seed=seed)) for seed in (0, 1, 2, 1)]
    for result in results:
        np.testing.assert_allclose(result, d + a @ b, rtol=0, atol=1e-5)
    assert len({result.tobytes() for result in results}) == 3
    np.testing.assert_array_equal(results[1], results[3])  # one order for all that one seed runs


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 7])
def test_ldmatrix_has_the_layout_of_ptx(count, transposed, stride):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    registers = np.zeros((32, count), np.uint32)
    run = kernels().ldmatrix_trans if transposed else kernels().ldmatrix
    run(simt.Options("random", 3), count, simt.placed(rows), stride, registers)
    matrices = rows[LANE * stride % 32].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    for i in range(count):
        pairs = matrices[i][GROUP[:, None], IN_GROUP[:, None] * 2 + [0, 1]]
        np.testing.assert_array_equal(registers[:, i].copy().view(np.uint16), pairs.ravel())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("stride, conflicts", [(1, 0), (3, 0), (2, 1), (8, 3), (32, 0)])
def test_bank_conflicts_of_ldmatrix(count, stride, conflicts):
    """8 rows of 16 bytes at a time; the same row for all lanes is read once."""
    report = kernels().ldmatrix(
        simt.Options(count=True),
        count,
        simt.placed(np.zeros((32, 8), np.uint16)),
        stride,
        np.zeros((32, count), np.uint32),
    )
    (load,) = report.of("ldmatrix")
    assert (load.requests, load.calls, report.bytes("ldmatrix")) == (1, 8 * count, 128 * count)
    assert (load.wavefronts, load.conflicts) == (count * (1 + conflicts), count * conflicts)
