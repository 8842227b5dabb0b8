"""ClampedMultiheadAttention in torch's encoder layers, whose fast paths must not pass it by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastguard.attention.module import ClampedMultiheadAttention
from fastguard.attention.replacement import replace_attention_

from .cases import TORCHS_WARNINGS, draw, encoder_layers, length_mask, twins

pytestmark = TORCHS_WARNINGS


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
@pytest.mark.parametrize("lengths", [[3, 2], [5], [0, 4], [0, 0]])
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
            ours(nested, nested.clone(), nested, need_weights=False)
        with pytest.raises(AssertionError, match=r"without masks"):
            ours(nested, nested, nested, attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("lengths", [[3, 2], [5], [4, 4, 1]])
def test_the_weights_of_a_nested_tensor_are_padded_as_torchs(average, lengths):
    theirs, ours = twins(24, 4, batch_first=True, dtype=torch.float32)
    nested = torch.nested.nested_tensor([draw(n, 24, seed=n).float() for n in lengths])
    with torch.no_grad():
        call = {"average_attn_weights": average}
        got, weights = ours.eval()(nested, nested, nested, **call)
        expected, torchs = theirs.eval()(nested, nested, nested, **call)
    torch.testing.assert_close(weights, torchs)
    for one, other in zip(got.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_nested_tensor_of_another_width_is_refused():
    ours = ClampedMultiheadAttention(24, 4, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.zeros(3, 20), torch.zeros(2, 20)])
    with torch.no_grad(), pytest.raises(AssertionError, match=r"got \(2, 3, 20\)"):
        ours(nested, nested, nested, need_weights=False)


def test_a_nested_tensor_of_no_sequences_is_refused():
    ours = ClampedMultiheadAttention(24, 4, batch_first=True).eval()
    nested = torch.nested.nested_tensor([])
    with torch.no_grad(), pytest.raises(AssertionError, match="of at least one sequence"):
        ours(nested, nested, nested, need_weights=False)
    with torch.no_grad(), pytest.raises(AssertionError, match="does not support NestedTensor"):
        nn.MultiheadAttention(24, 4, batch_first=True).eval()(nested, nested, nested)
