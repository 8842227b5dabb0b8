"""The tests of the kernels notice a wrong instruction."""

import functools

import pytest
import torch

from fastguard import ops
from tests.ops.cases import check_grad_norm
from tests.simt import test_kernels as simt
from tests.simt.attention_cases import BF16, F16, both, gradient, inputs
from tests.simt.test_attention_kernels import assert_backward, assert_forward
from tests.simt.test_kernels import bits, drawn, same

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
ATTENTION = functools.partial(check_attention, inputs(BF16, **OPTIONS))
DROPPED = functools.partial(check_attention, inputs(F16, dropout_p=0.2, softcap=2.0, **OPTIONS))

CASES = {
    "adamw_kernel<false,false>": assert_same(adamw),
    "scale_kernel": assert_same(scale),
    "accumulate_kernel": assert_same(simt.run_accumulate),
    "settle_kernel": assert_same(simt.run_settle),
    "grad_norm_kernel": check_norms,
    "attention_kernel<BFloat16,64>": ATTENTION,
    "attention_kernel<Float16,64>": DROPPED,
    "attention_delta_kernel<BFloat16,BFloat16>": ATTENTION,
    "attention_grad_query_kernel<BFloat16,64>": ATTENTION,
    "attention_grad_key_kernel<Float16,64>": DROPPED,
}
