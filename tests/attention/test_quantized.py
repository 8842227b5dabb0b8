"""Attention and torch's quantization: what works does, and what cannot is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fastguard import replace_attention_

from .cases import TORCHS_WARNINGS, draw

pytestmark = [
    *TORCHS_WARNINGS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quant:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*observer:UserWarning"),
]

#: Largest difference that 8 bits made below, of outputs around 1.
ROUNDING = 0.05


class Model(nn.Module):
    """Attention between linear layers, and the stubs of eager quantization around it."""

    def __init__(self, attention_in_float: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention_in_float = attention_in_float
        self.out, self.back = quantization.DeQuantStub(), quantization.QuantStub()

    def forward(self, x):
        x = self.before(self.quant(x))
        x = self.out(x) if self.attention_in_float else x
        x = self.attention(x, x, x)[0]
        x = self.back(x) if self.attention_in_float else x
        return self.dequant(self.after(x))


def replaced(clamp, **options) -> nn.Module:
    model = Model(**options).eval()
    assert replace_attention_(model, clamp=clamp).replaced == ("attention",)
    return model


X = draw(2, 5, 8, seed=0).float()


@pytest.mark.parametrize("spec", [{nn.Linear}, {nn.Linear, nn.MultiheadAttention}, None])
def test_dynamic_quantization_leaves_attention_in_float(spec):
    """Torch's attention reads its output projection's weight, and so does not quantize it."""
    ours = quantization.quantize_dynamic(replaced(None), spec)
    stock = quantization.quantize_dynamic(Model().eval(), spec)
    assert type(ours.before) is type(stock.before) is not nn.Linear
    if spec is not None and nn.MultiheadAttention in spec:
        with pytest.raises(AttributeError, match="'function' object has no attribute 'device'"):
            stock(X)  # its projection is quantized, and its weight read all the same
        stock = quantization.quantize_dynamic(Model().eval(), {nn.Linear})
    assert type(ours.attention.out_proj) is type(stock.attention.out_proj)
    torch.testing.assert_close(ours(X), stock(X))
    clamped = quantization.quantize_dynamic(replaced(1e-3), spec)
    torch.testing.assert_close(clamped(X), replaced(1e-3)(X), rtol=0, atol=ROUNDING)
    assert (clamped(X) - stock(X)).abs().max() > 2 * ROUNDING


@pytest.mark.parametrize("inference", [torch.no_grad, torch.enable_grad])
def test_a_dynamically_quantized_encoder_runs_and_clamps(inference):
    """Stock torch raises here: its fast path takes the layer's quantized weights for tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    free = encoder(X)
    replace_attention_(encoder, clamp=1e-3)
    quantized = quantization.quantize_dynamic(encoder, {nn.Linear})
    with inference():
        torch.testing.assert_close(quantized(X), encoder(X), rtol=0, atol=ROUNDING)
        assert (quantized(X) - free).abs().max() > 2 * ROUNDING


@pytest.mark.parametrize("mask", [True, False])
def test_an_output_projection_that_is_quantized_by_hand(mask):
    """It is called, and not read."""
    ours, free = replaced(1e-3), Model().eval()
    projection = nn.Linear(8, 8)
    projection.load_state_dict(ours.attention.out_proj.state_dict())
    projection.qconfig = quantization.default_dynamic_qconfig
    quantized = copy.deepcopy(ours)
    quantized.attention.out_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(projection)
    call = {"is_causal": mask, "attn_mask": torch.ones(5, 5).triu(1).bool() if mask else None}
    got, expected, unclamped = (
        model.attention(X, X, X, **call)[0] for model in (quantized, ours, free)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    assert (got - unclamped).abs().max() > ROUNDING


def statically(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qconfig("x86")
    model = quantization.prepare(model)
    model(X)
    return quantization.convert(model)


@pytest.mark.parametrize("attention_in_float", [False, True])
def test_static_quantization_is_refused_with_a_cure_that_works(attention_in_float):
    converted = statically(replaced(1e-3, attention_in_float=attention_in_float))
    with pytest.raises(TypeError, match=r"is not quantized, got .*: set its qconfig to None"):
        converted(X)
    cured = replaced(1e-3, attention_in_float=True)
    cured.attention.qconfig = None
    got = statically(cured)(X)
    torch.testing.assert_close(got, replaced(1e-3)(X), rtol=0, atol=ROUNDING)
    assert (got - Model().eval()(X)).abs().max() > 2 * ROUNDING


def test_what_is_quantized_before_is_left_alone_by_name():
    stock = Model().eval()
    stock.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(stock)
    prepared(X)
    for kind, stock in (
        ("quantizable", prepared), ("quantized", quantization.convert(prepared))
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=rf"attention: it is a torch.ao.nn.{kind}.modules"):
            done = replace_attention_(stock)
        assert done.replaced == ()
    dynamic = quantization.quantize_dynamic(Model().eval(), {nn.Linear})
    assert replace_attention_(dynamic, clamp=1e-3).replaced == ("attention",)
    torch.testing.assert_close(dynamic(X), replaced(1e-3)(X), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_mode_quantization_leaves_attention_in_float_as_stocks(dynamic):
    if dynamic:
        mapping = quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
    else:
        mapping = quantization.get_default_qconfig_mapping("x86")

    def quantized(model):
        prepared = prepare_fx(model, mapping, (X,))
        prepared(X)
        return convert_fx(prepared)

    torch.testing.assert_close(quantized(replaced(None))(X), quantized(Model().eval())(X))
    clamped = quantized(replaced(1e-3))
    torch.testing.assert_close(clamped(X), replaced(1e-3)(X), rtol=0, atol=ROUNDING)
    assert type(clamped.attention).__name__ == "ClampedMultiheadAttention"


@pytest.mark.parametrize("config", ["Int8WeightOnly", "Int8DynamicActivationInt8Weight"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("projection", [False, True])
def test_torchaos_weights(config, order, projection):
    """By default it leaves the output projection in float; stock attention cannot do without."""
    torchao = pytest.importorskip("torchao.quantization")

    def quantized(clamp, order):
        model = Model().eval()
        if order == "before":
            replace_attention_(model, clamp=clamp)
        every = {"filter_fn": lambda module, _: isinstance(module, nn.Linear)} if projection else {}
        torchao.quantize_(model, getattr(torchao, f"{config}Config")(), **every)
        if order == "after":
            assert replace_attention_(model, clamp=clamp).replaced == ("attention",)
        return model

    stock = quantized(None, None)
    assert (type(stock.attention.out_proj.weight.data) is not torch.Tensor) is projection
    free, clamped = quantized(None, order)(X), quantized(1e-3, order)(X)
    if not projection:
        torch.testing.assert_close(free, stock(X))
    torch.testing.assert_close(free, Model().eval()(X), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(clamped, replaced(1e-3)(X), rtol=0, atol=ROUNDING)
    assert (clamped - free).abs().max() > 2 * ROUNDING


@pytest.mark.parametrize("kind, options", [
    ("Linear8bitLt", {"has_fp16_weights": False}), ("Linear4bit", {"compute_dtype": torch.float32})
])  # fmt: skip
def test_bitsandbytes_output_projection(kind, options):
    """Stock attention reads its weight, and fails on the packed numbers."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantized(model):
        projection = getattr(bitsandbytes.nn, kind)(8, 8, **options)
        projection.load_state_dict(model.attention.out_proj.state_dict())
        model.attention.out_proj = projection.to("cpu")
        return model

    with pytest.raises(RuntimeError, match="must have the same dtype, but got Float and"):
        quantized(Model().eval())(X)
    got, free = quantized(replaced(1e-3))(X), Model().eval()(X)
    torch.testing.assert_close(got, replaced(1e-3)(X), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(quantized(replaced(None))(X), free, rtol=0, atol=ROUNDING)
    assert (got - free).abs().max() > 2 * ROUNDING
