"""What only launchers do, where fastguard runs on them: test_launchers.py starts that process."""

import threading

import pytest
import torch

from fastguard import ops
from fastguard.guard.statistics import unseen
from fastguard.ops import attention as attention_ops
from fastguard.thresholds import AdaGC, Fixed

from . import SCHEDULES, gpu

BUILD = ["upload_kernel", "expand_plan_kernel"]
F64 = torch.float64
RULE = (1e-2, 0.9, 0.98, 0.1, 1e-8, True)


@pytest.fixture(autouse=True)
def nothing_launched():
    gpu().launches()
    yield
    gpu().options()


def scalar(value, dtype=F64):
    return torch.tensor(value, dtype=dtype)


def with_gaps(values):
    wide = torch.full((*values.shape, 3), float("nan"), dtype=values.dtype)
    wide[..., 1] = values
    return wide[..., 1]


def drawn(dtypes=ops.DTYPES, seed=0):
    """Every layout in every dtype: one chunk and several, misaligned, permuted, gaps, empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    tensors = []
    for dtype in dtypes:
        tensors += [
            normal(3, 7).to(dtype),
            normal(20_000).to(dtype),
            normal(9_001).to(dtype)[1:],
            normal(90, 100).to(dtype).t(),
            normal(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
            with_gaps(normal(5, 7).to(dtype)),
            with_gaps(normal(7, 5).to(dtype)).t(),
            torch.zeros(0, 3, dtype=dtype),
            scalar(1.5, dtype),
        ]
    return tensors


def copies(tensors):
    """The same values in the same layout, elsewhere."""
    made = []
    for t in tensors:
        if t.numel() == 0:
            made.append(t.clone())
            continue
        room = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype)
        made.append(room.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t))
    return made


def state(params, amsgrad=False, seed=7):
    generator = torch.Generator().manual_seed(seed)
    dtype = F64 if params[0].dtype == F64 else torch.float32
    size = ops.packed_offsets(p.numel() for p in params)[-1]
    m, v, most = (torch.rand(size, generator=generator, dtype=dtype) for _ in range(3))
    return m, v, most if amsgrad else most[:0].clone(), torch.arange(float(len(params)))


def wide(tensor):
    return F64 if tensor.dtype == F64 else torch.float32


def assert_close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        rel = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(f.dtype, 2e-6)
        torch.testing.assert_close(f, w, rtol=rel, atol=rel * 1e-2, equal_nan=True)


# --- all layouts and dtypes -----------------------------------------------------------------------


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
    assert gpu().kernels()[-1] == f"adamw_kernel<{str(amsgrad).lower()}>"


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


# --- empty lists ----------------------------------------------------------------------------------


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


# --- plans ----------------------------------------------------------------------------------------


def statistics(n):
    zeros = [torch.zeros(4, dtype=F64) for _ in range(3)]
    return ops.Statistics(*zeros, unseen(n, "cpu"))


def test_a_plan_is_reused_while_nothing_moves():
    grads = drawn()[:5]
    ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"]
    ops.scale_(grads, scalar(0.5))  # the same tensors: the same plan
    ops.clip_(grads, 1.0, 1e9)
    ops.grad_norm_decide_(grads, None, None, statistics(5), 0, Fixed(), 1.0, 1e9)
    assert gpu().kernels() == ["scale_kernel", "clip_kernel", "grad_norm_kernel"]


@pytest.mark.parametrize("change", ["pointer", "size", "dtype", "order", "layout", "number"])
def test_a_plan_is_rebuilt_when_something_changes(change):
    room = torch.arange(64.0).view(8, 8)
    other = torch.ones(10)
    ops.grad_norm([room, other])
    gpu().launches()
    changed = {
        "pointer": [room, torch.ones(10)],
        "size": [room[:7], other],
        "dtype": [room.view(torch.bfloat16)[:, :8].as_strided((64,), (1,)), other],
        "order": [other, room],
        "layout": [room.t(), other],
        "number": [room],
    }[change]
    measured = ops.grad_norm(changed)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]
    assert_close(measured[:2], ops.grad_norm_ref(changed)[:2])
    ops.grad_norm([room, other])
    assert gpu().kernels() == ["grad_norm_kernel"]


def test_one_launch_for_any_number_of_tensors():
    grads = list(torch.randn(2000, 3).unbind())
    for expected in (["upload_kernel"] * 3 + ["expand_plan_kernel"], []):
        measured = ops.grad_norm(grads)
        assert gpu().kernels() == [*expected, "grad_norm_kernel"]
        assert_close(measured[:2], ops.grad_norm_ref(grads)[:2])
    ops.clip_(grads, 1.0, 1e9)
    assert gpu().kernels() == ["clip_kernel"]


def test_each_stream_has_plans_of_its_own():
    grads = [torch.randn(100)]
    ops.grad_norm(grads)
    with gpu().stream(5):
        ops.grad_norm(grads)
    assert [(name, stream) for name, _, _, stream in gpu().launches()] == [
        *((name, 0) for name in [*BUILD, "grad_norm_kernel"]),
        *((name, 5) for name in [*BUILD, "grad_norm_kernel"]),
    ]
    with gpu().stream(5):
        ops.grad_norm(grads)
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"] * 2


def test_plans_are_forgotten_when_they_are_many():
    """64 here, 1024 on a GPU; 64 KiB here, 64 MiB on a GPU: tests/simt/launchers/runtime.h."""
    lists = [[torch.ones(1)] for _ in range(64)]
    for grads in [*lists, *lists]:
        ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"] * 64 + ["grad_norm_kernel"] * 64
    ops.grad_norm([torch.ones(1), torch.ones(1)])  # one too many
    gpu().launches()
    ops.grad_norm(lists[1])
    assert gpu().kernels() == ["grad_norm_kernel"]
    ops.grad_norm(lists[0])
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]


def test_plans_are_forgotten_when_they_are_large():
    lists = [list(torch.ones(250, 1).unbind()) for _ in range(3)]  # of 112 bytes a tensor
    build = [*BUILD, "grad_norm_kernel"]
    for grads, expected in ((0, build), (1, build), (0, build[-1:]), (2, build), (1, build)):
        ops.grad_norm(lists[grads])
        assert gpu().kernels() == expected
    large = list(torch.ones(625, 1).unbind())  # is kept alone
    for expected in (build, build[-1:]):
        assert ops.grad_norm(large).total_norm == 25
        assert gpu().kernels() == expected
    ops.grad_norm(lists[1])
    assert gpu().kernels() == build


def test_threads_share_plans():
    lists = [[torch.full((9000,), float(i)), torch.ones(3)] for i in range(1, 4)]
    wanted = [ops.grad_norm_ref(grads).total_norm.item() for grads in lists]
    wrong = []

    def work():
        for _ in range(10):
            for grads, norm in zip(lists, wanted, strict=True):
                if abs(ops.grad_norm(grads).total_norm.item() - norm) > 1e-6 * norm:
                    wrong.append(norm)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kernels = gpu().kernels()
    assert wrong == []
    assert kernels.count("grad_norm_kernel") == 120
    assert kernels.count("expand_plan_kernel") == 3


# --- attention ------------------------------------------------------------------------------------

ATTENTION = ["attention_kernel", "attention_delta_kernel"]
ATTENTION += ["attention_grad_query_kernel", "attention_grad_key_kernel"]


def attended(query, key, value, padding=None, mask=None, causal=False, dropout_p=0.0):
    # In 16 bits some output would be the bound in one of two and a last place below in the other.
    clamp = 1.0 if query.dtype == torch.float32 else 100.0
    return padding, mask, torch.tensor([3, 4]), causal, dropout_p, 0.2, 0.0, clamp, True


def heads(*shape, dtype, layout="side by side", seed=0):
    """(B, H, T, D) whose rows lie ``layout``."""
    batch, count, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, rows, count, columns, generator=generator).to(dtype)
    if layout == "misaligned":
        room = torch.empty(drawn.numel() + 1, dtype=dtype)[1:]
        drawn = room.view_as(drawn).copy_(drawn)
    drawn = with_gaps(drawn) if layout == "with gaps" else drawn
    return drawn.transpose(1, 2).requires_grad_()


def assert_attention(query, key, value, **options):
    options = attended(query, key, value, **options)
    found = attention_ops.attention(query, key, value, *options)
    wanted = attention_ops.attention_ref(query, key, value, *options)
    rel = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[query.dtype]
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w.to(f.dtype), rtol=rel, atol=rel)
    # The sum's gradient is one number, expanded.
    results = [
        torch.autograd.grad(output.sum(), (query, key, value)) for output in (found[0], wanted[0])
    ]
    for f, w in zip(*results, strict=True):
        torch.testing.assert_close(f, w, rtol=rel, atol=rel * w.abs().max().item())
    assert found.output.transpose(1, 2).is_contiguous()
    assert all(f.transpose(1, 2).is_contiguous() for f in results[0])


@pytest.mark.parametrize("layout", ["side by side", "misaligned", "with gaps"])
@pytest.mark.parametrize("width", [16, 128, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_on_every_layout(dtype, width, layout):
    query = heads(2, 4, 20, width, dtype=dtype, layout=layout)
    key = heads(2, 2, 70, width, dtype=dtype, layout=layout, seed=1)
    value = heads(2, 2, 70, 24, dtype=dtype, seed=2)
    padding = torch.arange(70).expand(2, 70).t().contiguous().t() > 40
    assert_attention(query, key, value, padding=padding, causal=width == 16, dropout_p=0.2)
    own = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "float"}[dtype]
    least = 64 if dtype == torch.float32 else 32
    size = f"{own},{128 if width == 128 else least}"
    ran = [name.replace(f"<{size}>", "").replace(f"<{own}>", "") for name in gpu().kernels()]
    assert ran == ATTENTION


def test_attention_with_masks_of_other_strides():
    tensors = [heads(2, 2, 30, 32, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    for mask in (torch.rand(30, 30) < 0.8, torch.randn(2, 1, 30, 30).transpose(2, 3)):
        assert_attention(*tensors, mask=mask.expand(2, 2, 30, 30))


def test_attention_of_an_empty_batch():
    tensors = [heads(0, 2, 30, 32, dtype=torch.bfloat16) for _ in range(3)]
    found = attention_ops.attention(*tensors, *attended(*tensors))
    assert found.output.shape == (0, 2, 30, 32) and found.stats.shape == (2, 0, 2, 30)
    grads = torch.autograd.grad(found.output.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert gpu().launches() == []


def test_a_captured_attention_reads_its_seed_at_each_replay():
    tensors = [heads(1, 1, 20, 32, dtype=torch.float32, seed=seed).detach() for seed in range(3)]
    options = list(attended(*tensors, dropout_p=0.5))
    with gpu().capture():
        found = attention_ops.attention(*tensors, *options)
    for number in (1, 2):
        options[2].fill_(number)
        gpu().replay()
        wanted = attention_ops.attention_ref(*tensors, *options)
        torch.testing.assert_close(found.output, wanted.output)
    gpu().forget_graph()


def test_attention_is_described_as_it_is():
    tensors = [heads(1, 2, 20, 24, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    torch.library.opcheck(
        torch.ops.fastguard.attention.default,
        (*tensors, *attended(*tensors)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_attention_refuses_what_its_kernels_do_not_take():
    def run(dtype=torch.float32, width=16):
        tensors = [torch.ones(1, 1, 2, width, dtype=dtype) for _ in range(3)]
        return attention_ops.attention(*tensors, *attended(*tensors))

    for wrong in ({"dtype": F64}, {"width": 136}):
        with pytest.raises(RuntimeError, match="CUDA's kernels take float32, bfloat16 and float16"):
            run(**wrong)
    x, mask = torch.ones(1, 1, 2, 8), torch.zeros(1, 2, dtype=torch.bool)
    with gpu().on_device(1, mask), pytest.raises(RuntimeError, match="key_padding_mask is not on"):
        attention_ops.attention(x, x, x, *attended(x, x, x, padding=mask))
    assert gpu().launches() == []


# --- CUDA graphs ----------------------------------------------------------------------------------


def test_a_captured_call_builds_its_plan_at_each_replay():
    grads, window = [torch.ones(20_000), torch.ones(3)], torch.zeros(3, dtype=F64)
    sums, verdict = [torch.zeros(20_000), torch.zeros(3)], torch.tensor(0)
    ops.grad_norm(grads)  # a plan is kept, and not for the graph
    gpu().launches()
    with gpu().capture():
        measured = ops.grad_norm(grads)
        ops.accumulate_(sums, grads, verdict, window, 1.0)
    assert gpu().launches() == []
    for value in (1.0, 2.0, 3.0):
        for g in grads:
            g.fill_(value)
        gpu().replay()
        assert gpu().kernels() == [*BUILD, "grad_norm_kernel", *BUILD, "accumulate_kernel"]
        assert measured.total_norm.item() == pytest.approx(value * 20_003**0.5)
    assert window.tolist() == [3, 3, 3]
    assert all((s == 6).all() for s in sums)
    gpu().forget_graph()
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"]


def test_what_was_captured_is_not_kept():
    grads = [torch.ones(77)]
    with gpu().capture():
        ops.grad_norm(grads)
    gpu().forget_graph()
    ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]


# --- devices --------------------------------------------------------------------------------------


def test_launches_go_to_the_device_of_the_tensors():
    grads = [torch.ones(10), torch.ones(5)]
    with gpu().on_device(1, *grads):
        measured = ops.grad_norm(grads)
    ops.grad_norm(grads)
    devices = [device for _, _, device, _ in gpu().launches()]
    assert devices == [1, 1, 1, 0, 0, 0]
    assert measured.total_norm == pytest.approx(15**0.5)


STATISTICS = ["statistics", "seen_norms", "accepted_norms", "per_tensor"]
OTHERS = ["unscale", "loss", *STATISTICS, "scale", "growth_tracker"]


@pytest.mark.parametrize("device", [-1, 1])
def test_tensors_of_several_devices_are_refused(device):
    """Before anything is written: a kernel that reads what is elsewhere ends the process's CUDA."""
    here, there = [torch.ones(4) for _ in range(3)], [torch.ones(4) for _ in range(3)]
    one, verdict, window = scalar(2.0), torch.tensor(0), torch.ones(3, dtype=F64)
    m, v, steps, none = torch.zeros(48), torch.zeros(48), torch.zeros(3), torch.zeros(0)
    norms, owners = torch.ones(3, dtype=F64), torch.arange(3)
    decided = {
        "unscale": scalar(1.0), "loss": scalar(1.0), "statistics": torch.zeros(4, dtype=F64),
        "seen_norms": torch.zeros(4, dtype=F64), "accepted_norms": torch.zeros(4, dtype=F64),
        "per_tensor": torch.ones(4, 3, dtype=F64),
        "scale": torch.ones(1), "growth_tracker": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip

    def adamw():
        ops.adamw_(here, there, m, v, none, steps, one, verdict, *RULE, False, False)

    def decide():
        known = ops.Statistics(*(decided[name] for name in STATISTICS))
        scaling = ops.Scaling(decided["scale"], decided["growth_tracker"], 2.0, 0.5, 1)
        rest = (decided["unscale"], decided["loss"], known, 0, AdaGC(), 1.0, 1e9, scaling)
        ops.grad_norm_decide_(here, *rest)

    def decide_alone():
        known = ops.Statistics(*(decided[name] for name in STATISTICS))
        measured = ops.GradNorm(one, norms, None)
        rest = (decided["unscale"], decided["loss"], known, 0, AdaGC(), 1.0, 1e9)
        ops.guard_decide_(measured, *rest)

    runs = [
        (lambda: ops.grad_norm(here), here[2], "grad_norm: tensor 2 is not on cuda:0"),
        (lambda: ops.grad_norm(here), here[0], "."),
        (lambda: ops.scale_(here, one), here[1], "scale_: tensor 1 is not on cuda:0"),
        (lambda: ops.scale_(here, one), one, "scale_: clip_coef is not on cuda:0"),
        (lambda: ops.clip_(here, 1.0, 1e9), here[1], "clip_: tensor 1 is not on cuda:0"),
        (lambda: ops.accumulate_(here, there, verdict, window, 1.0), there[2], "tensor 2 is not"),
        (lambda: ops.accumulate_(here, there, verdict, window, 1.0), verdict, "verdict is not on"),
        (lambda: ops.settle_(here, there, verdict, owners), there[2], "settle_: tensor 2 is not"),
        (lambda: ops.settle_(here, there, verdict, owners), owners, "settle_: owners is not on"),
        (adamw, here[1], r"adamw_: params\[1\] is not on cuda:0"),
        (adamw, there[2], r"adamw_: grads\[2\] is not on cuda:0"),
        (adamw, m, "adamw_: exp_avg is not on cuda:0"),
        (adamw, v, "adamw_: exp_avg_sq is not on cuda:0"),
        (adamw, steps, "adamw_: state_steps is not on cuda:0"),
        (adamw, one, "adamw_: grad_coef is not on cuda:0"),
        (adamw, verdict, "adamw_: verdict is not on cuda:0"),
        (decide_alone, norms, "guard_decide_: norms is not on cuda:0"),
        *((decide, decided[name], ".") for name in OTHERS),
        *((decide_alone, decided[name], f"guard_decide_: {name} is not on") for name in OTHERS[:6]),
    ]
    for run, elsewhere, text in runs:
        with gpu().on_device(device, elsewhere), pytest.raises(RuntimeError, match=text):
            run()
        assert gpu().launches() == [], text
    assert all((t == 1).all() for t in [*here, *there])


# --- what is refused before anything is written ---------------------------------------------------


def test_wrong_arguments_are_named_and_nothing_is_written():
    good, verdict = torch.ones(4), torch.tensor(0)
    window = torch.ones(3, dtype=F64)
    ints = torch.ones(4, dtype=torch.int64)
    m, v, steps, none = torch.zeros(16), torch.zeros(16), torch.zeros(1), torch.zeros(0)
    one, half = torch.arange(1), torch.ones(4).half()

    def adamw(params=(good,), grads=(good,), m=m, v=v, most=none, steps=steps, amsgrad=False):
        rest = (scalar(1.0), verdict, *RULE, amsgrad, False)
        ops.adamw_(list(params), list(grads), m, v, most, steps, *rest)

    runs = [
        (lambda: ops.grad_norm([good, ints]), "tensor 1 has dtype number"),
        (lambda: ops.scale_([good, ints], scalar(2.0)), "scale_: tensor 1 has dtype number"),
        (lambda: ops.scale_([good], torch.tensor(2.0)), "clip_coef must be a float64 tensor"),
        (lambda: ops.scale_([good], torch.ones(2, dtype=F64)), "clip_coef must be"),
        (lambda: ops.clip_([good, ints], 1.0, 1e9), "clip_: tensor 1 has dtype number"),
        (lambda: ops.accumulate_([good], [], verdict, window, 1.0), "1 sums, 0 gradients"),
        (lambda: ops.accumulate_([good], [torch.ones(5)], verdict, window, 1.0), "sum 0 must have"),
        (lambda: ops.accumulate_([good], [good.double()], verdict, window, 1.0), "be float64 for"),
        (lambda: ops.accumulate_([half], [half], verdict, window, 1.0), "float32 for any other"),
        (lambda: torch.ops.fastguard.settle_([good], [], verdict, one), "1 buffers but 0 saved"),
        (lambda: ops.settle_([good], [torch.ones(5)], verdict, one), "differ in shape"),
        (lambda: ops.decide(torch.tensor(1.0), 1.0, 1.0), "total_norm must be a float64"),
        (lambda: adamw(grads=()), "grads has 0 tensors"),
        (lambda: adamw([ints], [ints]), r"params\[0\] has dtype Long"),
        (lambda: adamw(m=torch.zeros(15)), "exp_avg must be a contiguous Float tensor of shape"),
        (lambda: adamw(amsgrad=True), "max_exp_avg_sq must be"),
        (lambda: adamw([good.expand(2, 4)], [torch.ones(2, 4)]), "is expanded"),
    ]
    for run, text in runs:
        with pytest.raises(RuntimeError, match=text):
            run()
    assert gpu().launches() == []
    assert (good == 1).all() and (window == 1).all() and not m.any()


# --- the emulation itself -------------------------------------------------------------------------


def test_a_kernel_that_leaves_its_tensors_is_an_error():
    """What torch has not allocated is not a GPU's memory; nor is what it has freed."""
    outside = torch.from_numpy(torch.ones(100).numpy().copy())
    with pytest.raises(RuntimeError, match="out_of_bounds"):
        ops.grad_norm([outside])
    with gpu().capture():
        grads = [torch.ones(50)]
        ops.grad_norm(grads)
    gpu().library.simt_let_go()  # the graph's memory goes, the graph stays
    with pytest.raises(RuntimeError, match="out_of_bounds"):
        gpu().replay()
    gpu().forget_graph()
