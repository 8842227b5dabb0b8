"""The modules of attention over the inputs of torch's own tests of its modules, beside torch's."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastguard.attention import ClampedMultiheadAttention, replace_attention_

from .cases import TORCHS_WARNINGS

pytestmark = TORCHS_WARNINGS

LAYERS = [nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]
MODULES = [*LAYERS, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer]

# In a process of its own, because importing torch's test helpers changes torch's global settings.
_INPUTS = """
import pickle, sys, torch
from torch.testing._internal.common_modules import module_db
found = {}
torch.manual_seed(0)
for info in module_db:
    name = info.module_cls.__name__
    if name == "MultiheadAttention" or name.startswith("Transformer"):
        given = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True}
        found[name] = [
            (i.constructor_input.args, i.constructor_input.kwargs,
             i.forward_input.args, i.forward_input.kwargs)
            for i in info.module_inputs_func(info, **given)
        ]
sys.stdout.buffer.write(pickle.dumps(found))
"""


@functools.cache
def _found():
    run = [sys.executable, "-W", "ignore", "-c", _INPUTS]
    found = pickle.loads(subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout)
    # torch lists no inputs of this one.
    found["TransformerDecoder"] = [
        ((nn.TransformerDecoderLayer(*args, **kwargs, dtype=torch.float64), 2), {}, *inputs)
        for args, kwargs, *inputs in found["TransformerDecoderLayer"]
    ]
    return found


def inputs_of(cls):
    """Arguments of the constructor and of forward, as (args, kwargs, args, kwargs)."""
    found = copy.deepcopy(_found()[cls.__name__])
    assert len(found) >= 39
    masks = [tree_leaves(kwargs) for _, _, _, kwargs in found]
    assert any(x.dtype == torch.bool for leaves in masks for x in leaves if x is not None)
    return found


def pairs(cls, training=True):
    """(torch's module, ours of the same parameters, args, kwargs) for each of the inputs."""
    for args, kwargs, *inputs in inputs_of(cls):
        torch.manual_seed(0)
        theirs = cls(*args, **kwargs).double().train(training)
        for parameter in theirs.parameters():
            parameter.data.uniform_(-0.4, 0.4)  # biases start at zero
        yield theirs, clamped(theirs), *inputs


def clamped(theirs: nn.Module, clamp: float | None = None) -> nn.Module:
    ours = copy.deepcopy(theirs)
    assert replace_attention_(ours, clamp=clamp).replaced
    kinds = {type(m) for m in ours.modules() if isinstance(m, nn.MultiheadAttention)}
    assert kinds == {ClampedMultiheadAttention}
    return ours


def run(module, args, kwargs) -> tuple:
    """Output, and the gradients of all inputs and parameters through all of it."""
    args = [x.detach().requires_grad_() for x in args]
    output = module(*args, **kwargs)
    parts = [x for x in tree_leaves(output) if x is not None]
    loss = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in parts)
    return output, torch.autograd.grad(loss, [*args, *module.parameters()], allow_unused=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", MODULES)
def test_outputs_and_gradients_are_torchs(cls, training):
    for theirs, ours, args, kwargs in pairs(cls, training):
        expected = run(theirs, args, kwargs)
        torch.testing.assert_close(run(ours, args, kwargs), expected)
        with torch.no_grad():
            torch.testing.assert_close(ours(*args, **kwargs), expected[0])
        with torch.inference_mode():
            torch.testing.assert_close(ours(*args, **kwargs), expected[0])


@pytest.mark.parametrize("cls", MODULES)
def test_the_clamp_acts_on_each_of_the_inputs(cls):
    for theirs, _, args, kwargs in pairs(cls):
        ours = clamped(theirs, clamp=1e-3)
        for training in (True, False):
            with torch.no_grad():
                got = ours.train(training)(*args, **kwargs)
                expected = theirs.train(training)(*args, **kwargs)
            one, other = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
            assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", MODULES)
def test_what_is_unbatched_is_a_batch_of_one(cls):
    """As the reference functions of torch's tests have it."""
    seen = 0
    for (constructor, named, *_), (_, ours, args, kwargs) in zip(
        inputs_of(cls), pairs(cls), strict=True
    ):
        if args[0].dim() == 3:
            continue
        seen += 1
        layer = constructor[0].self_attn if "layers" in ours._modules else None
        batch_dim = 0 if (layer.batch_first if layer else named["batch_first"]) else 1

        def batched(name, x):
            return x[None] if name.endswith("key_padding_mask") and x is not None else x

        given = {name: batched(name, x) for name, x in kwargs.items()}
        expected = ours(*[x.unsqueeze(batch_dim) for x in args], **given)
        got = ours(*args, **kwargs)
        if isinstance(got, tuple):  # the weights are of shape (N, T, S) in both layouts
            torch.testing.assert_close(got[1], expected[1][0])
            got, expected = got[0], expected[0]
        torch.testing.assert_close(got, expected.squeeze(batch_dim))
    assert seen >= 32


@pytest.mark.parametrize("cls", LAYERS)
def test_gradients_are_those_of_finite_differences(cls):
    for _, ours, args, kwargs in pairs(cls):
        names, values = zip(*ours.named_parameters(), strict=True)

        def outputs(*leaves, ours=ours, args=args, kwargs=kwargs, names=names):
            state = dict(zip(names, leaves[len(args) :], strict=True))
            output = torch.func.functional_call(ours, state, leaves[: len(args)], kwargs)
            return tuple(x for x in tree_leaves(output) if x is not None and x.requires_grad)

        leaves = [x.detach().requires_grad_() for x in (*args, *values)]
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("cls", LAYERS)
def test_inputs_and_gradients_with_gaps(cls):
    def with_gaps(x):
        return x if x is None else x.repeat_interleave(2, -1)[..., ::2]

    for _, ours, args, kwargs in pairs(cls):
        gaps = tree_map(with_gaps, args)
        assert not any(x.is_contiguous() for x in gaps)
        expected = run(ours, args, kwargs)
        torch.testing.assert_close(run(ours, gaps, tree_map(with_gaps, kwargs)), expected)
        output = [x for x in tree_leaves(ours(*args, **kwargs)) if x is not None]
        gradients = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in output]
        leaves = [x for x in ours.parameters() if x.requires_grad]
        got = [
            torch.autograd.grad(output, leaves, g, retain_graph=True, allow_unused=True)
            for g in (gradients, tree_map(with_gaps, gradients))
        ]
        torch.testing.assert_close(*got)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("cls", LAYERS)
def test_copies_compute_the_same(cls, copied):
    for theirs, ours, args, kwargs in pairs(cls):
        again = copied(ours)
        assert repr(again) == repr(ours)
        expected = run(ours, args, kwargs)
        torch.testing.assert_close(run(again, args, kwargs), expected, rtol=0, atol=0)
        for module, other in ((theirs, ours), (ours, theirs)):
            state = {name: x + 1 for name, x in module.state_dict().items()}
            other.load_state_dict(state, strict=True)
            for name, x in other.state_dict().items():
                assert torch.equal(x, state[name])


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_of_the_device_and_dtype_asked_for(cls, dtype, monkeypatch):
    free = functools.partial(ClampedMultiheadAttention, clamp=None)
    if cls is not nn.MultiheadAttention:
        monkeypatch.setattr("torch.nn.modules.transformer.MultiheadAttention", free)
    made = free if cls is nn.MultiheadAttention else cls
    for args, kwargs, *_ in inputs_of(cls):
        if not any(isinstance(x, nn.Module) for x in args):  # those get their layers made
            module = made(*args, **kwargs, device="meta", dtype=dtype)
            kinds = {(x.device.type, x.dtype) for x in module.parameters()}
            assert kinds == {("meta", dtype)}
            assert any(isinstance(m, ClampedMultiheadAttention) for m in module.modules())


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_near_as_torchs(cls, dtype):
    def as_(x):
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    for theirs, ours, args, kwargs in pairs(cls):
        exact = tree_leaves(theirs(*args, **kwargs))
        lower = [
            tree_leaves(m.to(dtype)(*tree_map(as_, args), **tree_map(as_, kwargs)))
            for m in (ours, theirs)
        ]
        for got, torchs, expected in zip(*lower, exact, strict=True):
            if expected is not None:
                assert got.dtype == dtype
                error, torchs = ((x.double() - expected).abs().max() for x in (got, torchs))
                assert error <= 3 * torchs + 4 * torch.finfo(dtype).eps
