"""Cases of the launchers alone. test_launchers.py runs them in a process with the launchers."""

import pytest
import torch

from fastguard import ops
from fastguard.thresholds import AdaGC, Fixed
from tests.simt.launchers.tensors import (
    F64,
    RULE,
    assert_close,
    copies,
    drawn,
    scalar,
    state,
    statistics,
    wide,
    with_gaps,
)

from . import SCHEDULES, gpu


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_op_on_every_layout(schedule):
    gpu().options(schedule, 3, weak_memory=True)
    assert_close(ops.grad_norm(drawn())[:2], ops.grad_norm_ref(drawn())[:2])
    bad = drawn()
    for t in bad:
        if t.numel():
            t[(-1,) * t.dim()] = float("nan")
    assert torch.equal(ops.grad_norm(bad).nonfinite, ops.grad_norm_ref(bad).nonfinite)

    found, wanted = drawn(), drawn()
    coefs = torch.linspace(0.5, 1, len(found), dtype=F64)
    ops.scale_(found, coefs)
    ops.scale_ref_(wanted, coefs)
    assert_close(found, wanted)

    found, wanted = drawn(), drawn()
    measured, decision = ops.clip_(found, 1.0, 1e9)
    assert decision.verdict == ops.Verdict.CLIP
    total_norm, *_ = ops.clip_ref_(wanted, 1.0, 1e9, False)
    assert_close([measured.total_norm, *found], [total_norm, *wanted])

    for verdict in (0, 2):
        found, wanted = ([t.to(wide(t)) for t in drawn()] for _ in range(2))
        windows = torch.ones(2, 3, dtype=F64)
        grads = [g.contiguous() if i % 2 else g for i, g in enumerate(drawn(seed=1))]
        ops.accumulate_(found, grads, torch.tensor(verdict), windows[0], 0.5)
        ops.accumulate_ref_(wanted, grads, torch.tensor(verdict), windows[1], 0.5)
        assert_close([*found, windows[0]], [*wanted, windows[1]])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("verdict", [0, 1, 2])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16, torch.float16), (F64,)])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_adamw_with_gaps_is_copied_back(dtypes, verdict, amsgrad, per_tensor):
    results = []
    for step in (ops.adamw_, ops.adamw_ref_):
        params, known = drawn(dtypes), state(drawn(dtypes), amsgrad)
        grads = [g.contiguous() if i % 2 else g for i, g in enumerate(drawn(dtypes, seed=1))]
        if F64 not in dtypes:
            grads = [g.float() if i % 3 == 0 else g for i, g in enumerate(grads)]
        n = len(params)
        coef = torch.linspace(0.5, 1, 2 * n, dtype=F64)[::2] if per_tensor else scalar(0.5)
        step(params, grads, *known, coef, torch.tensor(verdict), *RULE, amsgrad, False)
        results.append([*params, *known])
    if verdict == 2:
        unchanged = [*drawn(dtypes), *state(drawn(dtypes), amsgrad)]
        assert all(torch.equal(a, b) for a, b in zip(results[0], unchanged, strict=True))
    assert_close(*results)
    assert gpu().kernels()[-1] == f"adamw_kernel<{str(amsgrad).lower()},false>"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("verdict", [0, 1, 2])
def test_adamw_with_masters_and_gaps(verdict, amsgrad):
    results, dtypes = [], (torch.bfloat16, torch.float16)
    for step in (ops.adamw_, ops.adamw_ref_):
        params, known = drawn(dtypes), state(drawn(dtypes), amsgrad)
        grads = [g.contiguous() if i % 2 else g for i, g in enumerate(drawn(dtypes, seed=1))]
        grads = [g.float() if i % 3 == 0 else g for i, g in enumerate(grads)]
        master = known[0].neg()
        offsets = ops.packed_offsets(p.numel() for p in params)
        for p, offset in list(zip(params, offsets, strict=False))[::2]:
            p.copy_(ops.packed_view(master, p, offset))
        rest = (scalar(0.5), torch.tensor(verdict), *RULE, amsgrad, False, master)
        step(params, grads, *known, *rest)
        results.append([*params, *known, master])
    assert_close(*results)
    assert gpu().kernels()[-1] == f"adamw_kernel<{str(amsgrad).lower()},true>"


def test_settle_copies_memory_of_any_dtype():
    def buffers():
        return [
            torch.arange(20_001),
            torch.tensor([True, False, True])[1:],
            torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).t(),
            torch.zeros(0),
            torch.tensor(3 + 4j),
            torch.ones(9_001, dtype=torch.float16),
            torch.ones(3, dtype=torch.bfloat16),
            torch.ones(3, dtype=F64),
        ]

    for verdict in (0, 1, 2, 3):
        given, saved = (
            buffers(),
            copies([b.logical_not() if b.dtype == torch.bool else b + 1 for b in buffers()]),
        )
        kept = saved if verdict >= 2 else given
        wanted = copies(kept)
        lost = ops.settle_(given, saved, torch.tensor(verdict), torch.arange(len(given)))
        assert lost.tolist() == [0] * 2 * len(given)
        for a, b, c in zip(given, saved, wanted, strict=True):
            assert torch.equal(a, c) and torch.equal(b, c)


@pytest.mark.parametrize("dtype", [*ops.DTYPES, *ops.COMPLEX_DTYPES])
def test_settle_sets_back_all_of_an_owner_that_lost_something(dtype):
    for bad in (complex(1, torch.inf) if dtype.is_complex else -torch.inf, torch.nan):
        given = [torch.ones(20_000).to(dtype), torch.tensor(7), torch.ones(3).to(dtype)]
        saved = [torch.zeros_like(t) for t in given]
        given[0][19_999] = bad
        lost = ops.settle_(given, saved, torch.tensor(1), torch.tensor([2, 2, 0]))
        assert lost.bool().tolist() == [True, False, False, False, False, True]
        assert gpu().kernels()[-2:] == ["find_lost_kernel", "settle_kernel"]
        for tensors in (given, saved):
            assert not tensors[0].count_nonzero() and tensors[1] == 0
            assert (tensors[2] == 1).all()


def test_settle_refuses_what_it_cannot_copy_as_it_is():
    gaps = with_gaps(torch.ones(4))
    saved = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(RuntimeError, match="buffer 1 has gaps"):
        ops.settle_([torch.ones(3), gaps], saved, torch.tensor(0), torch.arange(2))
    with pytest.raises(RuntimeError, match="buffer 0 has gaps, or its saved copy lies in another"):
        transposed = [torch.zeros(3, 2).t()]
        ops.settle_([torch.ones(2, 3)], transposed, torch.tensor(0), torch.arange(1))
    assert gpu().launches() == []
    assert not torch.cat(saved).any()


def test_expanded_tensors_are_read_and_not_written():
    row = torch.arange(5.0)
    expanded = row.expand(4000, 5)
    assert_close(ops.grad_norm([row, expanded])[:2], ops.grad_norm_ref([row, expanded])[:2])
    gpu().launches()
    for write in (
        lambda: ops.scale_([torch.ones(2), expanded], scalar(2.0)),
        lambda: ops.clip_([torch.ones(2), expanded], 1.0, 1e9),
    ):
        with pytest.raises(RuntimeError, match="tensor 1 is expanded"):
            write()
    assert gpu().launches() == []
    assert torch.equal(row, torch.arange(5.0))


def test_a_window_without_sums_is_counted():
    window = torch.zeros(3, dtype=F64)
    ops.accumulate_([], [], torch.tensor(0), window, 0.5)
    ops.accumulate_([], [], torch.tensor(2), window, 0.5)
    assert window.tolist() == [2, 1, 0.5]


def test_empty_lists():
    op = torch.ops.fastguard
    op.scale_([], scalar(2.0))
    op.settle_([], [], torch.tensor(0), torch.zeros(0, dtype=torch.int64))
    none = torch.zeros(0)
    op.adamw_([], [], none, none, none, none, scalar(1.0), torch.tensor(0), *RULE, False, False)
    for threshold in (Fixed(), AdaGC()):
        known = statistics(0)
        found = op.grad_norm_decide_(
            *([], None, None, *known, 0, int(threshold.kind), 1.0, 1e9, threshold.options),
            *(None, None, (0.0, 0.0, 0.0)),
        )
        assert found[0] == 0 and found[4] == ops.Verdict.APPLY
        assert found[1].shape == (0,) and found[2].shape == (0, 3)


def test_a_kernel_that_leaves_its_tensors_is_an_error():
    """Memory that torch has not allocated, or has freed, is not memory of the GPU."""
    outside = torch.from_numpy(torch.ones(100).numpy().copy())
    with pytest.raises(RuntimeError, match="out_of_bounds"):
        ops.grad_norm([outside])
    with gpu().capture():
        grads = [torch.ones(50)]
        ops.grad_norm(grads)
    gpu().library.simt_let_go()  # frees the graph's memory; the graph stays
    with pytest.raises(RuntimeError, match="out_of_bounds"):
        gpu().replay()
    gpu().forget_graph()
