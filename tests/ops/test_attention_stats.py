"""The statistics of attention's rows and heads."""

import math

import torch

from fastguard import clamped_attention
from fastguard.ops import attention as attention_ops
from tests.native import needs_kernel
from tests.ops.attention_cases import OPS


@needs_kernel
def test_stats_follow_a_maximum_that_moves():
    key = torch.linspace(-8, 8, 300).view(1, 1, 300, 1)
    query = torch.linspace(-1, 1, 7).view(1, 1, 7, 1)
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype) for x in (query, key, key)]
        options = (None, None, None, False, 0.0, 1.0, 0.0, math.inf)
        found = OPS.attention(*inputs, *options, True, False)[2]
        wanted = attention_ops.attention_ref(*(x.double() for x in inputs), *options, True).stats
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_stats_show_a_nan():
    query, key, value = torch.randn(3, 1, 2, 3, 4)
    query[0, 0, 0] = math.nan
    _, stats = clamped_attention(query, key, value, return_stats=True)
    assert stats.max_logit.isnan().tolist() == stats.entropy.isnan().tolist() == [True, False]


@needs_kernel
def test_stats_per_head():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 40, 16)
    query[:, 1] *= 20  # a head that has collapsed
    value[:, 2] *= 50  # one that the clamp holds
    output, stats = clamped_attention(query, key, value, clamp=3.0, return_stats=True)
    logits = (query @ key.transpose(2, 3)).double() / 4
    torch.testing.assert_close(stats.max_logit.double(), logits.amax((0, 2, 3)), rtol=1e-5, atol=0)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2))
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    assert stats.entropy[1] < 0.5 < stats.entropy[0]
    torch.testing.assert_close(stats.clamped_share, (output.abs() == 3).float().mean((0, 2, 3)))
    assert stats.clamped_share[2] > 0.5 > stats.clamped_share[0]
