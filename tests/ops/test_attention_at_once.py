"""The short way of attention on the CPU: which calls it takes, and that it changes no result."""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad

from fastguard import clamped_attention
from fastguard.attention import functional
from fastguard.ops import attention as attention_ops
from tests.native import needs_kernel
from tests.ops.attention_cases import DTYPES

pytestmark = needs_kernel


def inputs(dtype=torch.float32, rows=5, keys=7, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, rows, width), (2, 2, keys, width), (2, 2, keys, 16)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def at_once(query, key, value, padding=None, scale=None, clamp=0.5):
    return attention_ops.attention_at_once(
        query, key, value, padding, False, scale, clamp, False, True
    )


@pytest.fixture
def by_all_checks(monkeypatch):
    """Calls a function without the short way."""

    def call(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(functional.attention_ops, "attention_at_once", lambda *_: None)
            return function(*args, **options)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_the_same_bits(dtype, by_all_checks):
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    choices = itertools.product((None, padding), (False, True), (None, 0.3), (None, 0.5))
    for key_padding_mask, is_causal, scale, clamp in choices:
        options = {"key_padding_mask": key_padding_mask, "is_causal": is_causal}
        options |= {"scale": scale, "clamp": clamp, "return_stats": True}

        def run(options=options):
            tensors = inputs(dtype)
            output, stats = clamped_attention(*tensors, **options)
            grads = torch.autograd.grad(output.float().square().sum(), tensors)
            return [output.detach(), *stats, *grads]

        for found, wanted in zip(run(), by_all_checks(run), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


# Of 16 rows and keys or fewer of the arithmetic's own dtype the kernel makes no copy.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [16, 17, 64])
def test_few_rows_are_as_the_reference_says(dtype, width):
    for rows, keys, masked in itertools.product((1, 8, 16, 17), (1, 8, 16, 17), (0, 1, 2)):
        query, key, value = inputs(dtype, rows, keys, width)
        # Heads beside each other, and NaN where no row of a head is.
        query, key, value = (
            torch.nn.functional.pad(x.detach().transpose(1, 2), (0, 3), value=math.nan)
            .transpose(1, 2)[..., : x.size(3)]
            .requires_grad_()
            for x in (query, key, value)
        )
        padding = None
        if masked:  # the keys of one utterance: the last, or all
            padding = torch.zeros(2, keys, dtype=torch.bool)
            padding[1, -1 if masked == 1 else slice(None)] = True
        found = at_once(query, key, value, padding)
        assert found is not None
        options = (padding, None, None, False, 0.0, width**-0.5, 0.0, 0.5, False, False)
        exact = [x.detach().double() for x in (query, key, value)]
        wanted = attention_ops.attention_ref(*exact, *options)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found[0].double(), wanted.output, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            found[1].double(), wanted.logsumexp, rtol=tolerance, atol=tolerance
        )


class Subclass(torch.Tensor):
    pass


def test_it_leaves_what_needs_the_checks():
    query, key, value = inputs()
    assert at_once(query, key, value) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert at_once(query, key, value) is None
    assert at_once(query.detach().as_subclass(Subclass), key, value) is None
    assert at_once(query, key, value, torch.zeros(2, 7).bool().as_subclass(Subclass)) is None
    assert at_once(*(x.detach().to("meta") for x in (query, key, value))) is None
    with forward_ad.dual_level():
        assert at_once(query, key, value) is None

    seen = []

    def recorded(query):
        seen.append(at_once(query, key, value))
        return query

    torch.func.grad(lambda x: recorded(x).sum())(query)
    torch.vmap(recorded)(query[None])
    torch.jit.trace(recorded, query.detach(), check_trace=False)
    assert seen == [None, None, None]


def test_what_the_operator_refuses_goes_to_the_checks():
    query, key, value = inputs()
    assert at_once(query[0], key, value) is None
    assert at_once(query[:, :, :0], key, value) is None  # T = 0: the reference's
    assert at_once(query[..., :0], key[..., :0], value) is None
    assert at_once(query, key.double(), value) is None
    assert at_once(query, key, value, torch.zeros(2, 7)) is None
    assert at_once(query, key, value, clamp=math.nan) is None
    assert at_once(query, key, value, scale=1e31) is None
    assert at_once(torch.tensor(1.0), key, value) is None
    with pytest.raises(ValueError, match=r"clamp must be > 0, got 0\.0"):
        clamped_attention(query, key, value, clamp=0.0)
    with pytest.raises(ValueError, match="softcap must be in"):
        clamped_attention(query, key, value, softcap=0.0)
    with pytest.raises(ValueError, match="dropout_p must be in"):
        clamped_attention(query, key, value, dropout_p=math.nan)
