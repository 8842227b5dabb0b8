"""PEFT's adapters on attention, put on before and after `replace_attention_`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastguard import replace_attention_, unused_attention

from .cases import draw

peft = pytest.importorskip("peft")

ORDERS = ["before", "after"]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def adapted(order: str | None, clamp: float | None, target: str = "self_attn", **options):
    """An encoder with LoRA; attention is replaced before or after, or (None) not at all."""
    model = encoder()
    if order == "before":
        replace_attention_(model, clamp=clamp)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    if order == "after":
        assert len(replace_attention_(model, clamp=clamp).replaced) == 2
    return model


def values_and_gradients(model: nn.Module, x: torch.Tensor):
    output = model(x)
    output.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads


@pytest.fixture
def no_fast_path():
    """Stock attention with an adapter, in evaluation, is wrong in torch's fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_lora_is_stocks_and_only_adapters_get_gradients(order, training):
    x = draw(2, 5, 8, seed=0).float()
    stock, ours = adapted(None, None).train(training), adapted(order, None).train(training)
    (expected, grads), (got, our_grads) = (values_and_gradients(m, x) for m in (stock, ours))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(our_grads, grads)
    assert our_grads and all("lora_" in name for name in our_grads)
    assert unused_attention(ours) == []
    with torch.no_grad(), ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("order", ORDERS)
def test_the_fast_path_does_not_pass_an_adapter_by(order):
    x = draw(2, 5, 8, seed=0).float()
    ours = adapted(order, None).eval()
    with torch.no_grad():
        assert (ours(x) - encoder().eval()(x)).abs().max() > 0.1
        torch.testing.assert_close(ours(x), copy.deepcopy(ours).merge_and_unload()(x))


@pytest.mark.parametrize("order", ORDERS)
def test_the_clamp_acts_merged_and_not(order):
    x = draw(2, 5, 8, seed=0).float()
    ours, free = adapted(order, 1e-3).eval(), adapted(order, None).eval()
    expected = ours(x)
    assert (expected - free(x)).abs().max() > 0.1
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), expected)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    clamps = [layer.self_attn.clamp for layer in merged.layers]
    assert clamps == [1e-3, 1e-3]


@pytest.mark.parametrize("order", ORDERS)
def test_saved_adapters_load_into_either_order(order, tmp_path):
    x = draw(2, 5, 8, seed=0).float()
    ours = adapted(order, 1e-3).eval()
    ours.save_pretrained(tmp_path)
    for other in ORDERS:
        model = encoder()
        if other == "before":
            replace_attention_(model, clamp=1e-3)
        model = peft.PeftModel.from_pretrained(model, tmp_path)
        if other == "after":
            replace_attention_(model, clamp=1e-3)
        torch.testing.assert_close(model.eval()(x), ours(x))


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_of_the_output_projection_alone_takes_part(order):
    """Stock attention reads the projection's weight, and the adapter does nothing."""
    x = draw(2, 5, 8, seed=0).float()
    stock, ours = adapted(None, None, "out_proj"), adapted(order, None, "out_proj")
    torch.testing.assert_close(stock(x), encoder()(x))
    assert (ours(x) - stock(x)).abs().max() > 0.1
    torch.testing.assert_close(ours(x), copy.deepcopy(ours).merge_and_unload()(x))
    _, grads = values_and_gradients(ours, x)
    assert grads and all("lora_" in name for name in grads)


def test_dora_of_attention_is_refused_as_stocks():
    for replaced in (False, True):
        model = encoder()
        if replaced:
            replace_attention_(model)
        with pytest.raises(ValueError, match="MultiheadAttention does not support DoRA"):
            config = peft.LoraConfig(target_modules=["self_attn"], use_dora=True)
            peft.get_peft_model(model, config)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_that_is_trained_in_full_is_clamped(order):
    """`modules_to_save` trains a copy of the module; the original rests."""

    def trained(order, clamp):
        model = encoder()
        if order == "before":
            replace_attention_(model, clamp=clamp)
        torch.manual_seed(1)
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["linear1"], modules_to_save=["self_attn"])
        )
        if order == "after":
            assert len(replace_attention_(model, clamp=clamp).replaced) == 4
        return model

    x = draw(2, 5, 8, seed=0).float()
    (expected, grads), (got, our_grads) = (
        values_and_gradients(trained(which, None), x) for which in (None, order)
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(our_grads, grads)
    clamped = trained(order, 1e-3).eval()
    with torch.no_grad():
        assert (clamped(x) - expected).abs().max() > 0.1
    layers = [f"base_model.model.layers.{i}.self_attn.original_module" for i in range(2)]
    assert unused_attention(clamped) == layers
