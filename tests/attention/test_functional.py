"""Clamped attention against an explicit float64 softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastguard.attention import clamped_attention, clamped_attention_and_weights

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def reference(query, key, value, key_padding_mask, scale, clamp) -> Tensor:
    """Softmax written out in the dtype of the inputs; rows without a key are zero."""
    logits = query @ key.transpose(2, 3) * (query.size(3) ** -0.5 if scale is None else scale)
    if key_padding_mask is None:
        key_padding_mask = torch.zeros(key.size(0), key.size(2), dtype=torch.bool)
    weights = (logits - logits.detach().amax()).exp()
    weights = weights.masked_fill(key_padding_mask[:, None, None, :], 0.0)
    output = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value
    if clamp is None:
        return output
    return torch.where(output.abs() < clamp, output, output.detach().clamp(-clamp, clamp))


def draw(*shape: int, seed: int, dtype=torch.float64, gain: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (gain * torch.randn(*shape, generator=generator, dtype=dtype)).requires_grad_()


def length_mask(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


@st.composite
def problems(draw_from):
    batch, heads, frames, keys, width = (
        draw_from(st.integers(1, high)) for high in (3, 3, 9, 40, 20)
    )
    lengths = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
    return {
        "shape": (batch, heads, frames, keys, width),
        "lengths": draw_from(st.none() | lengths),
        "scale": draw_from(st.sampled_from([None, 0.3])),
        "clamp": draw_from(st.sampled_from([None, 0.5, 10.0])),
        "seed": draw_from(st.integers(0, 2**31)),
    }


@settings(max_examples=80, deadline=None)
@given(problems())
def test_values_and_gradients_match_explicit_softmax(problem):
    batch, heads, frames, keys, width = problem["shape"]
    seed, scale, clamp = problem["seed"], problem["scale"], problem["clamp"]
    query = draw(batch, heads, frames, width, seed=seed)
    key = draw(batch, heads, keys, width, seed=seed + 1)
    value = draw(batch, heads, keys, width, seed=seed + 2)
    mask = None if problem["lengths"] is None else length_mask(problem["lengths"], keys)
    upstream = draw(batch, heads, frames, width, seed=seed + 3).detach()

    output = clamped_attention(query, key, value, key_padding_mask=mask, scale=scale, clamp=clamp)
    expected = reference(query, key, value, mask, scale, clamp)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_low_precision_stays_close_to_float64(dtype, tolerance):
    query, key, value = (draw(2, 3, 50, 64, seed=i).detach() for i in range(3))
    mask = length_mask([50, 31], 50)
    output = clamped_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), key_padding_mask=mask, clamp=0.2
    )
    assert output.dtype == dtype
    expected = reference(query, key, value, mask, None, 0.2)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_without_a_key_are_zero_with_finite_gradients(dropout_p):
    query, key, value = (draw(2, 2, 7, 8, seed=i, dtype=torch.float32) for i in range(3))
    output = clamped_attention(
        query, key, value, key_padding_mask=length_mask([7, 0], 7), dropout_p=dropout_p
    )
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert output[0].abs().sum() > 0
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_garbage_in_padded_keys_and_values_reaches_nothing(garbage, dropout_p):
    query, key, value = (draw(2, 2, 7, 8, seed=i, dtype=torch.float32) for i in range(3))
    mask = length_mask([5, 2], 7)

    def outputs_and_gradients(key, value):
        torch.manual_seed(0)
        output = clamped_attention(query, key, value, key_padding_mask=mask, dropout_p=dropout_p)
        return output, *torch.autograd.grad(output.square().sum(), (query, key, value))

    dirty = [x.detach().masked_fill(mask[:, None, :, None], garbage) for x in (key, value)]
    clean = outputs_and_gradients(key, value)
    for got, expected in zip(
        outputs_and_gradients(*(x.requires_grad_() for x in dirty)), clean, strict=True
    ):
        assert got.isfinite().all()
        assert torch.equal(got, expected)
    for gradient in clean[2:]:
        assert gradient.masked_select(mask[:, None, :, None]).abs().max() == 0


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_nan_in_valid_input_passes_the_clamp(clamp):
    query, key, value = (draw(1, 1, 6, 8, seed=i).detach() for i in range(3))
    value[0, 0, 3, 5] = float("nan")
    output = clamped_attention(query, key, value, clamp=clamp)
    assert output[..., 5].isnan().all()
    assert output.isnan().sum() == 6


def test_gradient_stops_at_the_bound():
    # With a single key the output is the value itself.
    values = [0.5, -1.99, 2.5, -3.0, float("inf")] + ([2.0, -2.0] if TORCH >= (2, 14) else [])
    value = torch.tensor(values).view(1, 1, 1, -1).requires_grad_()
    query = key = torch.zeros(1, 1, 1, len(values))
    output = clamped_attention(query, key, value, clamp=2.0)
    assert torch.equal(output, value.clamp(-2.0, 2.0))
    (gradient,) = torch.autograd.grad(output.sum(), value)
    assert gradient.flatten().tolist() == [1.0, 1.0] + [0.0] * (len(values) - 2)


@pytest.mark.parametrize("clamp", [0.0, -1.0, float("nan")])
def test_clamp_must_be_positive(clamp):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=rf"got {clamp}.*pass None"):
        clamped_attention(x, x, x, clamp=clamp)


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 2), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(1, 1, 2) > 0]
)
def test_mask_must_be_bool_of_batch_and_keys(mask):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"\(1, 2\), got .*True where the key is padding"):
        clamped_attention(x, x, x, key_padding_mask=mask)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_weights_are_those_of_the_output(dropout_p):
    query, key, value = (draw(2, 4, 7, 8, seed=i).detach() for i in range(3))
    options = {
        "key_padding_mask": length_mask([7, 0], 7),
        "attn_mask": torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) < 0.7,
        "is_causal": True,
        "dropout_p": dropout_p,
        "softcap": 2.0,
        "scale": 1.5,
    }
    key, value = key[:, :2], value[:, :2]  # each for two heads of the query
    torch.manual_seed(0)
    expected = clamped_attention(query, key, value, clamp=0.7, **options)
    torch.manual_seed(0)
    output, weights = clamped_attention_and_weights(query, key, value, clamp=0.7, **options)
    torch.testing.assert_close(output, expected)
    rows = weights @ value.repeat_interleave(2, dim=1)
    assert rows.abs().max() > 0.7
    torch.testing.assert_close(output, rows.clamp(-0.7, 0.7))
    sums = weights.sum(-1)
    assert torch.equal(sums[1], torch.zeros_like(sums[1]))
    if dropout_p == 0:
        seen = options["attn_mask"].tril().any(-1).expand(4, 7)
        torch.testing.assert_close(sums[0], seen.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_dtypes_under_autocast_are_those_of_torchs_attention(dtype):
    query, key, value = (draw(1, 2, 5, 8, seed=i).detach().to(dtype) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = clamped_attention(query, key, value)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("with_weights", [False, True])
def test_reference_keeps_its_precision_under_autocast(with_weights):
    query, key, value = (draw(1, 2, 30, 64, seed=i).detach().bfloat16() for i in range(3))
    attend = clamped_attention_and_weights if with_weights else clamped_attention
    expected = attend(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(query.float(), key.float(), value.float())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
