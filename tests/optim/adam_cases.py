"""Parameters, gradients and comparisons for the optimizers' tests."""

import torch
from torch import nn

import fastguard
from tests.tensors import F64, bits

PAIRS = [(fastguard.Adam, torch.optim.Adam), (fastguard.AdamW, torch.optim.AdamW)]


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = [(5,), (4, 3, 3, 3), (0,), (), (33, 7), (70, 300)]
    listed = [nn.Parameter(torch.randn(shape, dtype=F64).to(dtype)) for shape in shapes]
    listed[1].data = listed[1].data.contiguous(memory_format=torch.channels_last)
    listed[4].data = listed[4].data.t().contiguous().t()
    return listed


def give_grads(params, seed, scale=1.0, as_parameters=False):
    """Give row-major gradients; with ``as_parameters`` in the layout that autograd gives them."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=F64)
        p.grad = (values * scale).to(p.dtype)
        if as_parameters:
            p.grad = torch.empty_like(p).copy_(p.grad)


def run(optimizer, params, steps=range(4), **kwargs):
    for seed in steps:
        give_grads(params, seed, **kwargs)
        optimizer.step()


def state_bits(optimizer):
    return bits([t for s in optimizer.state.values() for t in s.values()])
