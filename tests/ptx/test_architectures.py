"""The PTX of the other architectures, of which the library holds machine code alone."""

import pytest
import torch

from fastguard import ops
from tests.sass import PROMISES
from tests.simt.attention_cases import BF16, F16, F32, both, gradient, inputs
from tests.simt.test_attention_kernels import assert_backward, assert_forward
from tests.simt.test_kernels import flat, same

from . import compiled
from .attention import PtxAttention
from .device import PtxDevice
from .promises import problems
from .test_kernels import CLOSE, EXACT, numbers
from .test_promises import COUNTING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["80", "90", "100"])
def kernels(request, tmp_path_factory):
    if not compiled.commands():
        pytest.skip("no CUDA toolkit, or a torch without CUDA")
    return compiled.programs(request.param, tmp_path_factory.mktemp(f"compute_{request.param}"))


def test_every_kernel_can_be_read_and_keeps_its_promises(kernels):
    assert kernels.names == sorted(PROMISES)
    for name in kernels.names:
        assert problems(kernels(name).kernel, name not in COUNTING) == []


@pytest.mark.parametrize("run", EXACT)
def test_the_bits_are_those_of_the_cpu(kernels, run):
    assert same(numbers(flat(run(PtxDevice(programs=kernels)))), numbers(flat(run(ops))))


@pytest.mark.parametrize("run", CLOSE)
def test_the_numbers_are_those_of_the_cpu(kernels, run):
    device = PtxDevice(programs=kernels)
    for found, wanted in zip(flat(run(device)), flat(run(ops)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_attention(kernels, dtype, width):
    options = {"heads": 2, "dropout_p": 0.2, "softcap": 3.0, "is_causal": True, "padding": "some"}
    sizes = {"head_dim": width, "value_dim": width, "queries": 70, "keys": 40}
    arguments = inputs(dtype, **sizes, **options)
    found, grads = both(PtxAttention(programs=kernels), arguments)
    assert_forward(arguments, found)
    assert_backward(arguments, gradient(arguments), found.output, grads)
