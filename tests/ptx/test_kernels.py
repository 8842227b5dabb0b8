"""The PTX of the kernels other than attention's, beside the CPU's operators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from tests.drawn import DTYPES, gradients
from tests.ops.adamw_cases import OPTIONS, everything, lists, on_lists, scalar
from tests.ops.cases import check_grad_norm, owned
from tests.ops.decide_cases import THRESHOLDS, decide, fresh, measured
from tests.sass import PROMISES
from tests.simt import test_kernels as simt
from tests.simt.test_kernels import bits, drawn, flat, same
from tests.tensors import F64

from .device import PtxDevice
from .machine import Order

pytestmark = pytest.mark.usefixtures("programs")

ORDERS = [Order("reversed"), *(Order("mixed", seed) for seed in range(5))]

# Whose results are the CPU's to the bit. The squares of a norm are summed in another order there.
EXACT = [
    simt.run_without_tensors,
    simt.run_guard_decide,
    simt.run_decide,
    simt.run_scale,
    simt.run_adamw,
    simt.run_adamw_of_the_first_step,
    simt.run_adamw_masters,
    simt.run_accumulate,
    simt.run_settle,
]
CLOSE = [run for run in simt.RUNS if run not in EXACT and run is not simt.run_repeatedly]


def numbers(tensors):
    """The bits, of which those of a NaN do not count."""
    return bits([t if t.is_complex() else torch.nan_to_num(t, math.pi) for t in tensors])


def test_every_kernel_of_the_library_can_be_read(programs):
    assert programs.names == sorted(PROMISES)
    for name in programs.names:
        assert programs(name).steps


@pytest.mark.parametrize("run", EXACT)
def test_the_bits_are_those_of_the_cpu(run):
    assert same(numbers(flat(run(PtxDevice()))), numbers(flat(run(ops))))


@pytest.mark.parametrize("run", CLOSE)
def test_the_numbers_are_those_of_the_cpu(run):
    rel = 1e-14 if run is simt.run_adamw_float64 else 1e-6
    for found, wanted in zip(flat(run(PtxDevice())), flat(run(ops)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rel, atol=rel * 1e-3, equal_nan=True)


@pytest.mark.parametrize("run", simt.RUNS)
def test_the_bits_do_not_depend_on_the_number_of_blocks_or_their_order(run):
    expected = bits(run(PtxDevice(blocks=1)))
    for i, order in enumerate(ORDERS[:3]):
        assert same(bits(run(PtxDevice(blocks=(2, 5, 8)[i], order=order))), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_any_block_may_be_the_last_one(order):
    """Eight blocks take turns at the counters of the tensors and at that of the blocks."""
    grads = [*drawn(*([3] * 40)), *drawn(8192 * 9, 8192 * 5 + 1)]
    found = PtxDevice(blocks=8, order=order).grad_norm(grads)
    assert same(bits(found), bits(PtxDevice(blocks=1).grad_norm(grads)))
    check_grad_norm(found, grads, rel=1e-6)


# --- drawn cases ----------------------------------------------------------------------------------

drawn_cases = settings(max_examples=25, deadline=None)


def order(seed):
    return Order("mixed", seed) if seed else Order()


@drawn_cases
@given(gradients(), st.integers(0, 3), st.integers(1, 5))
def test_grad_norm(grads, seed, blocks):
    found = PtxDevice(blocks, order(seed)).grad_norm(grads)
    check_grad_norm(found, grads, rel=1e-6)


@drawn_cases
@given(gradients(nonfinite=False), st.floats(1e-40, 2.0), st.integers(1, 5))
def test_scale(grads, coef, blocks):
    grads = owned(grads)
    wanted = owned(grads)
    ops.scale_(wanted, scalar(coef))
    PtxDevice(blocks).scale_(grads, scalar(coef))
    assert same(numbers(grads), numbers(wanted))


layouts = st.sampled_from(["contiguous", "transposed", "gaps", "offset"])
shapes = st.sampled_from([(0,), (3, 4), (2, 0), (5,), (1,), (255,), (257,), (8193,), (3, 5003)])


@st.composite
def steps(draw):
    """Arguments of adamw_: the tensors twice, and the rest."""
    n = draw(st.integers(1, 4))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=n, max_size=n))
    grad_dtypes = [d if d == F64 or draw(st.booleans()) else torch.float32 for d in dtypes]
    options = {
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "decoupled_weight_decay": draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "lr": draw(st.sampled_from([1e-5, 1e-2])),
    }
    given = [
        draw(st.lists(shapes, min_size=n, max_size=n)),
        dtypes,
        options["amsgrad"],
        draw(st.lists(layouts, min_size=5 * n, max_size=5 * n)),
        draw(st.integers(0, 2**31)),
        grad_dtypes,
        float(draw(st.sampled_from([0, 1, 1000]))),
    ]
    verdict = draw(st.sampled_from([Verdict.APPLY, Verdict.CLIP, Verdict.SKIP_OUTLIER]))
    rest = {"grad_coef": scalar(draw(st.floats(1e-3, 2.0))), "verdict": torch.tensor(int(verdict))}
    return lists(*given), lists(*given), rest | OPTIONS | options


@drawn_cases
@given(steps(), st.integers(0, 3), st.integers(1, 5))
def test_adamw(drawn, seed, blocks):
    found, wanted, rest = drawn
    on_lists(PtxDevice(blocks, order(seed)).adamw_)(**found, **rest)
    on_lists(ops.adamw_)(**wanted, **rest)
    for a, b in zip(everything(found), everything(wanted), strict=True):
        if a.dtype == F64:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("verdict", [Verdict.APPLY, Verdict.SKIP_NONFINITE])
@pytest.mark.parametrize("shifts", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_adamw_with_masters(shifts, verdict, amsgrad):
    def run(device):
        params = drawn(9000, 5, 300, dtype=torch.bfloat16, offset=shifts[0])
        grads = drawn(9000, 5, 300, offset=shifts[1], seed=1)
        size = ops.packed_offsets(p.numel() for p in params)[-1]
        m, v, most, master = (x.abs() for x in drawn(*[size] * 4, seed=2))
        state = (m, v, most if amsgrad else most[:0], torch.ones(3))
        options = (*simt.OPTIONS, amsgrad, False, master)
        device.adamw_(params, grads, *state, scalar(0.5), torch.tensor(int(verdict)), *options)
        return params, state, master

    assert same(bits(run(PtxDevice())), bits(run(ops)))


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_guard_decide(threshold):
    """A training's decisions one after the other, with a spike and a NaN in it."""
    here, there = fresh(window=8), fresh(window=8)
    function = PtxDevice().guard_decide_
    norms = [1.0, 2.0, 0.0, 3.0, 1.5, 1e4, 2.5, math.nan, 2.0, math.inf, 1.0, 1.2]
    for step, norm in enumerate(norms):
        found = measured(norm, 0.5, 2 * norm)
        options = {"step": step, "max_norm": 1.0, "skip_norm": 10.0, "unscale": 0.5}
        mine = decide(found, here, threshold, function=function, **options)
        theirs = decide(found, there, threshold, **options)
        assert same(numbers(flat(mine, here)), numbers(flat(theirs, there)))
