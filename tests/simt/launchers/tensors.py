"""Tensors of every layout and dtype for the launchers' cases."""

import torch

from fastguard import ops
from fastguard.guard.statistics import unseen

F64 = torch.float64

RULE = (1e-2, 0.9, 0.98, 0.1, 1e-8, True)


def scalar(value, dtype=F64):
    return torch.tensor(value, dtype=dtype)


def with_gaps(values):
    wide = torch.full((*values.shape, 3), float("nan"), dtype=values.dtype)
    wide[..., 1] = values
    return wide[..., 1]


def drawn(dtypes=ops.DTYPES, seed=0):
    """Tensors of all layouts and dtypes: one chunk, several, misaligned, permuted, gaps, empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    tensors = []
    for dtype in dtypes:
        tensors += [
            normal(3, 7).to(dtype),
            normal(20_000).to(dtype),
            normal(9_001).to(dtype)[1:],
            normal(90, 100).to(dtype).t(),
            normal(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
            with_gaps(normal(5, 7).to(dtype)),
            with_gaps(normal(7, 5).to(dtype)).t(),
            torch.zeros(0, 3, dtype=dtype),
            scalar(1.5, dtype),
        ]
    return tensors


def copies(tensors):
    """The same values in the same layout, in other memory."""
    made = []
    for t in tensors:
        if t.numel() == 0:
            made.append(t.clone())
            continue
        room = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype)
        made.append(room.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t))
    return made


def state(params, amsgrad=False, seed=7):
    generator = torch.Generator().manual_seed(seed)
    dtype = F64 if params[0].dtype == F64 else torch.float32
    size = ops.packed_offsets(p.numel() for p in params)[-1]
    m, v, most = (torch.rand(size, generator=generator, dtype=dtype) for _ in range(3))
    return m, v, most if amsgrad else most[:0].clone(), torch.arange(float(len(params)))


def wide(tensor):
    return F64 if tensor.dtype == F64 else torch.float32


def assert_close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        rel = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(f.dtype, 2e-6)
        torch.testing.assert_close(f, w, rtol=rel, atol=rel * 1e-2, equal_nan=True)


def statistics(n):
    zeros = [torch.zeros(4, dtype=F64) for _ in range(3)]
    return ops.Statistics(*zeros, unseen(n, "cpu"))
