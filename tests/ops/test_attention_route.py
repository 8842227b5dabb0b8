"""Which function serves a request for attention on which device; none of them runs here."""

import math

import pytest
import torch

from fastguard.ops import _library
from fastguard.ops.attention import attention_ref, attention_sdpa, route
from fastguard.ops.attention_autograd import differentiable as KERNEL

A100, H100, B200, RTX5090 = (8, 0), (9, 0), (10, 0), (12, 0)

if _library.cpu_problem is not None:
    pytest.skip("without kernels nothing is chosen", allow_module_level=True)


def served(capability, dtype=torch.bfloat16, length=4096, width=64, padded=False, **options):
    given = {"mask": None, "dropout_p": 0.0, "softcap": 0.0, "stats": False} | options
    x = torch.empty(1, 1, length, width, dtype=dtype, device="meta")
    padding = torch.zeros(1, length, dtype=torch.bool) if padded else None
    masks = (padding, given["mask"], None)
    rest = (True, given["dropout_p"], 1.0, given["softcap"], math.inf, given["stats"])
    return route(capability, x, x, x, *masks, *rest)


OWN = [
    {"dropout_p": 0.1},
    {"softcap": 30.0},
    {"stats": True},
    {"padded": True},
    {"mask": torch.ones(1)},
]


def test_long_plain_attention_goes_to_torch_where_it_is_faster():
    for capability in (H100, B200):
        assert served(capability) is attention_sdpa
        assert served(capability, length=1024) is attention_sdpa
        assert served(capability, length=1023) is KERNEL
        assert served(capability, dtype=torch.float32) is KERNEL
    for capability in (A100, RTX5090):
        assert served(capability) is KERNEL


@pytest.mark.parametrize("options", OWN)
def test_what_torch_has_not_stays(options):
    assert served(H100, **options) is KERNEL
    assert served(H100, width=136, **options) is attention_ref
    assert served(A100, dtype=torch.float64, **options) is attention_ref


def test_what_the_kernels_do_not_take_goes_elsewhere():
    assert served(A100, width=128) is KERNEL
    assert served(A100, width=136) is attention_sdpa
    assert served(A100, dtype=torch.float64) is attention_sdpa


@pytest.mark.parametrize("clamp", [0.1, math.inf])
def test_torch_with_a_clamp_is_the_same(clamp):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 8)]
    tensors = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]
    options = (None, None, None, True, 0.0, 0.3, 0.0, clamp, False)
    outputs = [f(*tensors, *options, False).output for f in (attention_sdpa, attention_ref)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(output.square().sum(), tensors) for output in outputs]
    torch.testing.assert_close(*grads)
