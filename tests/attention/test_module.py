"""ClampedMultiheadAttention against nn.MultiheadAttention."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.masked import MaskedTensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastguard import GradGuard
from fastguard.attention import clamped_attention
from fastguard.attention import module as multihead
from fastguard.attention.module import ClampedMultiheadAttention
from fastguard.attention.replacement import replace_attention_

# torch's encoder warns of its own nested tensors, and of masks of two dtypes, which are fine here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensor"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

NAN, INF = float("nan"), float("inf")
#: Largest difference from torch's, relative to the largest element of the outputs or gradients, or
#: to 1 if that is larger: gradients of few channels are differences of what is close to 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draw(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def twins(*sizes: int, dtype=torch.float64, clamp=None, **options):
    """nn.MultiheadAttention and ours, same checkpoint, no parameter at its initial zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*sizes, dtype=dtype, **options)
    for parameter in theirs.parameters():
        parameter.data.uniform_(-0.4, 0.4)
    ours = ClampedMultiheadAttention(*sizes, dtype=dtype, clamp=clamp, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def length_mask(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def as_float(mask: Tensor, dtype=torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -INF)


def results(attention, inputs, **call):
    """Output, weights, and the gradients of all inputs and parameters through both."""
    output, weights = attention(*inputs, **call)
    loss = (output * draw(*output.shape, seed=7, dtype=output.dtype)).sum()
    if call.get("need_weights", True):
        loss = loss + (weights * draw(*weights.shape, seed=8, dtype=weights.dtype)).sum()
    leaves = [x for x in (*dict.fromkeys(inputs), *attention.parameters()) if x.requires_grad]
    return output, weights, torch.autograd.grad(loss, leaves)


def assert_same(got, expected, tolerance: float) -> None:
    """`results` of two modules: same shapes and dtypes, differences small beside the largest."""
    for one, other in ((got[:1], expected[:1]), (got[2], expected[2])):
        largest = max(1.0, *(x.abs().max().item() for x in other))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=tolerance)


@st.composite
def problems(draw_from):
    """Options of the constructor, inputs, and arguments of `forward` for torch's and for ours."""
    flag = lambda: draw_from(st.booleans())  # noqa: E731
    size = lambda high: draw_from(st.integers(1, high))  # noqa: E731
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 2**31)))
    dtype = draw_from(st.sampled_from(list(TOLERANCE)))
    heads, width = size(4), size(5)
    channels, frames, keys = heads * width, size(6), size(9)
    batch = size(3) if (batched := flag()) else 1
    kind = draw_from(st.sampled_from(["self", "query is key", "key is value", "all differ"]))
    if kind in ("self", "query is key"):
        keys = frames
    options = {name: flag() for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    if kind == "all differ" and flag():
        options |= {"kdim": size(7), "vdim": size(7)}

    def sequence(length: int, width: int) -> Tensor:
        shape = (batch, length) if options["batch_first"] else (length, batch)
        x = torch.randn(*shape if batched else (length,), width, generator=generator)
        return x.to(dtype).requires_grad_()

    query = sequence(frames, channels)
    key = query if kind in ("self", "query is key") else None
    key = sequence(keys, options.get("kdim", channels)) if key is None else key
    value = key if kind in ("self", "key is value") else None
    value = sequence(keys, options.get("vdim", channels)) if value is None else value

    def mask(*shape: int) -> Tensor | None:
        kind = draw_from(st.sampled_from(["none", "bool", "hiding", "added"]))
        if kind == "none":
            return None
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False  # a row without a key is NaN in torch
        if kind == "bool":
            return hidden
        floats = as_float(hidden, dtype)
        return floats + torch.randn(shape, generator=generator).to(dtype) * (kind == "added")

    shapes = [(frames, keys), (batch * heads, frames, keys)]
    call = {
        "key_padding_mask": mask(*(batch, keys) if batched else (keys,)),
        "attn_mask": mask(*draw_from(st.sampled_from(shapes))),
        "need_weights": flag(),
        "average_attn_weights": flag(),
    }
    our_call = dict(call)
    if draw_from(st.integers(0, 3)) == 0:
        call["attn_mask"] = torch.ones(frames, keys, dtype=torch.bool).triu(1)
        our_call |= {"is_causal": True, "attn_mask": call["attn_mask"] if flag() else None}
    sizes = {"embed_dim": channels, "num_heads": heads, "dtype": dtype}
    return sizes | options, (query, key, value), call, our_call, flag()


@settings(max_examples=200, deadline=None)
@given(problems())
def test_without_clamp_it_is_multihead_attention(problem):
    options, inputs, call, our_call, training = problem
    sizes = options.pop("embed_dim"), options.pop("num_heads")
    theirs, ours = twins(*sizes, **options)
    expected = results(theirs.train(training), inputs, **call)
    got = results(ours.train(training), inputs, **our_call)
    assert_same(got, expected, TOLERANCE[options["dtype"]])
    assert got[0].is_contiguous()


@pytest.mark.parametrize("kind", ["self", "query is key", "key is value", "all differ"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, [7, 3]])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_each_kind_of_projection(kind, bias, lengths, need_weights, batch_first):
    theirs, ours = twins(24, 3, bias=bias, batch_first=batch_first)
    shape = (2, 7, 24) if batch_first else (7, 2, 24)
    a, b, c = (draw(*shape, seed=i).requires_grad_() for i in range(3))
    inputs = {
        "self": (a, a, a),
        "query is key": (a, a, b),
        "key is value": (a, b, b),
        "all differ": (a, b, c),
    }[kind]
    mask = None if lengths is None else length_mask(lengths, 7)
    call = {"key_padding_mask": mask, "need_weights": need_weights}
    assert_same(results(ours, inputs, **call), results(theirs, inputs, **call), 1e-10)


FLAGS = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 6, "batch_first": True},
    {"kdim": 5, "bias": False, "add_bias_kv": True},
]


@pytest.mark.parametrize("flags", FLAGS)
def test_same_seed_gives_torchs_parameters_and_each_loads_the_other(flags):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(24, 3, **flags)
    torch.manual_seed(3)
    ours = ClampedMultiheadAttention(24, 3, **flags)
    for module, other in ((ours, theirs), (theirs, ours)):
        assert list(module.state_dict()) == list(other.state_dict())
        for name, expected in other.state_dict().items():
            assert torch.equal(module.state_dict()[name], expected), name
        for parameter in module.parameters():
            parameter.data.fill_(3.0)
        module.load_state_dict(other.state_dict(), strict=True)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(24, 3, **flags)
    torch.manual_seed(3)
    ours._reset_parameters()  # out_proj.weight is drawn in its own constructor, before
    torch.manual_seed(3)
    theirs._reset_parameters()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert name == "out_proj.weight" or torch.equal(got, expected), name


def test_signatures_are_torchs():
    def parameters(function):
        return [
            (p.name, p.default, p.kind)
            for p in inspect.signature(function).parameters.values()
            if p.name not in ("clamp", "softcap", "record_stats")
        ]

    for name in ("__init__", "forward"):
        theirs = parameters(getattr(nn.MultiheadAttention, name))
        assert parameters(getattr(ClampedMultiheadAttention, name)) == theirs
    options = inspect.signature(ClampedMultiheadAttention).parameters
    for name, default in (("clamp", 10.0), ("softcap", None), ("record_stats", False)):
        assert options[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert options[name].default == default
    assert "batch_first=True, clamp=3.0, softcap=5.0" in repr(
        ClampedMultiheadAttention(4, 2, batch_first=True, clamp=3.0, softcap=5.0)
    )


@pytest.mark.parametrize("need_weights", [True, False])
def test_it_clamps_before_the_projection(need_weights):
    ours = ClampedMultiheadAttention(8, 2, clamp=0.25)
    ours.in_proj_weight.data.mul_(100.0)
    nn.init.eye_(ours.out_proj.weight)
    x = draw(5, 1, 8, seed=0, dtype=torch.float32)
    assert ours(x, x, x, need_weights=need_weights)[0].abs().max() == 0.25
    ours.clamp = None
    assert ours(x, x, x, need_weights=need_weights)[0].abs().max() > 1


@pytest.mark.parametrize("need_weights", [True, False])
def test_softcap_bounds_the_logits(need_weights):
    ours = ClampedMultiheadAttention(8, 2, softcap=1e-6, clamp=None)
    x = 10 * draw(5, 1, 8, seed=0, dtype=torch.float32)
    output, weights = ours(x, x, x, need_weights=need_weights)
    mean = ours.out_proj(ours._project(x, x, x)[2].mean(0, keepdim=True))
    torch.testing.assert_close(output, mean.expand_as(output))
    if need_weights:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 5))


def test_dropout_acts_in_training_only_and_weights_are_those_used():
    _, ours = twins(24, 3, dropout=0.5, batch_first=True)
    x = draw(2, 7, 24, seed=0)

    def run(seed, **call):
        torch.manual_seed(seed)
        return ours(x, x, x, **call)

    output, weights = run(1, average_attn_weights=False)
    torch.testing.assert_close(run(1, need_weights=False)[0], output)
    assert not torch.equal(run(2)[0], output)
    assert 0.3 < (weights == 0).double().mean() < 0.7
    values = x @ ours.in_proj_weight[48:].T + ours.in_proj_bias[48:]
    heads = weights @ values.unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), output)
    torch.testing.assert_close(run(1)[1], weights.mean(1))

    ours.eval()
    assert torch.equal(run(1)[0], run(2)[0])
    assert run(1)[1].min() > 0


def test_torch_returns_weights_after_dropout():
    # What the test above asks of ours.
    theirs = nn.MultiheadAttention(8, 2, dropout=0.5)
    x = draw(5, 20, 8, seed=0, dtype=torch.float32)
    weights = theirs(x, x, x, average_attn_weights=False)[1]
    assert 0.3 < (weights == 0).double().mean() < 0.7


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("where", ["key_padding_mask", "attn_mask"])
def test_rows_without_a_key_attend_to_nothing(need_weights, kind, where):
    _, ours = twins(24, 3, batch_first=True)
    x = draw(2, 7, 24, seed=0).requires_grad_()
    if where == "key_padding_mask":
        mask = length_mask([7, 0], 7)
    else:
        mask = torch.zeros(2, 3, 7, 7, dtype=torch.bool)
        mask[1] = True
        mask = mask.flatten(0, 1)
    call = {where: mask if kind == "bool" else as_float(mask), "need_weights": need_weights}
    output, weights, gradients = results(ours, (x, x, x), **call)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(7, 24))
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if need_weights:
        assert torch.equal(weights[1], torch.zeros_like(weights[1]))
        torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0, 0]))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_garbage_in_padded_keys_reaches_nothing(need_weights, kind, garbage):
    _, ours = twins(24, 3, batch_first=True, add_zero_attn=True)
    query, key = draw(2, 4, 24, seed=0).requires_grad_(), draw(2, 7, 24, seed=1)
    mask = length_mask([5, 2], 7)
    dirty = key.masked_fill(mask[:, :, None], garbage)
    call = {
        "key_padding_mask": mask if kind == "bool" else as_float(mask),
        "need_weights": need_weights,
    }

    def run(key):
        output, weights = ours(query, key, key, **call)
        loss = output.square().sum() + (weights.square().sum() if need_weights else 0)
        # in_proj_weight's gradient multiplies the garbage by zero, in torch too.
        leaves = (query, ours.in_proj_bias, ours.out_proj.weight)
        return output, weights, torch.autograd.grad(loss, leaves)

    clean = run(key)
    assert clean[0].isfinite().all() and clean[2][0].abs().sum() > 0
    torch.testing.assert_close(run(dirty), clean, rtol=0, atol=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("appended", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_is_causal_needs_no_mask_and_stands_for_the_one_given(need_weights, appended, padded):
    theirs, ours = twins(24, 3, add_bias_kv=appended, add_zero_attn=appended)
    x = draw(6, 2, 24, seed=0).requires_grad_()
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    call = {"need_weights": need_weights}
    call["key_padding_mask"] = length_mask([6, 3], 6) if padded else None
    expected = results(theirs, (x, x, x), attn_mask=causal, **call)
    for mask in (None, causal, as_float(causal), torch.ones_like(causal)):  # the last is not read
        got = results(ours, (x, x, x), attn_mask=mask, is_causal=True, **call)
        assert_same(got, expected, 1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
def test_an_added_mask_may_be_learnt(need_weights):
    theirs, ours = twins(24, 3)
    x = draw(6, 2, 24, seed=0)
    mask = draw(6, 6, seed=1).requires_grad_()
    gradients = []
    for attention in (ours, theirs):
        output, _ = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
        gradients += torch.autograd.grad(output.square().sum(), mask)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(4, 2, 24), (4, 24)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_are_views_of_one_gemm(monkeypatch, shape, batch_first):
    seen = []

    def spy(*heads, **options):
        seen.extend(heads)
        return clamped_attention(*heads, **options)

    monkeypatch.setattr(multihead, "clamped_attention", spy)
    _, ours = twins(24, 3, batch_first=batch_first)
    x = draw(*shape, seed=0)
    ours(x, x, x, need_weights=False)
    assert len(seen) == 3 and len({head.untyped_storage().data_ptr() for head in seen}) == 1
    assert all(head.stride(3) == 1 and head.shape[1::2] == (3, 8) for head in seen)


def encoder_layers(clamp=None, **options):
    """torch's encoder layer, and one with ours put in its place."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True, **options)
    ours = copy.deepcopy(theirs)
    ours.self_attn = ClampedMultiheadAttention(24, 4, batch_first=True, clamp=clamp)
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    return theirs, ours


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_encoder_layer_takes_it_and_no_fast_path_passes_it_by(norm_first, training, lengths):
    theirs, ours = encoder_layers(norm_first=norm_first)
    x = draw(2, 7, 24, seed=0, dtype=torch.float32)
    mask = None if lengths is None else length_mask(lengths, 7)
    theirs.train(training)
    ours.train(training)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=mask)
        torch.testing.assert_close(ours(x, src_key_padding_mask=mask), expected)
        ours.self_attn.clamp = 1e-6
        clamped = ours(x, src_key_padding_mask=mask)
        ours.self_attn.out_proj.weight.zero_()
        torch.testing.assert_close(clamped, ours(x, src_key_padding_mask=mask))
    assert not torch.allclose(clamped, expected, atol=1e-3)


@pytest.mark.parametrize("how", ["constructor", "replace_attention_"])
def test_no_fast_path_of_an_encoder_passes_it_by(how):
    """Built of ours, it makes nested tensors of what is padded; replaced, it makes none."""
    theirs, ours = encoder_layers(clamp=1e-6)
    if how == "constructor":
        encoder = nn.TransformerEncoder(ours, 2).eval()
    else:
        encoder = nn.TransformerEncoder(theirs, 2).eval()
        assert encoder.use_nested_tensor
        assert len(replace_attention_(encoder, clamp=1e-6).replaced) == 2
    x, mask = draw(2, 7, 24, seed=0, dtype=torch.float32), length_mask([7, 3], 7)
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=mask)
        for layer in encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
        torch.testing.assert_close(got, encoder(x, src_key_padding_mask=mask))
    assert (got - x).abs().max() > 0.1


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [[3, 2], [5], [0, 4]])
def test_a_nested_tensor_is_padded_and_nested_again(batch_first, lengths):
    ours = ClampedMultiheadAttention(24, 4, batch_first=batch_first).eval()
    rows = [draw(length, 24, seed=length).float() for length in lengths]
    nested = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        output, weights = ours(nested, nested, nested, need_weights=False)
        assert weights is None and output.is_nested
        for got, row in zip(output.unbind(), rows, strict=True):
            torch.testing.assert_close(got, ours(row, row, row, need_weights=False)[0])
        with pytest.raises(AssertionError, match=r"a nested tensor that is query, key and value"):
            ours(nested, nested, nested)
        with pytest.raises(AssertionError, match=r"a nested tensor that is query, key and value"):
            ours(nested, nested.clone(), nested, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"add_bias_kv": True, "batch_first": True}])
def test_compiles_into_one_graph(need_weights, options):
    _, ours = twins(24, 3, dtype=torch.float32, clamp=1.0, **options)
    x = draw(5, 5, 24, seed=0, dtype=torch.float32).requires_grad_()
    call = {"key_padding_mask": length_mask([5, 4, 3, 2, 1], 5), "need_weights": need_weights}
    torch.manual_seed(0)
    expected = results(ours, (x, x, x), **call)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    assert_same(results(compiled, (x, x, x), **call), expected, 1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_autocast_works_as_torchs(need_weights, options):
    theirs, ours = twins(24, 3, dtype=torch.float32, **options)
    x = draw(6, 2, 24, seed=0, dtype=torch.float32).requires_grad_()
    call = {"key_padding_mask": length_mask([6, 3], 6), "need_weights": need_weights}
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = results(ours, (x, x, x), **call), results(theirs, (x, x, x), **call)
    assert got[0].dtype == torch.bfloat16
    assert_same(got, expected, 5e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("flags", FLAGS)
def test_copies_compute_the_same(copied, flags):
    ours = ClampedMultiheadAttention(24, 4, clamp=0.1, softcap=3.0, **flags).eval()
    again = copied(ours)
    inputs = [draw(5, 2, n, seed=n, dtype=torch.float32) for n in (24, ours.kdim, ours.vdim)]
    torch.testing.assert_close(again(*inputs), ours(*inputs), rtol=0, atol=0)
    assert repr(again) == repr(ours)
    assert again.out_proj.weight is not ours.out_proj.weight


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_batch_of_nothing_gives_nothing(need_weights):
    ours = ClampedMultiheadAttention(24, 3, add_zero_attn=True, batch_first=True)
    x, mask = torch.zeros(0, 7, 24), torch.zeros(0, 7, dtype=torch.bool)
    output, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    assert output.shape == (0, 7, 24)
    assert weights is None or weights.shape == (0, 7, 8)


def test_meta_device_gives_shapes():
    ours = ClampedMultiheadAttention(24, 3, device="meta")
    x = torch.empty(7, 2, 24, device="meta")
    for need_weights in (True, False):
        output, weights = ours(x, x, x, is_causal=True, need_weights=need_weights)
        assert output.device.type == "meta" and output.shape == (7, 2, 24)
        assert weights is None or weights.shape == (2, 7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp": 0.0}, "got 0.0: pass None"),
        ({"clamp": NAN}, "got nan: pass None"),
        ({"softcap": -1.0}, "got -1.0: pass None"),
        ({"dropout": 1.5}, r"\[0, 1\), got 1.5"),
        *(({"num_heads": n}, f"embed_dim=8, num_heads={n}") for n in (-2, 0, 3, 16)),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClampedMultiheadAttention(**{"embed_dim": 8, "num_heads": 2} | options)


@pytest.mark.parametrize(
    "shapes",
    [
        ((8,), (8,), (8,)),
        ((7, 2, 8), (7, 8), (7, 8)),
        ((1, 7, 2, 8),) * 3,
        ((7, 2, 4), (7, 2, 8), (7, 2, 8)),
        ((7, 2, 8), (7, 2, 8), (7, 2, 4)),
        ((7, 2, 8), (5, 2, 8), (4, 2, 8)),
        ((7, 2, 8), (7, 3, 8), (7, 3, 8)),
        ((7, 2, 8), (7, 2, 8), (7, 3, 8)),
    ],
)
def test_shapes_of_inputs_are_named(shapes):
    inputs = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(AssertionError, match="must be ") as caught:
        ClampedMultiheadAttention(8, 2)(*inputs)
    message = str(caught.value)
    assert "(T, N, 8), (S, N, 8), (S, N, 8), or unbatched" in message
    assert message.endswith(", ".join(map(str, shapes)))
    with pytest.raises((AssertionError, RuntimeError)):  # torch's say less
        nn.MultiheadAttention(8, 2)(*inputs)


BOOL = torch.bool


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (("attn_mask", (7, 4), BOOL), RuntimeError, r"\(7, 5\) or .* \(4, 7, 5\), got \(7, 4\)"),
        (("attn_mask", (2, 7, 5), BOOL), RuntimeError, r"got \(2, 7, 5\)"),
        (("attn_mask", (7, 5), torch.int64), AssertionError, "attn_mask must be bool.*int64"),
        (("key_padding_mask", (2, 7), BOOL), AssertionError, r"\(N, S\) = \(2, 5\), got \(2, 7\)"),
        (("key_padding_mask", (5,), BOOL), AssertionError, r"got \(5,\)"),
        (("key_padding_mask", (2, 5), torch.uint8), AssertionError, "key_padding_mask must.*uint8"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, error, message):
    name, shape, dtype = mask
    query, key = torch.zeros(7, 2, 8), torch.zeros(5, 2, 8)
    call = {name: torch.zeros(shape, dtype=dtype)}
    with pytest.raises(error, match=message):
        ClampedMultiheadAttention(8, 2)(query, key, key, **call)
    with pytest.raises(error):
        nn.MultiheadAttention(8, 2)(query, key, key, **call)


def test_unbatched_masks_that_do_not_fit_are_named():
    x = torch.zeros(7, 8)
    with pytest.raises(AssertionError, match=r"\(S,\) = \(7,\), got \(1, 7\)"):
        ClampedMultiheadAttention(8, 2)(x, x, x, torch.zeros(1, 7, dtype=BOOL))


def test_stats_of_the_last_forward_reach_the_report_on_a_bad_step(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ClampedMultiheadAttention(8, 2, batch_first=True, record_stats=True)
            self.quiet = ClampedMultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.quiet(x, x, x, need_weights=False)[0]

    net = Net()
    guard = GradGuard(net, report_dir=tmp_path)
    x = torch.randn(2, 5, 8)
    (net(x).sum() * math.nan).backward()
    seen = net.attention.stats
    assert seen.max_logit.shape == seen.entropy.shape == seen.clamped_share.shape == (2,)
    guard.step(torch.optim.SGD(net.parameters()))
    net(3 * x)  # of a later batch
    guard.poll(wait=True)
    (path,) = tmp_path.iterdir()
    expected = {name: values.tolist() for name, values in seen._asdict().items()}
    assert json.loads(path.read_text())["attention"] == {"attention": expected}
    assert net.quiet.stats is None
    net.attention(x, x, x)  # weights instead
    assert net.attention.stats is None


# --- masks of other kinds, and none of anything ------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_torchs_causal_biases_say_what_they_say_to_torchs_attention(
    heads, batch, make, sizes, options
):
    rows, keys = sizes
    theirs, ours = twins(8, heads, batch_first=True, **options)
    query, key = draw(batch, rows, 8, seed=0), draw(batch, keys, 8, seed=1)
    shift = keys - rows if make is causal_lower_right else 0
    hidden = ~torch.ones(rows, keys, dtype=torch.bool).tril(shift)
    for need_weights in (False, True):
        call = {"need_weights": need_weights}
        got, _ = ours(query, key, key, attn_mask=make(rows, keys), **call)
        expected, _ = ours(query, key, key, attn_mask=hidden, **call)
        torch.testing.assert_close(got, expected)
    if rows <= keys or make is causal_upper_left or options:  # or rows see no key: NaN in torch
        torch.testing.assert_close(got, theirs(query, key, key, attn_mask=hidden)[0])


def test_torchs_causal_biases_that_do_not_fit_are_refused():
    x = draw(1, 5, 8, seed=0).float()
    attention = ClampedMultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"CausalBias of \(4, 4\), and \(T, S\) is \(5, 5\)"):
        attention(x, x, x, attn_mask=causal_upper_left(4, 4))
    with pytest.raises(ValueError, match="leave is_causal out"):
        attention(x, x, x, attn_mask=causal_upper_left(5, 5), is_causal=True)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((2, 2), bool), TypeError, "{} must be a torch.Tensor, got numpy.ndarray: torch."),
        ([[False] * 2] * 2, TypeError, "{} must be a torch.Tensor, got builtins.list"),
        (torch.zeros(2, 2).to_sparse(), ValueError, "{} must be a dense tensor, got torch.sparse"),
        (torch.nested.nested_tensor([torch.zeros(2)] * 2), ValueError, "{} must be .* got nested"),
        (MaskedTensor(torch.zeros(2, 2), torch.ones(2, 2) > 0), ValueError, "{}.* got MaskedTens"),
    ],
    ids=["numpy", "list", "sparse", "nested", "masked"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of")
def test_what_is_no_mask_is_named(name, mask, error, message):
    x = torch.zeros(2, 2, 8)
    with pytest.raises(error, match=message.format(name)):
        ClampedMultiheadAttention(8, 2)(x, x, x, **{name: mask})
    with pytest.raises(error, match=message.format(name)):
        clamped_attention(*[x.view(2, 2, 2, 4)] * 3, **{name: mask})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize(
    "options", [{}, {"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": 3, "vdim": 5}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_no_rows_and_no_keys_are_as_torchs(need_weights, sizes, options, masked):
    rows, keys = sizes
    theirs, ours = twins(8, 2, **options)
    query = draw(rows, 2, 8, seed=0)
    key, value = draw(keys, 2, theirs.kdim, seed=1), draw(keys, 2, theirs.vdim, seed=2)
    call = {"need_weights": need_weights}
    appended = options.get("add_zero_attn") or options.get("add_bias_kv")
    if masked and (keys or need_weights or appended):  # torch's view of others is ambiguous to it
        call["key_padding_mask"] = torch.zeros(2, keys, dtype=torch.bool)
        call["attn_mask"] = torch.zeros(rows, keys, dtype=torch.bool)
    found = []
    for attention in (theirs, ours):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output, weights = attention(*inputs, **call)
        output.square().sum().backward()
        grads = [p.grad for p in (*inputs, *attention.parameters())]
        found.append((output, weights, [torch.zeros(()) if g is None else g for g in grads]))
    (output, weights, grads), (got, got_weights, got_grads) = found
    torch.testing.assert_close(got, output)
    torch.testing.assert_close(got_weights, weights)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a.expand_as(b), b.expand_as(a))


def test_statistics_of_no_rows_and_of_no_keys():
    for rows, keys in ((0, 3), (3, 0)):
        query, key = torch.ones(2, 4, rows, 8), torch.ones(2, 4, keys, 8)
        output, stats = clamped_attention(query, key, key, return_stats=True)
        assert output.shape == (2, 4, rows, 8) and not output.any()
        assert stats.max_logit.tolist() == [-INF] * 4 and stats.entropy.isnan().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_heads_wider_than_the_kernels(need_weights):
    theirs, ours = twins(2 * 264, 2, batch_first=True)
    x = draw(2, 9, 528, seed=0)
    mask = length_mask([9, 4], 9)
    for call in ({}, {"key_padding_mask": mask}, {"is_causal": True}):
        given = call | (
            {"attn_mask": torch.ones(9, 9).triu(1).bool()} if call == {"is_causal": True} else {}
        )
        expected = results(theirs, (x, x, x), need_weights=need_weights, **given)
        for a, b in zip(
            results(ours, (x, x, x), need_weights=need_weights, **call), expected, strict=True
        ):
            torch.testing.assert_close(a, b)
    ours.clamp = 1e-3
    output, _ = ours(x, x, x, need_weights=need_weights)
    assert (output - ours.out_proj.bias).abs().max() <= 1e-3 * 528 * 0.4


def test_vmap_leaves_no_statistics_behind():
    attention = ClampedMultiheadAttention(8, 2, batch_first=True, record_stats=True)
    x = torch.randn(3, 2, 5, 8)
    with torch.no_grad():
        attention(x[0], x[0], x[0], need_weights=False)
        got = torch.vmap(lambda x: attention(x, x, x, need_weights=False)[0])(x)
        assert attention.stats is None
        for each, output in zip(x, got, strict=True):
            torch.testing.assert_close(output, attention(each, each, each, need_weights=False)[0])
    assert attention.stats.entropy.shape == (2,)


# --- what traces, scripts and exports models -----------------------------------------------------


class Block(nn.Module):
    """A model with attention in it, and other modules around."""

    def __init__(self, attention):
        super().__init__()
        self.before, self.attention = nn.Linear(8, 8), attention

    def forward(self, x):
        x = self.before(x)
        return self.attention(x, x, x)[0] + x


@pytest.mark.parametrize("make", [nn.MultiheadAttention, ClampedMultiheadAttention])
def test_fx_traces_a_call_of_the_module(make):
    block = Block(make(8, 2, batch_first=True)).eval()
    traced = fx.symbolic_trace(block)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [
        "before",
        "attention",
    ]
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(traced(x), block(x))
    assert type(traced.attention) is make


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 3, "vdim": 5}],
)
@pytest.mark.parametrize("bounds", [{}, {"clamp": 0.05, "softcap": 0.5}])
@pytest.mark.parametrize("masks", ["none", "bool", "added", "causal"])
def test_torchscript_compiles_a_twin(batch_first, options, bounds, masks):
    _, ours = twins(8, 2, batch_first=batch_first, **options)
    for name, value in bounds.items():
        setattr(ours, name, value)
    scripted = torch.jit.script(ours.eval())
    assert list(scripted.state_dict()) == list(ours.state_dict())
    query, key, value = (
        draw(2, 7, 8, seed=0),
        draw(2, 5, ours.kdim, seed=1),
        draw(2, 5, ours.vdim, seed=2),
    )
    key[1, 3:] = NAN  # padded below, or not
    if masks in ("none", "causal"):
        key[1, 3:] = 0.0
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    call = {"is_causal": True} if masks == "causal" else {}
    if masks in ("bool", "added"):
        padding, hidden = length_mask([5, 3], 5), draw(4, 7, 5, seed=3) > 1
        as_given = as_float if masks == "added" else torch.clone
        call = {"key_padding_mask": as_given(padding), "attn_mask": as_given(hidden)}
    for more in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        got, expected = (f(query, key, value, **call, **more) for f in (scripted, ours))
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
    if masks == "none" and not options.get("kdim"):
        got, expected = (f(query[0], query[0], query[0]) for f in (scripted, ours))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [True, False])
def test_torchscript_of_an_encoder_clamps(training):
    _, layer = encoder_layers(clamp=1e-6)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    scripted = torch.jit.script(encoder)
    x, mask = draw(2, 7, 24, seed=0, dtype=torch.float32), length_mask([7, 3], 7)
    with torch.no_grad():
        torch.testing.assert_close(
            scripted(x, src_key_padding_mask=mask), encoder(x, src_key_padding_mask=mask)
        )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_runs_without_fastguard():
    block = Block(ClampedMultiheadAttention(8, 2, batch_first=True, clamp=0.01)).eval()
    x = torch.randn(2, 5, 8)
    traced = torch.jit.trace(block, x)
    assert "fastguard::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), block(x))
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))
