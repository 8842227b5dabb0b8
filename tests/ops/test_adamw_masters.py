"""adamw_ with masters, against a step without masters of float32 parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from tests.native import assert_same_from_every_instruction_set, needs_kernel
from tests.ops.adamw_cases import (
    LAYOUT,
    OPTIONS,
    PACKED,
    drawn_options,
    flat,
    laid_out,
    lists,
    packed,
    scalar,
    shapes,
    verdict_,
)
from tests.simt.kernels.devices import DEVICES
from tests.tensors import F64, assert_close, assert_same_bits, bits

NARROW = [torch.bfloat16, torch.float16]
CUDA = [pytest.param(d.values[0].adamw_, id=f"adamw_ {d.id}") for d in DEVICES]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -7e4, 7e4, 65504.0, 65520.0, 1.00390625]


def with_masters(shapes, dtypes, *, layouts=None, seed=0, amsgrad=False, written=0.0, grads=None):
    """The op's arguments with masters. A part ``written`` of the parameters is not the master's."""
    tensors = packed(lists(shapes, dtypes, amsgrad, layouts, seed, grads))
    generator = torch.Generator().manual_seed(seed)
    size = ops.packed_offsets(p.numel() for p in tensors["params"])[-1]
    tensors["master_param"] = torch.randn(size, generator=generator)
    few = torch.arange(size) % 17 < len(SPECIAL)
    if written:
        values = torch.tensor(SPECIAL)[torch.arange(size) % 17 % len(SPECIAL)]
        tensors["master_param"] = torch.where(few, values, tensors["master_param"])
    for p, master in zip(tensors["params"], masters_of(tensors), strict=True):
        by_others = torch.rand(p.shape, generator=generator) < written
        p.copy_(torch.where(by_others, p, master.to(p.dtype)))
    return tensors


def masters_of(tensors):
    params = tensors["params"]
    offsets = ops.packed_offsets(p.numel() for p in params)
    whole = [tensors["master_param"]] * len(params)
    return list(map(ops.packed_view, whole, params, offsets))


def everything(tensors):
    return [*flat(tensors), tensors["master_param"]]


def gaps(tensors):
    """The elements of packed tensors between the parameters' own."""
    params, keep = tensors["params"], torch.ones_like(tensors["master_param"], dtype=torch.bool)
    for p, offset in zip(params, ops.packed_offsets(p.numel() for p in params), strict=False):
        keep[offset : offset + p.numel()] = False
    return [tensors[name][keep] for name in ("exp_avg", "exp_avg_sq", "master_param")]


SHAPES = shapes([(1,), (17,), (255,), (257,), (8193,), (3, 5503)], most=4)


@settings(max_examples=80, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", PACKED)
def test_masters_step_as_float32_parameters(function, data):
    check(function, data)


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", CUDA)
def test_masters_of_the_cuda_kernel_step_as_float32_parameters(function, data):
    check(function, data)


def check(function, data):
    drawn = data.draw(SHAPES)
    n = len(drawn)
    dtypes = data.draw(st.lists(st.sampled_from(NARROW), min_size=n, max_size=n))
    grads = [d if data.draw(st.booleans()) else torch.float32 for d in dtypes]
    options = drawn_options(data)
    layouts = data.draw(st.lists(LAYOUT, min_size=5 * n, max_size=5 * n))
    seed = data.draw(st.integers(0, 2**31))
    written = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    tensors = with_masters(
        drawn, dtypes, layouts=layouts, seed=seed, amsgrad=options["amsgrad"], written=written,
        grads=grads,
    )  # fmt: skip
    wide = {name: t.clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    wide["params"] = [
        ops.current_master(p, master)
        for p, master in zip(tensors["params"], masters_of(tensors), strict=True)
    ]
    # Row-major masters of a transposed parameter would have another place in the pack.
    for p, given_ in zip(wide["params"], tensors["params"], strict=True):
        p.set_(torch.empty_strided(p.shape, ops.packed_strides(given_)).copy_(p))
    wide["grads"] = [g.float() for g in tensors["grads"]]
    del wide["master_param"]
    before, between = bits(tensors["grads"]), bits(gaps(tensors))
    rest = {"grad_coef": scalar(0.37), "verdict": verdict_(Verdict.CLIP), **(OPTIONS | options)}
    function(**tensors, **rest)
    function(**wide, **rest)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state_steps"):
        assert_same_numbers([tensors[name]], [wide[name]])
    assert_same_numbers(masters_of(tensors), wide["params"])
    rounded = [m.to(p.dtype) for m, p in zip(masters_of(tensors), tensors["params"], strict=True)]
    assert_same_numbers(tensors["params"], rounded)
    assert_same_bits(bits(tensors["grads"]), before)
    assert_same_bits(bits(gaps(tensors)), between)


def assert_same_numbers(these, those):
    """Bit for bit, but that a NaN equals every NaN."""
    for this, that in zip(these, those, strict=True):
        assert this.dtype == that.dtype and torch.equal(this.isnan(), that.isnan())
        assert_same_bits(bits([this.nan_to_num(0.5)]), bits([that.nan_to_num(0.5)]))


@pytest.mark.parametrize("function", PACKED + CUDA)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_parameter_written_by_others_replaces_its_master(function, dtype):
    tensors = with_masters([(4,)], [dtype])
    p, (master,) = tensors["params"][0], masters_of(tensors)
    master.copy_(torch.tensor([1.0001, 1.0001, math.nan, 1.0]))
    p.copy_(torch.tensor([1.0, 2.0, 3.0, math.nan]))
    tensors["grads"][0].zero_()
    tensors["exp_avg"].zero_()
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS | {"weight_decay": 0})
    expected = torch.tensor([1.0001, 2.0, 3.0, math.nan])
    assert torch.equal(master[:3], expected[:3]) and master[3].isnan()
    assert torch.equal(p[:3], torch.tensor([1.0, 2.0, 3.0], dtype=dtype)) and p[3].isnan()


@pytest.mark.parametrize("function", PACKED + CUDA)
def test_a_master_beyond_float16_stays_finite(function):
    tensors = with_masters([(1,)], [torch.float16])
    p, (master,) = tensors["params"][0], masters_of(tensors)
    p.fill_(math.inf)
    master.fill_(65530.0)
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS | {"lr": 0.5})
    assert 60000 < master.item() < 65504 and p.isfinite()


@pytest.mark.parametrize("function", PACKED + CUDA)
@pytest.mark.parametrize("verdict", [2, 3, 77, -1])
def test_a_skip_writes_no_master(function, verdict):
    tensors = with_masters([(5,), (300, 7), (20_000,), ()], NARROW * 2, amsgrad=True, written=0.5)
    before = bits(everything(tensors))
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(math.nan), verdict=verdict_(verdict), **options)
    assert_same_bits(bits(everything(tensors)), before)


@needs_kernel
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_kernel_rounds_masters_as_the_reference_does(amsgrad):
    """Moments bit for bit; masters too, but that torch's sqrt and pow may miss the last bit."""
    results = []
    for function in PACKED:
        shapes = [(1000,), (33, 31), (7,), (20_000,)]
        tensors = with_masters(shapes, NARROW * 2, amsgrad=amsgrad)
        for verdict in (Verdict.APPLY, Verdict.SKIP_OUTLIER, Verdict.CLIP):
            options = OPTIONS | {"amsgrad": amsgrad}
            function(**tensors, grad_coef=scalar(0.3), verdict=verdict_(verdict), **options)
        results.append(tensors)
    here, there = results
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state_steps"):
        assert_same_bits(bits([here[name]]), bits([there[name]]))
    assert_close(masters_of(here), masters_of(there), ulps=2)
    assert_close(here["params"], there["params"], ulps=1)


@needs_kernel
def test_masters_do_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            shapes = [(100_001,), (7,), (300, 65), (70_000,)]
            tensors = with_masters(shapes, NARROW * 2, written=0.1)
            ops.adamw_(**tensors, grad_coef=scalar(0.3), verdict=verdict_(1), **OPTIONS)
            results.append(bits(everything(tensors)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


_DUMP = """
import hashlib, torch
from fastguard import ops
torch.manual_seed(1)
sizes = (1, 7, 8, 15, 16, 17, 63, 255, 257, 4097)
digest = hashlib.sha256()
for dtype in (torch.bfloat16, torch.float16):
    for amsgrad, coupled in ((False, False), (True, False), (False, True), (True, True)):
        grads = [torch.randn(n).to(dtype) for n in sizes]
        offsets = ops.packed_offsets(sizes)
        m, v, largest, master = (torch.rand(offsets[-1]) for _ in range(4))
        params = [master[o : o + n].to(dtype) for n, o in zip(sizes, offsets)]
        for p in params:
            p[::3] = 2.5
        steps = torch.full((len(sizes),), 2.0)
        ops.adamw_(params, grads, m, v, largest if amsgrad else largest[:0], steps,
                   torch.tensor(0.37, dtype=torch.float64), torch.tensor(0),
                   1e-2, 0.9, 0.98, 0.1, 1e-8, not coupled, amsgrad, False, master)
        for t in (*params, m, v, largest, master):
            digest.update(t.view(torch.uint8).numpy().tobytes())
print(ops.cpu_info()["chosen"], digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_steps_masters_to_the_same_bits():
    assert_same_from_every_instruction_set(_DUMP)


def wrong_masters():
    """(the message, what makes the arguments wrong)."""

    def change(name, function):
        return lambda kwargs: kwargs.__setitem__(name, function(kwargs[name]))

    def last(value):
        return lambda kwargs: (
            kwargs["params"].__setitem__(-1, value),
            kwargs["grads"].__setitem__(-1, torch.zeros_like(value)),
        )

    packed_size = r"contiguous .* tensor of shape \(10016,\), the last of packed_offsets"
    yield (
        rf"master_param must be a {packed_size}.*\(10015,\)",
        change("master_param", lambda t: t[1:]),
    )
    yield (
        r"master_param must be .*got .*(float64|Double)",
        change("master_param", torch.Tensor.double),
    )
    yield (
        r"master_param must be .*not contig",
        change("master_param", lambda t: t.repeat_interleave(2)[::2]),
    )
    yield r"params\[1\] has dtype .*; with master_param all must be", last(torch.zeros(3))
    yield r"params\[1\] has dtype .*(Double|float64)", last(torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("message, spoil", list(wrong_masters()))
def test_nothing_is_written_where_masters_are_wrong(function, message, spoil):
    tensors = with_masters([(10_000,), (3,)], [torch.bfloat16] * 2)
    spoil(tensors)
    before = bits(everything(tensors))
    with pytest.raises(RuntimeError, match=f"adamw_: ({message})"):
        function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS)
    with pytest.raises(RuntimeError, match=f"adamw_: ({message})"):
        ops.check_adamw(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS)
    assert_same_bits(bits(everything(tensors)), before)


@pytest.mark.parametrize("function", PACKED)
def test_the_version_of_the_masters_is_bumped(function):
    tensors = with_masters([(5,)], [torch.bfloat16])
    before = tensors["master_param"]._version
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS)
    assert tensors["master_param"]._version > before


@needs_kernel
@pytest.mark.parametrize("verdict", [0, 2])
def test_opcheck_adamw_with_masters(verdict):
    tensors = with_masters([(3,), (0,), (2, 3), ()], NARROW * 2, layouts=["transposed"] * 20)
    master = tensors.pop("master_param")
    options = (1e-2, 0.9, 0.98, 0.1, 1e-8, True, False, False)
    torch.library.opcheck(
        torch.ops.fastguard.adamw_.default,
        (*tensors.values(), scalar(0.5), verdict_(verdict), *options, master),
    )


def test_current_master_of_any_layout():
    master = laid_out(torch.randn(4, 6), "transposed")
    for way in ("contiguous", "transposed", "gaps"):
        p = laid_out(master.bfloat16(), way)
        assert torch.equal(ops.current_master(p, master), master)
        p[1, 2], p[0, 0] = 7.0, -0.0
        found = ops.current_master(p, master)
        assert_same_bits(
            bits([found[0, 0], found[1, 2]]), bits([torch.tensor(-0.0), torch.tensor(7.0)])
        )
        assert (found == master).sum() == 22
