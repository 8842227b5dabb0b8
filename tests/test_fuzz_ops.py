"""The operators with arguments that nobody should give them: tests/fuzz_ops, for a while."""

import sys

import pytest
import torch

from fastguard import ops
from fastguard.ops import attention as attention_ops
from fastguard.thresholds import Fixed
from tests.native import needs_kernel
from tests.ops.decide_cases import APPLY, SKIP, double, fresh

pytestmark = needs_kernel
half = double(0.5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mmap")
def test_drawn_arguments_are_refused_or_served_as_by_the_reference():
    """`python -m tests.fuzz_ops --seconds N --seed S` runs longer."""
    from tests.fuzz_ops.__main__ import fuzz
    from tests.fuzz_ops.case import REFERENCES

    counts, failures = fuzz(60, 0)
    assert failures == []
    for name in REFERENCES:
        assert counts[f"{name} accepted"] and counts[f"{name} refused"], counts


def freed(tensor, left=0):
    """As sharded training frees a parameter under the tensors that name it."""
    tensor.untyped_storage().resize_(left)
    return tensor


def adamw(params, grads, grad_coef=half, **state):
    state = (
        {name: torch.zeros(16 * len(params)) for name in ("exp_avg", "exp_avg_sq")}
        | {"max": torch.zeros(0), "steps": torch.zeros(len(params))}
        | state
    )
    torch.ops.fastguard.adamw_(
        params, grads, *state.values(), grad_coef, APPLY, 0.1, 0.9, 0.9, 0.0, 1e-8, True, False,
        False,
    )  # fmt: skip


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: ops.grad_norm([torch.ones(3), t]), "tensor 1"),
        (lambda t: ops.scale_([torch.ones(3), t], half), "tensor 1"),
        (lambda t: ops.clip_([torch.ones(3), t], 0.1, 9.0), "tensor 1"),
        (lambda t: ops.accumulate_([torch.ones(3)], [t], APPLY, torch.zeros(3).double(), 1.0), "0"),
        (lambda t: ops.settle_([torch.ones(3)], [t], SKIP, torch.arange(1)), "saved copy 0"),
        (lambda t: adamw([torch.ones(3), t], [torch.ones(3)] * 2), "parameter 1"),
        (lambda t: adamw([torch.ones(3)], [t]), "gradient 0"),
        (lambda t: adamw([torch.ones(3)] * 3, [torch.ones(3)] * 3, steps=t), "state_steps"),
        (lambda t: attention_ops.attention(*[t.view(1, 1, 1, 3)] * 3, *[None] * 3, False, 0.0, 1.0,
                                           0.0, 1.0, False), "tensor 0"),
    ],
)  # fmt: skip
def test_memory_that_was_freed_is_not_read(call, name, left):
    tensor = torch.ones(5)[2:]
    with pytest.raises(RuntimeError, match=f"{name} reaches .* bytes into a storage of {left}: "):
        call(freed(tensor, left))


@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_leaf_with_gaps_is_written_as_one_without(grad_mode):
    """torch's copy_ into it would raise after the others were written."""
    leaves = [
        torch.ones(2, 3, requires_grad=True),
        torch.ones(4, 6)[:, ::2].detach().requires_grad_(),
    ]
    with torch.set_grad_enabled(grad_mode):
        torch.ops.fastguard.scale_(leaves, half)
        torch.ops.fastguard.clip_(leaves, 1e-3, 1e9, False)
        adamw([p.detach()[:1] if i else p for i, p in enumerate(leaves)], leaves_like(leaves))
    assert all(torch.equal(p[0], leaves[0][0]) for p in leaves[1:])


def leaves_like(leaves):
    return [torch.ones_like(leaves[0]), torch.ones(1, 3)]


def inference(*shape):
    with torch.inference_mode():
        return torch.ones(*shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda first, last: ops.scale_([first, last], half),
        lambda first, last: ops.clip_([first, last], 0.1, 1e9),
        lambda first, last: ops.accumulate_(
            [first, last], [first.clone()] * 2, APPLY, torch.zeros(3).double(), 1.0
        ),
        lambda first, last: ops.settle_([first, last], [first * 2] * 2, SKIP, torch.arange(2)),
        lambda first, last: adamw([first, last], [first.clone()] * 2),
    ],
)
def test_nothing_is_half_written_where_torch_refuses_the_last(call):
    """A tensor made in inference mode, with gaps: torch refuses to copy into it, at the end."""
    first, last = torch.ones(2, 2), inference(2, 4)[:, ::2]
    with pytest.raises(RuntimeError, match="inference"):
        call(first, last)
    assert first.eq(1).all() and last.eq(1).all()


def test_tensors_made_in_inference_mode_are_written_and_nothing_raises_afterwards():
    tensors = [torch.ones(3), inference(3), torch.ones(3)]
    versions = tensors[0]._version, tensors[2]._version
    ops.scale_(tensors, half)
    assert all(t.eq(0.5).all() for t in tensors)
    assert (tensors[0]._version, tensors[2]._version) > versions


def test_a_lazy_negation_is_refused_before_anything_is_written():
    sums, window = torch.ones(1), torch.zeros(3, dtype=torch.complex128).conj().imag
    with pytest.raises(RuntimeError, match="lazy negation"):
        torch.ops.fastguard.accumulate_([sums], [torch.ones(1)], APPLY, window, 1.0)
    assert sums == 1 and window.eq(0).all()


@pytest.mark.parametrize("tracker", [2**31 - 1, -1])
@pytest.mark.parametrize("interval", [1e300, float("nan"), -5.0])
def test_a_growth_tracker_at_its_end_wraps(tracker, interval):
    found = []
    for function in (torch.ops.fastguard.grad_norm_decide_, ops.grad_norm_decide_ref_):
        scale, steps = torch.tensor(8.0), torch.tensor(tracker, dtype=torch.int32)
        function(
            [torch.ones(2)], None, None, *fresh(n=1), 0, 0, 1.0, 9.0, Fixed().options, scale, steps,
            [2.0, 0.5, interval],
        )  # fmt: skip
        found.append((scale.item(), steps.item()))
    assert found[0] == found[1]


def test_a_mask_whose_bytes_are_neither_0_nor_1():
    q = torch.randn(1, 1, 3, 4)
    padding = torch.tensor([[0, 2, 255]], dtype=torch.uint8).view(torch.bool)
    args = (None, None, False, 0.0, 1.0, 0.0, float("inf"), False)
    clean = padding.view(torch.uint8).ne(0)
    found, wanted = (attention_ops.attention(q, q, q, m, *args).output for m in (padding, clean))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("wrong", ["meta", "dtype", "shape"])
def test_references_refuse_what_the_operators_do(wrong):
    """They serve where no kernel was built."""
    other = {
        "meta": torch.ones(3, device="meta"), "dtype": torch.ones(3).int(), "shape": torch.ones(2),
    }[wrong]  # fmt: skip
    window, first = torch.zeros(3).double(), torch.ones(3)
    for module in (torch.ops.fastguard, None):
        for name, args in {
            "accumulate_": ([first, torch.ones(3)], [first.clone(), other], APPLY, window, 1.0),
            "settle_": ([first, torch.ones(3)], [first * 2, other], SKIP, torch.arange(2)),
        }.items():
            if name == "settle_" and wrong == "meta" and module is None:
                continue  # which serves buffers of several devices
            function = getattr(module or ops, name if module else f"{name}".rstrip("_") + "_ref_")
            with pytest.raises(RuntimeError, match=f"{name}: "):
                function(*args)
    assert first.eq(1).all() and window.eq(0).all()
