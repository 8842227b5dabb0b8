"""Masked batch normalisation against loops over valid frames, and the small layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastguard.speech.models.layers import (
    MaskedBatchNorm1d,
    StridedConv1d,
    Subsampling,
    subsampled,
)
from fastguard.speech.models.teacher import ChannelDropout, GatedDepthwiseConv1d

CHANNELS = 3


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def length_mask(lengths: list[int], frames: int) -> Tensor:
    return torch.arange(frames) >= torch.tensor(lengths)[:, None]


def norm_with_history(dtype=torch.float64) -> MaskedBatchNorm1d:
    norm = MaskedBatchNorm1d(CHANNELS).to(dtype)
    norm.weight.data.copy_(torch.tensor([0.5, -1.5, 2.0]))
    norm.bias.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    norm.running_mean.copy_(torch.tensor([1.0, -1.0, 0.5]))
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.5]))
    return norm


def slow_batch_norm(norm, x: Tensor, lengths: list[int]):
    """Ioffe and Szegedy's algorithm 1 over a Python list of frames, in float64."""
    frames = torch.stack([x[b, :, t].double() for b, n in enumerate(lengths) for t in range(n)])
    mean = sum(frames) / len(frames)
    var = sum((frame - mean) ** 2 for frame in frames) / len(frames)
    output = torch.zeros(x.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for t in range(length):
            normalised = (x[b, :, t].double() - mean) / torch.sqrt(var + norm.eps)
            output[b, :, t] = normalised * norm.weight.double() + norm.bias.double()
    unbiased = var * len(frames) / (len(frames) - 1)
    return (
        output,
        0.9 * norm.running_mean.double() + 0.1 * mean.detach(),
        0.9 * norm.running_var.double() + 0.1 * unbiased.detach(),
    )


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(2, 8),
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    garbage=st.sampled_from([0.0, 1e30, math.nan, math.inf]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_training_step_matches_loops(frames, lengths, garbage, channels_last, seed):
    lengths = [min(n, frames) for n in lengths]
    lengths[0] = max(lengths[0], 2)
    mask = length_mask(lengths, frames)
    x = random(len(lengths), CHANNELS, frames, seed=seed)
    x = x.masked_fill(mask[:, None, :], garbage)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    upstream = random(*x.shape, seed=seed + 1).masked_fill(mask[:, None, :], 0.0)

    norm = norm_with_history()
    expected, running_mean, running_var = slow_batch_norm(norm, x, lengths)
    output = norm(x, mask)
    torch.testing.assert_close(output.masked_fill(mask[:, None, :], 0.0), expected)
    torch.testing.assert_close(norm.running_mean, running_mean)
    torch.testing.assert_close(norm.running_var, running_var)
    assert norm.num_batches_tracked == 1
    leaves = (x, norm.weight, norm.bias)
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
    )


@pytest.mark.parametrize("training", [True, False])
def test_without_padding_it_is_batch_norm(training):
    theirs = nn.BatchNorm1d(CHANNELS).double().train(training)
    theirs.load_state_dict(norm_with_history().state_dict())
    ours = MaskedBatchNorm1d(CHANNELS).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    x = (3 + random(2, CHANNELS, 5)).requires_grad_()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for _ in range(3):
        results = []
        for norm, arguments in ((theirs, (x,)), (ours, (x, mask))):
            output = norm(*arguments)
            leaves = (x, norm.weight, norm.bias)
            results.append((output, torch.autograd.grad(output.pow(3).sum(), leaves)))
        torch.testing.assert_close(results[1], results[0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_variance_survives_a_large_mean():
    # At 1e4 float32 resolves squares to 8: E[x^2] - E[x]^2 could not tell 1 from 9.
    x = 1e4 + random(4, CHANNELS, 50)
    mask = length_mask([50, 40, 3, 20], 50)
    norm = norm_with_history()
    expected, _, running_var = slow_batch_norm(norm, x.float(), [50, 40, 3, 20])
    norm = norm_with_history(torch.float32)
    output = norm(x.float(), mask).masked_fill(mask[:, None, :], 0.0)
    torch.testing.assert_close(output.double(), expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(norm.running_var.double(), running_var, atol=0, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_under_autocast(dtype):
    x = (5 + random(2, CHANNELS, 100)).to(dtype)
    mask = length_mask([100, 60], 100)
    _, running_mean, running_var = slow_batch_norm(norm_with_history(), x, [100, 60])
    norm = norm_with_history(torch.float32)
    with torch.autocast("cpu", dtype):
        output = norm(x, mask)
    assert output.dtype == dtype
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean.double(), running_mean, atol=0, rtol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), running_var, atol=0, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[1, 0], [0, 0]])
def test_fewer_than_two_valid_frames_use_the_running_statistics(lengths):
    mask = length_mask(lengths, 4)
    norm = norm_with_history()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = random(2, CHANNELS, 4).masked_fill(mask[:, None, :], math.nan).requires_grad_()
    output = norm(x, mask)
    torch.testing.assert_close(norm.state_dict(), before, atol=0, rtol=0)
    assert torch.equal(output, norm.eval()(x, mask))
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.sum(), (x, norm.weight, norm.bias)):
        assert gradient.isfinite().all()


def test_nan_in_a_valid_frame_is_not_hidden():
    x = random(2, CHANNELS, 4)
    x[1, 2, 0] = math.nan
    norm = norm_with_history()
    output = norm(x, length_mask([4, 2], 4))
    assert output[:, 2].isnan().all()
    assert output[:, :2].isfinite().all()
    assert norm.running_mean.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("frames", [*range(1, 14), 200])
def test_subsampled_is_the_length_that_comes_out(frames):
    front_end = Subsampling(2, 4, kernel_size=5).eval()
    x, mask = front_end(torch.zeros(1, frames, 2), torch.zeros(1, frames, dtype=torch.bool))
    assert x.size(1) == mask.size(1) == subsampled(frames) == math.ceil(math.ceil(frames / 2) / 2)


@given(frames=st.integers(1, 60), data=st.data())
def test_subsampled_mask_follows_the_lengths(frames, data):
    lengths = data.draw(st.lists(st.integers(1, frames), min_size=1, max_size=4))
    mask = length_mask(lengths, frames)
    _, after = Subsampling(2, 4, kernel_size=3)(torch.zeros(len(lengths), frames, 2), mask)
    assert torch.equal((~after).sum(1), subsampled(torch.tensor(lengths)))


@pytest.mark.parametrize("kernel_size", [1, 5, 31])
def test_gated_depthwise_convolution_is_conv1d_with_groups(kernel_size):
    ours = GatedDepthwiseConv1d(6, kernel_size).double()
    theirs = nn.Conv1d(6, 6, kernel_size, padding="same", groups=6, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x, mask = random(2, 9, 12).requires_grad_(), length_mask([9, 4], 9)
    output = ours(x, mask)
    gated = F.glu(x, dim=-1).masked_fill(mask[:, :, None], 0.0)
    expected = theirs(gated.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), (x, ours.weight)),
        torch.autograd.grad(expected.square().sum(), (x, theirs.weight)),
    )


@pytest.mark.parametrize("kernel_size", [1, 5])
@pytest.mark.parametrize("frames", [1, 2, 9, 10])
def test_strided_convolution_is_conv1d(kernel_size, frames):
    ours = StridedConv1d(6, 4, kernel_size).double()
    x = random(2, frames, 6).requires_grad_()
    output = ours(x)
    expected = F.conv1d(x.transpose(1, 2), ours.weight, stride=2, padding=kernel_size // 2)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), (x, ours.weight)),
        torch.autograd.grad(expected.square().sum(), (x, ours.weight)),
    )


def test_channel_dropout_draws_what_dropout1d_draws():
    x = random(3, 40, 50, dtype=torch.float32)
    dropout = ChannelDropout(0.3)
    torch.manual_seed(0)
    expected = F.dropout1d(x.transpose(1, 2), 0.3).transpose(1, 2)
    torch.manual_seed(0)
    torch.testing.assert_close(x * dropout(x)[:, None, :], expected)
    assert dropout.eval()(x) is None
    assert not ChannelDropout(1.0)(x).any()
