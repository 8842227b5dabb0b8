"""The masks of ClampedMultiheadAttention: each kind, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.masked import MaskedTensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastguard.attention import clamped_attention
from fastguard.attention.module import ClampedMultiheadAttention

from .cases import (
    INF,
    NAN,
    TORCHS_WARNINGS,
    as_float,
    assert_same,
    draw,
    length_mask,
    results,
    twins,
)

pytestmark = TORCHS_WARNINGS


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp": 0.0}, "got 0.0: pass None"),
        ({"clamp": NAN}, "got nan: pass None"),
        ({"softcap": -1.0}, "got -1.0: pass None"),
        ({"dropout": 1.5}, r"\[0, 1\), got 1.5"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClampedMultiheadAttention(**{"embed_dim": 8, "num_heads": 2} | options)


@pytest.mark.parametrize("sizes", [(8, -2), (8, 0), (0, 2), (-8, 2), (8, 3), (8, 16)])
def test_impossible_sizes_are_named_in_an_error_of_torchs_type(sizes):
    with pytest.raises((ValueError, AssertionError)) as torchs:
        nn.MultiheadAttention(*sizes)
    with pytest.raises(torchs.type, match="embed_dim={}, num_heads={}".format(*sizes)) as caught:
        ClampedMultiheadAttention(*sizes)
    assert caught.type is torchs.type


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
        (("attn_mask", (5,), BOOL), AssertionError, r"got \(5,\)"),
        (("attn_mask", (1, 4, 7, 5), BOOL), AssertionError, r"got \(1, 4, 7, 5\)"),
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


@pytest.mark.parametrize("shape", [(7,), (7, 6), (3, 7, 7), (1, 2, 7, 7)])
def test_unbatched_masks_of_other_shapes_raise_torchs_type_of_error(shape):
    x, mask = torch.zeros(7, 8), torch.zeros(shape, dtype=BOOL)
    with pytest.raises((AssertionError, RuntimeError)) as torchs:
        nn.MultiheadAttention(8, 2)(x, x, x, attn_mask=mask)
    with pytest.raises(torchs.type, match=r"attn_mask must be of shape .* got ") as caught:
        ClampedMultiheadAttention(8, 2)(x, x, x, attn_mask=mask)
    assert caught.type is torchs.type


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
