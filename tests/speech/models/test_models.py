"""Both models: size, lengths, and that padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastguard.speech.models import build_model, count_weight_layers
from fastguard.speech.models.layers import MaskedBatchNorm1d
from fastguard.stable_init import stable_init_

N_MELS = 7
SMALL = {
    "baseline": {"channels": 16, "kernel_size": 5, "num_layers": 2},
    "teacher": {"d_model": 16, "num_heads": 2, "num_blocks": 2, "kernel_size": 5},
}
both_models = pytest.mark.parametrize("name", ["baseline", "teacher"])


def small(name: str, seed: int = 0, **overrides) -> nn.Module:
    """A model in which padding would show: no normalisation is left at weight 1, bias 0."""
    torch.manual_seed(seed)
    model = build_model(name, **{"n_mels": N_MELS, "vocab_size": 6, **SMALL[name], **overrides})
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, MaskedBatchNorm1d)):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-1.0, 1.0)
        if isinstance(module, MaskedBatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


def utterances(lengths: list[int], n_mels: int = N_MELS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randn(n, n_mels, generator=generator) for n in lengths]


def batch(items: list[Tensor], extra: int = 0, garbage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features (B, T + extra, n_mels) padded with `garbage`, and lengths (B,)."""
    lengths = torch.tensor([len(item) for item in items])
    features = torch.full((len(items), int(lengths.max()) + extra, items[0].size(1)), garbage)
    for row, item in zip(features, items, strict=True):
        row[: len(item)] = item
    return features, lengths


def ctc_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
    targets = torch.arange(len(lengths))[:, None] % 5 + 1
    ones = torch.ones_like(lengths)
    total = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, ones, reduction="sum")
    return total / lengths.sum()


def training_step(model: nn.Module, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one step, by name."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = ctc_loss(*model(features, lengths))
    loss.backward()
    gradients = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize(
    ("name", "least", "most", "layers"),
    [("baseline", 15.7e6 * 0.99, 15.7e6 * 1.01, 20), ("teacher", 40e6, 50e6, 111)],
)
def test_full_size(name, least, most, layers):
    torch.manual_seed(0)
    model = build_model(name).eval()
    assert least <= sum(p.numel() for p in model.parameters()) <= most
    assert count_weight_layers(model) == layers
    items = utterances([121, 48, 85], n_mels=80)
    with torch.no_grad():
        log_probs, lengths = model(*batch(items, extra=9, garbage=math.nan))
        assert log_probs.shape == (3, 33, 29)
        for row, length, item in zip(log_probs, lengths, items, strict=True):
            alone, _ = model(*batch([item]))
            torch.testing.assert_close(row[:length], alone[0], atol=2e-5, rtol=0)


@both_models
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    extra=st.integers(0, 9),
    garbage=st.sampled_from([0.0, 1e30, math.nan, -math.inf]),
)
def test_alone_and_in_a_batch_score_the_same(name, lengths, extra, garbage):
    model = small(name).eval()
    items = utterances(lengths)
    log_probs, output_lengths = model(*batch(items, extra, garbage))
    assert log_probs.isfinite().all()
    assert output_lengths.tolist() == [math.ceil(n / 4) for n in lengths]
    for row, length, item in zip(log_probs, output_lengths, items, strict=True):
        alone, alone_length = model(*batch([item]))
        assert alone_length.item() == alone.size(1) == length
        torch.testing.assert_close(row[:length], alone[0], atol=1e-5, rtol=0)


@both_models
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_garbage_in_the_padding_changes_no_bit(name, training, garbage):
    items = utterances([33, 12, 25])
    clean = training_step(small(name).train(training), *batch(items, extra=8))
    dirty = training_step(small(name).train(training), *batch(items, extra=8, garbage=garbage))
    for key, expected in clean.items():
        assert torch.equal(dirty[key], expected), key


@both_models
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("extra", [1, 50])
def test_amount_of_padding_does_not_change_a_training_step(name, dropout, extra):
    items = utterances([33, 12, 25])
    tight = training_step(small(name, dropout=dropout), *batch(items))
    loose = training_step(small(name, dropout=dropout), *batch(items, extra))
    for key, expected in tight.items():
        torch.testing.assert_close(
            loose[key], expected, atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@both_models
def test_every_parameter_learns(name):
    step = training_step(small(name, dropout=0.0), *batch(utterances([33, 12, 25])))
    for key, gradient in step.items():
        if key.startswith("grad of"):
            assert gradient.abs().max() > 0, key


@both_models
def test_dropout_acts_in_training_only(name):
    features, lengths = batch(utterances([33, 12]))
    for training in (True, False):
        without, half = (
            small(name, dropout=p).train(training)(features, lengths)[0] for p in (0.0, 0.5)
        )
        assert torch.equal(without, half) is not training


def test_residual_convolution_is_in_pre_activation_order():
    layer = small("baseline").layers[0].eval()
    x, mask = torch.randn(2, 16, 5), torch.zeros(2, 5, dtype=torch.bool)
    expected = x + layer.conv(F.silu(layer.norm(x, mask)))
    torch.testing.assert_close(layer(x, mask), expected)


def test_conformer_block_is_equation_1_of_the_paper():
    block = small("teacher").blocks[0].eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    expected = x
    for branch, norm, factor in (
        (block.feed_forward1, block.feed_forward1.norm, 0.5),
        (lambda y: block.attention(y, y, y)[0], block.attention_norm, 1.0),
        (lambda y: block.convolution(y, mask), block.convolution.layer_norm, 1.0),
        (block.feed_forward2, block.feed_forward2.norm, 0.5),
    ):
        normed = F.layer_norm(expected, (16,), norm.weight, norm.bias)
        expected = expected + factor * branch(normed)
    expected = F.layer_norm(expected, (16,), block.norm.weight, block.norm.bias)
    torch.testing.assert_close(block(x, mask), expected)


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_log_probs_and_finite_gradients(name, dtype):
    features, lengths = batch(utterances([33, 12]))
    expected, _ = small(name, dropout=0.0)(features, lengths)
    model = small(name, dropout=0.0)
    with torch.autocast("cpu", dtype):
        log_probs, output_lengths = model(features, lengths)
    assert log_probs.dtype == torch.float32
    assert log_probs.logsumexp(-1).abs().max() < 1e-5
    for row, reference, length in zip(log_probs, expected, output_lengths, strict=True):
        torch.testing.assert_close(row[:length], reference[:length], atol=0.1, rtol=0)
    ctc_loss(log_probs, output_lengths).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@both_models
def test_nothing_waits_for_the_device(name):
    """The meta device has no values to read: an `item()` or a boolean index raises there."""
    model = small(name).to("meta")
    lengths = torch.tensor([33, 12], device="meta")
    log_probs, output_lengths = model(torch.zeros(2, 33, N_MELS, device="meta"), lengths)
    assert log_probs.shape == (2, 9, 6)
    assert output_lengths.device.type == "meta"
    log_probs.sum().backward()


@both_models
def test_same_seed_same_model_and_step(name):
    features, lengths = batch(utterances([33, 12]))
    first, second, other = (
        training_step(small(name, seed), features, lengths) for seed in (0, 0, 5)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["loss"], other["loss"])


@both_models
def test_output_lengths_of_ints_and_tensors(name):
    model = small(name)
    assert [model.output_lengths(n) for n in (1, 4, 5, 8, 9, 200)] == [1, 1, 2, 2, 3, 50]
    assert model.output_lengths(torch.tensor([1, 5, 200])).tolist() == [1, 2, 50]


@both_models
def test_one_batch_can_be_learnt(name):
    features, lengths = batch(utterances([40, 24]))
    model = small(name, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(ctc_loss(*model(features, lengths)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@both_models
def test_stable_init_starts_from_a_uniform_guess(name):
    model = stable_init_(small(name))
    log_probs, _ = model(*batch(utterances([33, 12])))
    torch.testing.assert_close(
        log_probs.exp(), torch.full_like(log_probs, 1 / 6), atol=0.02, rtol=0
    )


def test_teacher_clamps_its_attention():
    bounds = [block.attention.clamp for block in small("teacher").blocks]
    assert bounds == [10.0, 10.0]
    features, lengths = batch(utterances([33, 12]))
    free, far, near = (
        small("teacher", attention_clamp=clamp).eval()(features, lengths)[0]
        for clamp in (None, 10.0, 1e-3)
    )
    assert torch.equal(free, far)
    assert not torch.allclose(free, near)


def test_teacher_knows_the_order_of_frames():
    # Attention does not: without the taps of the depthwise convolutions, frames in another order
    # would have the same log-probabilities in that order.
    block = small("teacher").eval().blocks[0]
    frames, padding_mask = torch.randn(1, 20, 16), torch.zeros(1, 20, dtype=torch.bool)
    order = torch.randperm(20)

    def difference(block):
        reordered = block(frames[:, order], padding_mask)
        return (reordered - block(frames, padding_mask)[:, order]).abs().max().item()

    assert difference(block) > 0.01
    block.convolution.depthwise.weight.data[:, :, [0, 1, 3, 4]] = 0
    assert difference(block) < 1e-5


@both_models
@pytest.mark.parametrize("lengths", [[33, 0], [34, 12], [-1, 33]])
def test_impossible_lengths_are_named(name, lengths):
    wrong = {i: n for i, n in enumerate(lengths) if not 1 <= n <= 33}
    with pytest.raises(ValueError, match=rf"\[1, 33\], got .*{wrong}: drop empty"):
        small(name)(torch.zeros(2, 33, N_MELS), torch.tensor(lengths))


@both_models
def test_wrong_shapes_are_named(name):
    model = small(name)
    with pytest.raises(ValueError, match=rf"\(B, T, {N_MELS}\), got \(2, {N_MELS}, 33\)"):
        model(torch.zeros(2, N_MELS, 33), torch.tensor([33, 12]))
    for lengths in (torch.tensor([33]), torch.tensor([1.0, 0.5])):
        with pytest.raises(ValueError, match=r"integers of shape \(2,\), got torch\."):
            model(torch.zeros(2, 33, N_MELS), lengths)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'student'.*\['baseline', 'teacher'\]"):
        build_model("student")
    with pytest.raises(ValueError, match=r"\['chanels'\].*'channels'.*'num_layers'"):
        build_model("baseline", chanels=8)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("baseline", {"kernel_size": 4}, "odd and positive, got 4: with 5"),
        ("teacher", {"kernel_size": 30}, "odd and positive, got 30: with 31"),
        ("teacher", {"num_heads": 7}, "d_model=16, num_heads=7"),
        ("teacher", {"num_heads": 0}, "d_model=16, num_heads=0"),
        ("teacher", {"attention_clamp": 0.0}, "got 0.0: pass None"),
        ("baseline", {"dropout": 1.5}, "1.5"),
        ("teacher", {"dropout": 1.5}, "1.5"),
    ],
)
def test_impossible_settings_are_named(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        small(name, **overrides)
