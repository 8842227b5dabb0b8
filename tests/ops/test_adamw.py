"""adamw_ against its definition in float64, on every device."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from tests.drawn import DTYPES
from tests.native import assert_same_from_every_instruction_set, needs_kernel
from tests.ops.adamw_cases import (
    CUDA,
    FUNCTIONS,
    LAYOUT,
    OPTIONS,
    PACKED,
    ROLES,
    drawn_options,
    everything,
    lists,
    on_lists,
    scalar,
    shapes,
    verdict_,
)
from tests.tensors import F64, assert_close, assert_same_bits, bits


def expected(tensors, coefs, **options):
    """What one step must make of copies of the tensors, in float64."""
    o = OPTIONS | options
    result = {name: [] for name in ROLES}
    for i, step in enumerate(tensors["state_steps"]):
        t = step.item() + 1
        p, g, m, v = (tensors[name][i].double() for name in ROLES[:4])
        g = g * coefs[i] * (-1 if o["maximize"] else 1)
        decay = o["weight_decay"] * p
        if not o["decoupled_weight_decay"]:
            g, decay = g + decay, 0.0
        m = o["beta1"] * m + (1 - o["beta1"]) * g
        v = o["beta2"] * v + (1 - o["beta2"]) * g * g
        root = v
        if o["amsgrad"]:
            root = torch.maximum(v, tensors["max_exp_avg_sq"][i].double())
            result["max_exp_avg_sq"].append(root)
        m_hat, v_hat = m / (1 - o["beta1"] ** t), root / (1 - o["beta2"] ** t)
        p = p - o["lr"] * (decay + m_hat / (v_hat.sqrt() + o["eps"]))
        for name, value in zip(ROLES[:4], (p, None, m, v), strict=True):
            result[name].append(value)
        result["state_steps"].append(torch.tensor(t))
    return result


def assert_stepped(found, right, grads_before):
    assert_same_bits(bits(found["grads"]), grads_before)
    for name in ROLES[2:] + ROLES[:1]:
        assert len(found[name]) == len(right[name])
        for tensor, value in zip(found[name], right[name], strict=True):
            eps = torch.finfo(tensor.dtype).eps
            # A few roundings of the terms, which may cancel; they are of the size of 1 to 30.
            torch.testing.assert_close(tensor.double(), value.double(), rtol=4 * eps, atol=60 * eps)


SHAPES = shapes([(1,), (255,), (257,), (16385,), (3, 11003), (40000,)], most=5)


@settings(max_examples=120, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", FUNCTIONS)
def test_adamw_(function, data):
    check_adamw_(function, data)


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", CUDA)
def test_adamw_of_the_cuda_kernel(function, data):
    check_adamw_(function, data)


def check_adamw_(function, data):
    drawn = data.draw(SHAPES)
    n = len(drawn)
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=n, max_size=n))
    grad_dtypes = [d if d == F64 or data.draw(st.booleans()) else torch.float32 for d in dtypes]
    options = drawn_options(data) | {
        "beta1": data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        "beta2": data.draw(st.sampled_from([0.0, 0.98, 0.999])),
        "lr": data.draw(st.sampled_from([1e-5, 1e-2])),
    }
    options["eps"] = 1e-8 if options["beta2"] else 0.1
    tensors = lists(
        drawn,
        dtypes,
        options["amsgrad"],
        data.draw(st.lists(LAYOUT, min_size=5 * n, max_size=5 * n)),
        data.draw(st.integers(0, 2**31)),
        grad_dtypes,
        step=float(data.draw(st.sampled_from([0, 1, 1000]))),
    )
    each = data.draw(st.booleans())
    coefs = [data.draw(st.floats(0.01, 2.0)) for _ in range(n if each else 1)]
    coef = torch.tensor(coefs, dtype=F64) if each else scalar(coefs[0])
    verdict = verdict_(data.draw(st.sampled_from([Verdict.APPLY, Verdict.CLIP])))
    right = expected(tensors, coefs if each else coefs * n, **options)
    grads_before = bits(tensors["grads"])
    function(**tensors, grad_coef=coef, verdict=verdict, **(OPTIONS | options))
    assert_stepped(tensors, right, grads_before)


@needs_kernel
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_kernel_rounds_as_the_reference_does(amsgrad, maximize, decoupled):
    """Moments bit for bit; parameters too, but that torch's sqrt and pow may miss the last bit."""
    dtypes = [*DTYPES, torch.bfloat16, torch.float16]
    grad_dtypes = [*DTYPES, torch.float32, torch.float32]
    shapes = [(1000,), (33, 31), (7,), (20_000,), (300,), ()]
    options = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled}
    results = []
    for function in map(on_lists, PACKED):
        tensors = lists(shapes, dtypes, amsgrad, grad_dtypes=grad_dtypes)
        for verdict in (Verdict.APPLY, Verdict.SKIP_OUTLIER, Verdict.CLIP):
            function(
                **tensors,
                grad_coef=scalar(0.3),
                verdict=verdict_(verdict),
                **(OPTIONS | {**options, "weight_decay": 0.1 if decoupled else 0.0}),
            )
        results.append(tensors)
    here, there = results
    assert_close(here["params"], there["params"], ulps=1)
    for name in ROLES[1:]:
        assert_same_bits(bits(here[name]), bits(there[name]))


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
@pytest.mark.parametrize("verdict", [2, 3, 77, -1])
@pytest.mark.parametrize("coef", [1.0, math.nan, math.inf])
def test_a_skip_writes_nothing(function, verdict, coef):
    tensors = lists([(5,), (300, 7), (40_000,), ()], DTYPES, amsgrad=True)
    for tensor in everything(tensors):
        if tensor.numel() > 1:
            tensor.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    before = bits(everything(tensors))
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(coef), verdict=verdict_(verdict), **options)
    assert_same_bits(bits(everything(tensors)), before)


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
@pytest.mark.parametrize(
    "size, coef", [(1e38, 1e-43), (3e38, 1e-44), (1e-30, 1e30), (1e-38, 1e40), (1e38, 3e-38)]
)
def test_a_coefficient_beyond_float_gives_the_right_product(function, size, coef):
    grad = torch.tensor([1.0, -0.7, 0.3]) * size
    tensors = {
        "params": [torch.zeros(3)],
        "grads": [grad],
        "exp_avg": [torch.zeros(3)],
        "exp_avg_sq": [torch.zeros(3)],
        "max_exp_avg_sq": [],
        "state_steps": [torch.tensor(0.0)],
    }
    options = OPTIONS | {"beta1": 0.0}
    function(**tensors, grad_coef=scalar(coef), verdict=verdict_(1), **options)
    product = (grad.double() * coef).float()
    assert torch.equal(tensors["exp_avg"][0], product)
    if size * coef > 1e-4:
        torch.testing.assert_close(tensors["params"][0], -0.01 * grad.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
def test_amsgrad_does_not_swallow_a_nan(function):
    tensors = lists([(4,)], [torch.float32], amsgrad=True)
    tensors["exp_avg_sq"][0][1] = math.nan
    tensors["max_exp_avg_sq"][0][2] = math.nan
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **options)
    assert tensors["max_exp_avg_sq"][0].isnan().tolist() == [False, True, True, False]
    assert tensors["params"][0].isnan().tolist() == [False, True, True, False]


@needs_kernel
def test_adamw_does_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            tensors = lists([(400_001,), (7,), (300, 65), (70_000,)], DTYPES)
            step = on_lists(ops.adamw_)
            step(**tensors, grad_coef=scalar(0.3), verdict=verdict_(1), **OPTIONS)
            results.append(bits(everything(tensors)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


_DUMP = """
import hashlib, torch
from fastguard import ops
torch.manual_seed(1)
sizes = (1, 7, 8, 63, 255, 257, 4097, 20_003)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    moment = torch.promote_types(dtype, torch.float32)
    for amsgrad, coupled in ((False, False), (True, False), (False, True), (True, True)):
        params, grads = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
        size = ops.packed_offsets(sizes)[-1]
        m, v, largest = (torch.rand(size, dtype=moment) for _ in range(3))
        steps = torch.full((len(sizes),), 2.0)
        ops.adamw_(params, grads, m, v, largest if amsgrad else largest[:0], steps,
                   torch.tensor(0.37, dtype=torch.float64), torch.tensor(0),
                   1e-2, 0.9, 0.98, 0.1, 1e-8, not coupled, amsgrad, False)
        for t in (*params, m, v, largest):
            digest.update(t.view(torch.uint8).numpy().tobytes())
for dtype in (torch.bfloat16, torch.float16):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    param = every[~every.isnan()].clone()
    grad = torch.randn(param.numel()).to(dtype)
    m, v = torch.rand(2, ops.packed_offsets([param.numel()])[-1])
    ops.adamw_([param], [grad], m, v, m[:0], torch.ones(1),
               torch.tensor(0.37, dtype=torch.float64), torch.tensor(0),
               1e-2, 0.9, 0.98, 0.1, 1e-8, True, False, False)
    digest.update(param.view(torch.uint8).numpy().tobytes())
print(ops.cpu_info()["chosen"], digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_steps_to_the_same_bits():
    assert_same_from_every_instruction_set(_DUMP)
