"""ClampedMultiheadAttention against torch's MultiheadAttention."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastguard import GradGuard
from fastguard.attention import clamped_attention
from fastguard.attention import module as multihead
from fastguard.attention.functional import attended
from fastguard.attention.module import ClampedMultiheadAttention

from .cases import INF, TORCHS_WARNINGS, as_float, assert_same, draw, length_mask, results, twins

pytestmark = TORCHS_WARNINGS

#: Largest difference from torch's, relative to the largest element of the outputs or gradients, or
#: to 1 if that is larger: gradients of few channels are differences of what is close to 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


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


@pytest.mark.parametrize("shape", [(4, 2, 24), (4, 24)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_are_views_of_one_gemm(monkeypatch, shape, batch_first):
    seen = []

    def spy(*heads, **options):
        seen.extend(heads)
        return attended(*heads, **options)

    monkeypatch.setattr(multihead, "attended", spy)
    _, ours = twins(24, 3, batch_first=batch_first)
    x = draw(*shape, seed=0)
    ours(x, x, x, need_weights=False)
    assert len(seen) == 3 and len({head.untyped_storage().data_ptr() for head in seen}) == 1
    assert all(head.stride(3) == 1 and head.shape[1::2] == (3, 8) for head in seen)


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
