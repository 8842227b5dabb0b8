"""Arguments of adamw_ for its tests, as lists and packed."""

import pytest
import torch
from hypothesis import strategies as st

from fastguard import ops
from tests.simt.kernels.devices import DEVICES
from tests.tensors import F64

ROLES = ("params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state_steps")

OPTIONS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.98,
    "weight_decay": 0.1,
    "eps": 1e-8,
    "decoupled_weight_decay": True,
    "amsgrad": False,
    "maximize": False,
}


LAYOUT = st.sampled_from(["contiguous", "transposed", "gaps", "offset"])


def shapes(large, most):
    """A strategy for up to so many shapes: small ones, and those of ``large``."""
    small = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    return st.lists(st.one_of(small, st.sampled_from(large)), max_size=most)


def drawn_options(data):
    """The options that choose a way through the kernel."""
    return {
        "amsgrad": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        "decoupled_weight_decay": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
    }


def pack(params, moments, dtype, fill=0.0):
    """One tensor of all parameters' moments, with ``fill`` in the gaps between them."""
    offsets = ops.packed_offsets(p.numel() for p in params)
    packed = torch.full((offsets[-1] if moments else 0,), fill, dtype=dtype)
    for p, moment, offset in zip(params, moments, offsets, strict=False):
        ops.packed_view(packed, p, offset).copy_(moment)
    return packed


def on_lists(function):
    """An op's function for lists of moments and steps, with one call for each dtype of moments."""

    def call(params, grads, exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps, *, grad_coef, **kw):
        for wide in {p.dtype == F64 for p in params} or {False}:
            rows = [i for i, p in enumerate(params) if (p.dtype == F64) == wide]
            some = [params[i] for i in rows]
            dtype = F64 if wide else torch.float32
            moments = [[m[i] for i in rows if m] for m in (exp_avg, exp_avg_sq, max_exp_avg_sq)]
            packed = [pack(some, m, dtype, fill=77.0) for m in moments]
            steps = torch.tensor([state_steps[i] for i in rows])
            coef = grad_coef if grad_coef.dim() == 0 else grad_coef[rows]
            function(some, [grads[i] for i in rows], *packed, steps, grad_coef=coef, **kw)
            offsets = ops.packed_offsets(p.numel() for p in some)
            for whole, parts in zip(packed, moments, strict=True):
                for p, part, offset in zip(some, parts, offsets, strict=False):
                    view = ops.packed_view(whole, p, offset)
                    part.copy_(view)
                    view.fill_(77.0)
                assert (whole == 77.0).all()  # the gaps between parameters
            for i, step in zip(rows, steps, strict=True):
                state_steps[i].copy_(step)

    return call


FUNCTIONS = [
    pytest.param(on_lists(ops.adamw_), id="adamw_"),
    pytest.param(on_lists(ops.adamw_ref_), id="adamw_ref_"),
]

PACKED = [ops.adamw_, ops.adamw_ref_]

CUDA = [pytest.param(on_lists(d.values[0].adamw_), id=f"adamw_ {d.id}") for d in DEVICES]


def scalar(value):
    return torch.tensor(value, dtype=F64)


def verdict_(value):
    return torch.tensor(int(value))


def moment_dtype(dtype):
    return F64 if dtype == F64 else torch.float32


def laid_out(tensor, layout):
    """The same values in another order or with gaps."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = torch.full((*tensor.shape, 2), 7.0, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor.clone()


def lists(shapes, dtypes, amsgrad=False, layouts=None, seed=0, grad_dtypes=None, step=3.0):
    """The op's tensors in the middle of a training, with the state as lists."""
    generator = torch.Generator().manual_seed(seed)
    layouts = iter(layouts or ["contiguous"] * 5 * len(shapes))

    def drawn(shape, dtype, positive=False):
        values = torch.randn(shape, generator=generator, dtype=F64)
        # Second moments near 0 would make the quotient of the moments inexact.
        values = values.square() + 0.01 if positive else values
        return laid_out(values.to(dtype), next(layouts))

    result = {name: [] for name in ROLES}
    for shape, dtype, grad_dtype in zip(shapes, dtypes, grad_dtypes or dtypes, strict=True):
        result["params"].append(drawn(shape, dtype))
        result["grads"].append(drawn(shape, grad_dtype))
        result["exp_avg"].append(drawn(shape, moment_dtype(dtype)))
        result["exp_avg_sq"].append(drawn(shape, moment_dtype(dtype), positive=True))
        largest = drawn(shape, moment_dtype(dtype), positive=True)
        if amsgrad:
            result["max_exp_avg_sq"].append(largest)
        result["state_steps"].append(torch.tensor(step + len(result["state_steps"]) % 3))
    return result


def everything(tensors):
    return [t for name in ROLES for t in tensors[name]]


def packed(tensors):
    """The op's arguments, packed from lists. The parameters have one dtype of moments."""
    dtype = moment_dtype(tensors["params"][0].dtype) if tensors["params"] else torch.float32
    state = {name: pack(tensors["params"], tensors[name], dtype) for name in ROLES[2:5]}
    steps = torch.tensor([float(step) for step in tensors["state_steps"]])
    return {**tensors, **state, "state_steps": steps}


def flat(kwargs):
    return [*kwargs["params"], *kwargs["grads"], *(kwargs[name] for name in ROLES[2:])]
