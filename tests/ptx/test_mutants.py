"""The tests of the kernels notice a wrong instruction."""

import functools
import random

import numpy as np
import pytest
import torch

from fastguard import ops
from tests.ops.cases import check_grad_norm
from tests.simt import test_kernels as simt
from tests.simt.attention_cases import BF16, F16, both, gradient, inputs
from tests.simt.test_attention_kernels import assert_backward, assert_forward
from tests.simt.test_kernels import bits, drawn, same

from . import arithmetic, conversions, mutants, numbers, test_opcodes, warps
from .attention import PtxAttention
from .device import PtxDevice

pytestmark = pytest.mark.usefixtures("programs")

STEP_LIMIT = 20_000  # of a block; a mutant may never end


def assert_same(run):
    """A check that ``run`` gives the bits of the CPU's operators."""

    @functools.cache
    def expected():
        return bits(run(ops))

    def check(programs):
        assert same(bits(run(device(programs))), expected())

    return check


def device(programs):
    return PtxDevice(blocks=2, programs=programs, step_limit=STEP_LIMIT)


def tensors(dtype=torch.float32, seed=0):
    """Several chunks, a head, a tail, and single elements."""
    return [*drawn(8192 + 1100, 5, dtype=dtype, seed=seed), *drawn(30, dtype=dtype, offset=1)]


def adamw(device):
    params = [*tensors(), *tensors(torch.bfloat16)]
    grads = [*tensors(seed=1), *tensors(torch.bfloat16, seed=1)]
    size = ops.packed_offsets(p.numel() for p in params)[-1]
    m, v = (x.abs() for x in drawn(size, size, seed=2))
    steps = torch.arange(6, dtype=torch.float32)
    rest = (simt.scalar(0.5), torch.tensor(1), *simt.OPTIONS, False, False)
    device.adamw_(params, grads, m, v, torch.zeros(0), steps, *rest)
    return params, m, v, steps


def scale(device):
    grads = [*tensors(), *tensors(torch.bfloat16), *tensors(torch.float16)]
    device.scale_(grads, torch.linspace(0.1, 1.0, 9, dtype=torch.float64))
    return grads


def check_norms(programs):
    grads = [*tensors(), *tensors(torch.bfloat16), *tensors(torch.float16)]
    check_grad_norm(device(programs).grad_norm(grads), grads, rel=1e-6)
    grads[0][[7, 9000]] = torch.tensor([torch.nan, torch.inf])
    grads[4][2] = -torch.inf
    check_grad_norm(device(programs).grad_norm(grads), grads, rel=1e-6)


def check_attention(arguments, programs):
    found, grads = both(PtxAttention(programs=programs, step_limit=STEP_LIMIT), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)


OPTIONS = {"queries": 70, "keys": 70, "padding": "some", "is_causal": True, "return_stats": True}
PLAIN = inputs(BF16, clamp=0.3, return_unrounded=True, **OPTIONS)
ATTENTION = functools.partial(check_attention, PLAIN)
DROPPED = functools.partial(check_attention, inputs(F16, dropout_p=0.2, softcap=2.0, **OPTIONS))

CASES = {
    "adamw_kernel<false,false>": assert_same(adamw),
    "scale_kernel": assert_same(scale),
    "accumulate_kernel": assert_same(simt.run_accumulate),
    "settle_kernel": assert_same(simt.run_settle),
    "grad_norm_kernel": check_norms,
    "attention_kernel<BFloat16,64>": ATTENTION,
    "attention_kernel<Float16,64>": DROPPED,
    "attention_delta_kernel<BFloat16,float>": ATTENTION,
    "attention_grad_query_kernel<BFloat16,64>": ATTENTION,
    "attention_grad_key_kernel<Float16,64>": DROPPED,
}

# A mutant may change nothing: a jump over a loop that ends at once, the order of a sum.
HARMLESS = {
    ("grad_norm_kernel", mutants.with_registers_swapped),
    ("grad_norm_kernel", mutants.over_twice_the_distance),
}
SOMETIMES_HARMLESS = {
    mutants.swapped,
    mutants.without_predicate,
    mutants.with_opposite_predicate,
}
MOST = 2 / 3  # of those mutants are caught


@pytest.fixture(scope="module")
def reached(programs):
    return {name: mutants.executed(programs, name, run) for name, run in CASES.items()}


def check_mutants(programs, reached, name, count):
    """Draws that many mutants of each kind of the instructions that the case executes."""
    for kind in mutants.KINDS:
        if (name, kind) in HARMLESS:
            continue
        made = list(mutants.mutants(programs, name, reached[name], kind))
        made = random.Random(name).sample(made, min(count, len(made)))
        missed = [text for text, changed in made if not mutants.is_caught(CASES[name], changed)]
        allowed = (1 - MOST) * len(made) if kind in SOMETIMES_HARMLESS else 0
        assert len(missed) <= allowed, f"{kind.__name__}: {missed}"


@pytest.mark.parametrize("name", CASES)
def test_some_mutants_of_a_kernel_are_caught(programs, reached, name):
    check_mutants(programs, reached, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_mutants_of_a_kernel_are_caught(programs, reached, name):
    check_mutants(programs, reached, name, 12)


def test_there_are_mutants_of_every_kind(programs, reached):
    for kind in mutants.KINDS:
        assert any(any(mutants.mutants(programs, name, reached[name], kind)) for name in CASES)


# --- of the interpreter ---------------------------------------------------------------------------

MATRICES = functools.partial(
    test_opcodes.test_a_product_of_matrices_from_shared_memory, "bf16", torch.bfloat16
)

INTERPRETERS = {
    "a product rounded before the sum": (
        (arithmetic, "fma32", lambda a, b, c: a * b + c),
        functools.partial(test_opcodes.test_fma, 3),
    ),
    "a sum rounded twice": (
        (numbers, "sum_to_odd", lambda x, y, total: total),
        functools.partial(test_opcodes.test_fma_is_rounded_once, 1),
    ),
    "truncation": (
        (conversions, "to_bfloat16", lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)),
        functools.partial(test_opcodes.test_rounding_to_16_bits, "bf16", torch.bfloat16),
    ),
    "a lane of the first matrix": (
        (warps, "A_ELEMENTS", [warps.A_ELEMENTS[i] for i in (0, 2, 1, 3)]),
        MATRICES,
    ),
    "a lane of the second matrix": ((warps, "B_ELEMENTS", warps.B_ELEMENTS[::-1]), MATRICES),
    "a lane of the result": (
        (warps, "D_ELEMENTS", [warps.D_ELEMENTS[i] for i in (1, 0, 2, 3)]),
        MATRICES,
    ),
}


@pytest.mark.parametrize("name", INTERPRETERS)
def test_a_mutant_of_the_interpreter_is_caught(name, monkeypatch):
    change, check = INTERPRETERS[name]
    check()
    monkeypatch.setattr(*change)
    with pytest.raises(AssertionError):
        check()
