"""ClampedMultiheadAttention compiled, traced, scripted and exported."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from fastguard.attention.module import ClampedMultiheadAttention

from .cases import (
    NAN,
    TORCHS_WARNINGS,
    as_float,
    assert_same,
    draw,
    encoder_layers,
    length_mask,
    results,
    twins,
)

pytestmark = TORCHS_WARNINGS


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


def test_compiled_code_calls_the_kernel():
    """And not the reference, which exported programs hold."""
    recorder = EagerAndRecordGraphs()
    ours = ClampedMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    torch.compile(ours, fullgraph=True, backend=recorder)(x, x, x, need_weights=False)
    (graph,) = recorder.graphs
    assert "torch.ops.fastguard.attention" in graph.code and "softmax" not in graph.code
    program = torch.export.export(ours, (x, x, x), {"need_weights": False})
    assert "fastguard" not in program.graph_module.code and "softmax" in program.graph_module.code


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


def test_a_script_module_of_the_old_kind_takes_what_was_scripted():
    """One that derives from torch.jit.ScriptModule compiles what it holds without asking it."""

    class Old(torch.jit.ScriptModule):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        @torch.jit.script_method
        def forward(self, x):
            return self.attention(x, x, x)[0]

    attention = ClampedMultiheadAttention(8, 2, batch_first=True, clamp=0.01).eval()
    x = torch.randn(2, 5, 8)
    got = Old(torch.jit.script(attention))(x)
    torch.testing.assert_close(got, attention(x, x, x)[0])
