"""settle_: which buffers are committed, which are set back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from tests.drawn import DTYPES
from tests.native import needs_kernel
from tests.ops.decide_cases import APPLY, SKIP
from tests.simt.kernels.devices import on_devices
from tests.tensors import assert_same_bits, bits


def buffers():
    return [
        torch.randn(5),
        torch.tensor(7),
        torch.randn(3, 4).t(),
        torch.randn(6, 2)[:, 0],
        torch.tensor([True, False]),
        torch.zeros(0),
    ]


def numbered(tensors):
    """As if each buffer had an owner of its own."""
    return torch.arange(len(tensors))


SETTLE = [ops.settle_, ops.settle_ref_, *on_devices("settle_")]


@pytest.mark.parametrize("function", SETTLE)
@pytest.mark.parametrize("verdict", Verdict)
def test_settle(function, verdict):
    current, saved = buffers(), [b.clone() for b in buffers()]
    expected = bits(saved if verdict.skipped else current)
    lost = function(current, saved, torch.tensor(int(verdict)), numbered(current))
    assert_same_bits(bits(current), expected)
    assert_same_bits(bits(saved), expected)
    assert lost.tolist() == [0] * 2 * len(current)


@pytest.mark.parametrize("function", SETTLE)
@pytest.mark.parametrize("dtype", [*DTYPES, *ops.COMPLEX_DTYPES])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_settle_never_saves_what_is_finite_no_more(function, dtype, bad):
    """Nor the other buffers of the same owner; those of others are saved."""
    value = complex(1.0, bad) if dtype.is_complex else bad
    saved = [torch.full((3, 9_001), 0.5).to(dtype).t(), torch.tensor(3), torch.ones(2).to(dtype)]
    saved[0][5, 2] = -value  # what was not finite before protects nothing
    current = [s + 1 for s in saved]
    owners = torch.tensor([1, 1, 0])
    assert not function(current, saved, APPLY, owners).any()
    before = [s.clone() for s in saved]
    current[0][9_000, 1] = value
    current[1] += 4
    current[2] += 1
    later = current[2].clone()
    lost = function(current, saved, APPLY, owners)
    assert lost.bool().tolist() == [True, False, False, False, True, False]
    for tensors in (current, saved):
        assert_same_bits(bits(tensors), bits([*before[:2], later]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3))
@pytest.mark.parametrize("function", [ops.settle_, *on_devices("settle_")])
def test_settle_is_that_of_the_reference(function, data, verdict):
    numbers = st.sampled_from([0.0, 1.5, -2.0, math.nan, math.inf, -math.inf])
    n = data.draw(st.integers(1, 5))
    drawn = []
    for _ in range(n):
        dtype = data.draw(st.sampled_from([*DTYPES, *ops.COMPLEX_DTYPES, torch.int64, torch.bool]))
        size = data.draw(st.integers(0, 4))
        pair = [data.draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(2)]
        if dtype in (torch.int64, torch.bool):
            pair = [[x == 1.5 for x in values] for values in pair]
        drawn.append([torch.tensor(values).to(dtype) for values in pair])
    owners = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    found, expected = ([[t.clone() for t in pair] for pair in drawn] for _ in range(2))
    lost = function(*map(list, zip(*found, strict=True)), torch.tensor(verdict), owners)
    right = ops.settle_ref_(*map(list, zip(*expected, strict=True)), torch.tensor(verdict), owners)
    assert torch.equal(lost > 0, right > 0)
    for pair, other in zip(found, expected, strict=True):
        assert_same_bits(bits(pair), bits(other))


@needs_kernel
def test_settle_refuses_lists_that_do_not_match():
    before = [torch.zeros(2), torch.zeros(2)]
    saved = [torch.ones(2), torch.ones(3)]
    with pytest.raises(RuntimeError, match="buffer 1 and its saved copy differ"):
        ops.settle_(before, saved, SKIP, numbered(before))
    with pytest.raises(RuntimeError, match="2 buffers but 1 saved"):
        ops.settle_(before, saved[:1], SKIP, numbered(before))
    with pytest.raises(RuntimeError, match="2 saved copies and 1 owners"):
        ops.settle_(before, before, SKIP, torch.arange(1))
    assert torch.stack(before).eq(0).all()


@needs_kernel
@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
def test_settle_on_the_cpu_refuses_owners_that_are_not_there(wrong):
    before, saved = [torch.zeros(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)]
    with pytest.raises(RuntimeError, match=rf"owners must be numbers from 0 to 1, .* got {wrong}"):
        ops.settle_(before, saved, SKIP, torch.tensor([0, wrong]))
    assert torch.stack(before).eq(0).all()


@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
@pytest.mark.parametrize("function", on_devices("settle_"))
def test_settle_on_a_device_reads_no_owner_that_is_not_there(function, wrong):
    """The host cannot look at the numbers: such a buffer is alone."""
    current, saved = [torch.ones(2), torch.tensor([math.nan, 1.0])], [torch.zeros(2)] * 2
    saved = [s.clone() for s in saved]
    lost = function(current, saved, APPLY, torch.tensor([0, wrong]))
    assert lost.tolist() == [0, 1, 0, 1]
    assert current[0].tolist() == [1, 1] and current[1].tolist() == [0, 0]


@needs_kernel
@pytest.mark.parametrize("verdict", [APPLY, SKIP])
def test_opcheck_settle_and_accumulate(verdict):
    torch.library.opcheck(
        torch.ops.fastguard.settle_.default,
        (buffers(), [b.clone() for b in buffers()], verdict, numbered(buffers())),
    )
    window = torch.zeros(3, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fastguard.accumulate_.default,
        ([torch.ones(3)], [torch.randn(3)], verdict, window, 1.0),
    )
