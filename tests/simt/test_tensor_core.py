"""Matrix products on the executor, the functions they use, and what nvcc makes of them."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import simt
from tests.simt.tensor_core_cases import ROUNDING, SCHEDULES, decoded, encoded, kernels

from .build import ROOT


def as_multiplied(x, dtype):
    """What the tensor core sees of an element."""
    if dtype == "tf32":
        x = (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)
    return decoded(x, dtype)


PRODUCTS = [
    ("bfloat16", "rows"),  # b as rows, which ldmatrix transposes
    ("bfloat16", "columns"),
    ("float16", "rows"),
    ("float16", "columns"),
    ("tf32", "columns"),
]


def matmul(product, options, rows, columns, depth, swizzled=True, draw=None):
    """The report, a and b in float64, and c as the kernel left it."""
    dtype, layout = product
    draw = draw or np.random.default_rng(3).standard_normal
    a = simt.placed(encoded(draw((rows, depth)), dtype))
    b = encoded(draw((depth, columns)), dtype)
    c = (
        np.full((rows, columns), 0xFFFF, a.dtype)
        if a.itemsize == 2
        else np.full_like(a, np.nan, shape=(rows, columns))
    )
    stored = simt.placed(b if layout == "rows" else np.ascontiguousarray(b.T))
    run = getattr(kernels(), f"matmul_{dtype}_{layout}")
    report = run(options, swizzled, a, stored, c)
    return report, as_multiplied(a, dtype), as_multiplied(b, dtype), c


def is_right(product, a, b, c):
    dtype, _ = product
    wanted = a @ b
    bound = ROUNDING[dtype] * np.abs(wanted) + 2e-6 * (np.abs(a) @ np.abs(b))
    return bool((np.abs(decoded(c, dtype) - wanted) <= bound).all())  # NaN is not within it


# A copy takes 16 bytes: rows in memory are of a multiple of 8 elements, all else may be odd.
SHAPES = [(1, 8, 8), (17, 24, 136), (65, 56, 72), (70, 136, 200)]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule, seed", [("round_robin", 0), ("greedy", 5), ("random", 7)])
def test_a_matrix_product_is_right(product, shape, schedule, seed):
    rows, columns, depth = shape
    columns -= product[1] == "columns"
    options = simt.Options(schedule, seed, weak_memory=True, block_races=True, count=True)
    _, a, b, c = matmul(product, options, rows, columns, depth)
    assert is_right(product, a, b, c)


@pytest.mark.parametrize("schedule, seed", SCHEDULES + [("random", seed) for seed in range(1, 7)])
def test_no_false_alarm(schedule, seed):
    options = simt.Options(schedule, seed, resident=1 + seed % 4, weak_memory=True)
    _, a, b, c = matmul(PRODUCTS[0], options, 70, 72, 200)
    assert is_right(PRODUCTS[0], a, b, c)


@pytest.mark.parametrize("product", PRODUCTS[1:4])
def test_sums_are_rounded_to_nearest_even(product):
    """Sums of small whole numbers are exact in whatever order, up to the rounding at the end."""
    draw = np.random.default_rng(3).integers
    _, a, b, c = matmul(
        product, simt.Options(seed=5), 65, 56, 136, draw=lambda shape: draw(-40, 40, shape)
    )
    exact = a @ b
    wanted = encoded(exact, product[0])
    assert (decoded(wanted, product[0]) != exact).any()
    np.testing.assert_array_equal(c, wanted)


@pytest.mark.parametrize("product", [PRODUCTS[0], PRODUCTS[4]])
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_every_removed_site_is_noticed(product, schedule, seed):
    shape = (17, 24, 200)
    report = matmul(product, simt.Options(), *shape)[0]
    assert {site.kind for site in report.of(*simt.REMOVABLE)} == {"barrier", "wait", "within"}
    for site in report.removable():
        options = simt.Options(schedule, seed, weak_memory=True, removed=frozenset({site}))
        with pytest.raises(simt.Error) as raised:
            matmul(product, options, *shape)
        # read_only: another array may begin where one ends.
        assert raised.value.kind in ("race", "out_of_bounds", "read_only"), raised.value


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_swizzle_frees_ldmatrix_of_bank_conflicts(product):
    for swizzled, conflicts in ((True, 0), (False, 7)):  # of 8 rows, all in the same banks
        report = matmul(product, simt.Options(count=True), 64, 64, 64, swizzled)[0]
        phases = report.total("calls", "ldmatrix") // 8
        assert phases > 0
        assert report.total("conflicts", "ldmatrix") == conflicts * phases
        assert report.total("conflicts", "shared_store") == 0


def test_copies_read_what_exists_and_no_more():
    report, a, b, _ = matmul(PRODUCTS[0], simt.Options(count=True), 64, 64, 128)
    assert report.bytes("copy_async") == 2 * (a.size + b.size)
    assert report.total("requests", "copy_async") == 2 * (a.size + b.size) // (32 * 16)
    assert report.total("sectors", "copy_async") == 2 * (a.size + b.size) // 32

    report, a, b, _ = matmul(PRODUCTS[0], simt.Options(count=True), 17, 24, 136)
    assert report.bytes("copy_async") == 2 * (a.size + b.size)
    filled = sum(site.calls for site in report.of("copy_async") if site.bytes == 0)
    assert (report.total("calls", "copy_async") - filled) * 16 == report.bytes("copy_async")
    assert filled > 0


def test_products_are_counted():
    report = matmul(PRODUCTS[0], simt.Options(), 64, 64, 128)[0]
    assert report.total("requests", "mma") == 64 * 64 * 128 // (16 * 8 * 16)


def numbers(x, y, seed=0):
    x, y = np.array(x, np.float32), np.array(y, np.float32)
    found = np.zeros((4, x.size), np.float32)
    kernels().numbers(simt.Options(seed=seed), x, y, *found)
    return found  # the greater, the lesser, 2^x, 1 / x


def test_the_greater_and_the_lesser_keep_nan_and_order_zeros():
    values = np.float32([-np.inf, -1, -0.0, 0.0, 1e-40, 2, np.inf, np.nan])
    x, y = (grid.ravel() for grid in np.meshgrid(values, values))
    most, least, *_ = numbers(x, y)
    np.testing.assert_array_equal(most, np.maximum(x, y))
    np.testing.assert_array_equal(least, np.minimum(x, y))
    zeros = (x == 0) & (y == 0)
    np.testing.assert_array_equal(np.signbit(most[zeros]), (np.signbit(x) & np.signbit(y))[zeros])
    np.testing.assert_array_equal(np.signbit(least[zeros]), (np.signbit(x) | np.signbit(y))[zeros])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_powers_of_two_are_within_their_bound(seed):
    x = np.linspace(-126, 127.9, 5000, dtype=np.float32)
    power = numbers(x, x, seed)[2]
    wanted = np.exp2(x.astype(np.float64))
    assert (np.abs(power - wanted) <= 2.0**-22 * wanted).all()
    assert (seed == 0) == np.array_equal(power, numbers(x, x)[2])
    special = np.float32([-np.inf, -200, -126.5, -1e-40, 0, 1e-40, 128, np.inf, np.nan])
    power = numbers(special, special, seed)[2]
    np.testing.assert_array_equal(power, [0, 0, 0, 1, 1, 1, np.inf, np.inf, np.nan])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reciprocals_are_within_their_bound(seed):
    x = np.float32(2) ** np.linspace(-125, 125, 5000, dtype=np.float32)
    inverse = numbers(x, x, seed)[3]
    wanted = 1 / x.astype(np.float64)
    assert (np.abs(inverse - wanted) <= 2.0**-22 * wanted).all()
    assert (seed == 0) == np.array_equal(inverse, numbers(x, x)[3])
    special = np.float32([0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 3e38, np.nan])
    inverse = numbers(special, special, seed)[3]
    wanted = np.float32([np.inf, -np.inf, np.inf, -np.inf, 0, -0.0, 0, np.nan])
    np.testing.assert_array_equal(inverse, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_elements_are_packed_as_each_is_rounded(dtype):
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    x[:6] = [np.inf, -np.inf, 1e-8, -65519, 3.4e38, 0]
    packed = np.zeros(256, np.uint32)
    getattr(kernels(), f"pack_{dtype}")(simt.Options(), x, packed)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(packed.view(np.uint16), encoded(x, dtype))


MATMULS = """
#include "simt/kernels/async_faults.cuh"
#include "simt/kernels/fragments.cuh"
#include "simt/kernels/matmul.cuh"
#define MATMUL(T, b_rows)                                \\
  template __global__ void matmul_kernel<T, b_rows, true>( \\
      const T*, const T*, T*, int64_t, int64_t, int64_t)
namespace fastguard {
MATMUL(BFloat16, true);
MATMUL(Float16, false);
MATMUL(float, false);
template __global__ void pack_kernel<BFloat16>(const float*, int, uint32_t*);
template __global__ void pack_kernel<Float16>(const float*, int, uint32_t*);
}
"""

WANTED = [
    "HMMA.16816.F32.BF16",
    "HMMA.16816.F32",
    "HMMA.1688.F32.TF32",
    "LDSM.16.M88.4",
    "LDSM.16.MT88.4",
    "LDGSTS.E.BYPASS.128",
    "FMNMX.NAN",
    "MUFU.EX2",
    "MUFU.RCP",
]


def cuobjdump():
    """A toolkit's or a package's, with the nvdisasm that it calls, as (program, environment)."""
    spec = importlib.util.find_spec("nvidia")
    packages = [
        str(folder)
        for root in (spec.submodule_search_locations if spec else [])
        for folder in sorted(Path(root).glob("*/bin"))
    ]
    path = os.pathsep.join([os.environ["PATH"], *packages])
    tools = [shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")]
    if None in tools:
        pytest.fail(
            "nvcc is here and cuobjdump or nvdisasm is not: "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return tools[0], {**os.environ, "PATH": path}


def test_nvcc_makes_the_wanted_instructions(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    program, environment = cuobjdump()
    source, output = tmp_path / "matmul.cu", tmp_path / "matmul.o"
    source.write_text(MATMULS)
    architectures = ["sm_80", "sm_90"]
    flags = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures]
    command = ["nvcc", "-std=c++20", *flags, "-Icsrc", "-Itests", "-c", source, "-o", output]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in architectures:
        done = subprocess.run(
            [program, "-sass", "-arch", name, output],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = set(re.findall(r"\b[A-Z]+\.[A-Z0-9_.]+", done.stdout))
        assert not set(WANTED) - found, (name, set(WANTED) - found)
        for packed in (r"F2FP\.BF16(\.F32)?\.PACK_AB", r"F2FP(\.F16\.F32)?\.PACK_AB"):
            assert re.search(packed, done.stdout), (name, packed)
        assert not re.search(r"\b(LDL|STL)\b", done.stdout), f"{name}: registers are spilled"
