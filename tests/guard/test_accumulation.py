"""GradGuard.accumulate: a bad micro-batch is as if it had never been."""

import copy
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from fastguard.thresholds import ZClip
from tests.test_clip import assert_same_bits

from .test_grad_guard import everything, set_gradient_norms, small_model


def window(model, guard, optimizer, batches, **kwargs):
    """One step whose micro-batches are ``batches``."""
    optimizer.zero_grad()
    for x in batches:
        model(x).square().mean().backward()
        guard.accumulate(**kwargs)
    return guard.step(optimizer)


def batch(seed, bad=None):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    if bad is not None:
        x[seed % 6, seed % 4] = bad
    return x


@pytest.mark.parametrize("measure", ["step", "backward"])
@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("bad_places", [[0], [1], [2], [0, 1], [1, 2], [0, 2]])
def test_a_bad_micro_batch_leaves_no_trace(make, bad_places, measure):
    """NeMo's skip_nan_grad zeroes the whole window; here the others count, as their mean."""
    runs = []
    for bad in (True, False):
        model = small_model()
        optimizer = make(model.parameters(), lr=0.1)
        guard = GradGuard(model, max_norm=0.5, measure=measure)
        for step in range(4):
            places = bad_places if step % 2 else []
            batches = [
                batch(3 * step + i, math.inf if i in places else None)
                for i in range(3)
                if bad or i not in places
            ]
            report = window(model, guard, optimizer, batches)
            assert not report.skipped
            assert len(report.skipped_micro_batches) == (len(places) if bad else 0)
        runs.append((everything(model, optimizer), report.total_norm))
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_the_mean_of_the_good_ones_is_what_torch_computes():
    ours, theirs = small_model(), small_model()
    ours_opt, theirs_opt = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    guard = GradGuard(ours, max_norm=0.1)
    for step in range(3):
        batches = [batch(4 * step + i) for i in range(4)]
        report = window(ours, guard, ours_opt, batches)
        theirs_opt.zero_grad()
        for x in batches:
            (theirs(x).square().mean() / 4).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        theirs_opt.step()
        assert report.total_norm == pytest.approx(norm.item(), rel=1e-5)
        assert report.micro_batches == 4
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_make_a_mean_over_items_of_sums():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = GradGuard([weight], max_norm=math.inf)
    for items, total in ((2, 10.0), (3, math.nan), (6, 6.0)):
        weight.grad = torch.full((3,), total)
        guard.accumulate(weight=items)
    guard.step(optimizer)
    assert weight.tolist() == [-16.0 / 8] * 3


def test_a_window_of_bad_ones_is_a_skipped_step(caplog):
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters())
    guard = GradGuard(model)
    window(model, guard, optimizer, [batch(1)])
    before = everything(model, optimizer)
    report = window(model, guard, optimizer, [batch(2, math.nan), batch(3, math.inf)])
    assert report.verdict is Verdict.SKIP_NONFINITE
    assert_same_bits(before, everything(model, optimizer))
    assert [r.getMessage().split("(")[0] for r in caplog.records] == [
        "Infinite gradient, skipping batch micro-batch 0 ",
        "Infinite gradient, skipping batch micro-batch 1 ",
        "All 2 micro-batches were bad, skipping batch 1",
    ]
    assert not window(model, guard, optimizer, [batch(4)]).skipped


def test_an_outlier_among_micro_batches_is_left_out():
    parameters = [nn.Parameter(torch.zeros(10))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    guard = GradGuard(parameters, max_norm=math.inf, skip_norm=10.0)
    for _ in range(16):
        set_gradient_norms(parameters, 1.0)
        guard.accumulate()
    guard.step(optimizer)
    before = parameters[0].detach().clone()
    for norm in (2.0, 11.0, 4.0):
        set_gradient_norms(parameters, norm)
        guard.accumulate()
    report = guard.step(optimizer)
    assert report.total_norm == pytest.approx(3.0)
    assert [r.verdict for r in report.skipped_micro_batches] == [Verdict.SKIP_OUTLIER]
    assert (before - parameters[0].detach()).norm().item() == pytest.approx(3.0, rel=1e-5)


def test_buffers_of_a_skipped_window_go_back_to_before_its_good_micro_batches():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = GradGuard(model)
    window(model, guard, optimizer, [batch(1)])
    before = everything(model, optimizer)
    optimizer.zero_grad()
    model(batch(2)).square().mean().backward()
    assert not guard.accumulate().skipped
    assert guard.step(optimizer, loss=math.nan).verdict is Verdict.SKIP_NONFINITE
    assert_same_bits(before, everything(model, optimizer))


def test_gradients_that_were_not_accumulated_are_refused_and_nothing_is_lost():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = GradGuard([("weight", weight)], max_norm=math.inf)
    weight.grad = torch.tensor([1.0])
    guard.accumulate()
    weight.grad = torch.tensor([5.0])
    with pytest.raises(ValueError, match="weight has a gradient that was not accumulated"):
        guard.step(optimizer)
    guard.accumulate()
    with pytest.raises(ValueError, match="loss must be one real number"):
        guard.step(optimizer, loss=torch.ones(2))
    with pytest.raises(ValueError, match="need the same GradScaler"):
        guard.step(optimizer, scaler=torch.amp.GradScaler("cpu"))
    assert guard.step(optimizer).micro_batches == 2
    assert weight.item() == -3.0


def test_the_next_window_starts_anew_where_the_loop_zeroes_the_gradients():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = GradGuard([weight], max_norm=math.inf)
    for _ in range(2):
        optimizer.zero_grad()
        for value in (0.5, 1.5):
            (weight * value).sum().backward()
            guard.accumulate()
        guard.step(optimizer)
    assert weight.item() == -2.0


def test_complex_sums_of_lazily_conjugated_gradients():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    guard = GradGuard([weight], max_norm=math.inf)
    for grad in (torch.tensor([1 + 1j]).conj(), torch.tensor([1 - 1j]), torch.tensor([4j]).conj()):
        weight.grad = grad
        guard.accumulate()
        assert weight.grad.item() == 0
    guard.step(torch.optim.SGD([weight], lr=3.0))
    assert weight.item() == -2 + 6j


def test_parameters_that_only_some_micro_batches_reach():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([one, two], lr=1.0)
    for bad_first in (False, True):
        guard = GradGuard([one, two], max_norm=math.inf)
        with torch.no_grad():
            one.zero_()
            two.zero_()
        for p, value in ((one, math.nan if bad_first else 2.0), (two, 6.0)):
            optimizer.zero_grad()
            p.grad = torch.tensor([value])
            guard.accumulate()
        guard.step(optimizer)
        assert (one.item(), two.item()) == ((0.0, -6.0) if bad_first else (-1.0, -3.0))


def test_with_a_grad_scaler():
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters(), lr=0.1)
    guard = GradGuard(model, max_norm=math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed, bad in ((1, None), (2, math.inf), (3, None)):
        scaler.scale(model(batch(seed, bad)).square().mean()).backward()
        guard.accumulate(scaler=scaler)
    report = guard.step(optimizer, scaler=scaler)
    plain = small_model()
    for seed in (1, 3):
        (plain(batch(seed)).square().mean() / 2).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    assert report.total_norm == pytest.approx(norm.item(), rel=1e-5)
    # A micro-batch overflowed: the scale must shrink, or it would grow until all of them do.
    assert scaler.get_scale() == 512.0


def test_refuses_and_leaves_the_gradients():
    weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    guard = GradGuard([("weight", weight), ("other", other)])
    weight.grad = torch.ones(2)
    for bad_weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weight must be a positive number, got {bad_weight}"):
            guard.accumulate(weight=bad_weight)
    with pytest.raises(ValueError, match=r"loss must be one real .* tensor of shape \(2,\)"):
        guard.accumulate(loss=torch.ones(2))
    other.grad = weight.grad
    with pytest.raises(ValueError, match="two parameters share one gradient"):
        guard.accumulate()
    other.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="the gradient of other is sparse"):
        guard.accumulate()
    assert weight.grad.tolist() == [1.0, 1.0]
    assert guard._window is None


def test_a_spike_is_judged_by_skip_norm_alone_whatever_the_threshold():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = GradGuard([weight], max_norm=10.0, threshold=ZClip(warmup=2))
    for norm in (1.0, 1.1, 0.9):
        set_gradient_norms([weight], norm)
        guard.step(optimizer)
    set_gradient_norms([weight], 5.0)
    micro_batch = guard.accumulate()
    assert micro_batch.max_norm == 10.0
    assert micro_batch.clip_coef == 1.0
    assert guard.step(optimizer).clip_coef < 0.5


def test_an_optimizer_that_raises_does_not_lose_the_window():
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters(), lr=0.1)
    guard = GradGuard(model, max_norm=math.inf)
    window(model, guard, optimizer, [batch(0)])
    twin = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    for seed in (1, 2):
        model(batch(seed)).square().mean().backward()
        guard.accumulate()
    right = optimizer.state[model[0].weight]["exp_avg"]
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="exp_avg"):
        guard.step(optimizer)
    optimizer.state[model[0].weight]["exp_avg"] = right
    assert guard.step(optimizer).micro_batches == 2
    other, other_optimizer = twin
    report = window(other, GradGuard(other, math.inf), other_optimizer, [batch(1), batch(2)])
    assert report.micro_batches == 2
    assert_same_bits(everything(model, optimizer), everything(other, other_optimizer))


def test_weights_that_are_loaded_end_the_window():
    model = small_model()
    guard = GradGuard(model)
    optimizer = fastguard.AdamW(model.parameters())
    model(batch(0)).square().mean().backward()
    guard.accumulate()
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    optimizer.zero_grad()
    model(batch(1)).square().mean().backward()
    assert guard.step(optimizer).micro_batches == 0


def test_nothing_to_accumulate():
    with pytest.raises(ValueError, match="no gradient to accumulate"):
        GradGuard(small_model()).accumulate()


# --- sums in float32 ------------------------------------------------------------------------------

MAKERS = {
    "fastguard": lambda p: fastguard.AdamW(p, lr=1.0, weight_decay=0.0),
    "fused": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
}


class Looks(torch.optim.SGD):
    """Remembers the gradients that its step got."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "dtype, value, times",
    [
        (torch.float16, 30000.0, 4),  # their sum is beyond float16
        (torch.bfloat16, 1.0, 512),  # bfloat16 has no 257
        (torch.float32, 3.0, 4),
        (torch.float64, 1 + 2**-40, 4),
    ],
    ids=["float16", "bfloat16", "float32", "float64"],
)
def test_sums_of_every_dtype_have_the_mean(make, dtype, value, times):
    weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer, guard = make([weight]), GradGuard([weight], max_norm=math.inf)
    for _ in range(2):
        before = weight.detach().clone()
        for _ in range(times):
            weight.grad = torch.full((3,), value, dtype=dtype)
            assert guard.accumulate().verdict is Verdict.APPLY
        report = guard.step(optimizer)
        assert report.verdict is Verdict.APPLY
        assert report.total_norm == pytest.approx(value * 3**0.5, rel=1e-12)
        assert weight.grad.dtype == weight.grad_dtype == dtype
        assert not weight.grad.any()
        if isinstance(optimizer, torch.optim.SGD):
            assert torch.equal(weight.detach(), before - value)
        else:
            assert (weight < 0).all()


@pytest.mark.parametrize("threshold", [fastguard.thresholds.Fixed(), fastguard.thresholds.AdaGC()])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16,) * 2])
def test_the_mean_is_clipped_before_it_is_rounded(dtypes, threshold):
    parameters = [nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
    optimizer = Looks(parameters, lr=1.0)
    guard = GradGuard(parameters, max_norm=1.0, threshold=threshold)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.full_like(p, 40000.0)
        guard.accumulate()
    report = guard.step(optimizer)
    assert report.verdict is Verdict.CLIP
    norm = torch.stack([grad.double().norm() for grad in optimizer.seen]).norm()
    assert norm == pytest.approx(1.0, rel=1e-2)
    assert [grad.dtype for grad in optimizer.seen] == list(dtypes)


def test_fastguards_step_has_the_float32_mean():
    """Of which float16 could hold three digits."""
    weight, other = (nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2))
    one = fastguard.AdamW([weight], lr=0.1)
    guard = GradGuard([weight, other], max_norm=math.inf)
    values = (1.0, 2.0**-10 * 3, 2.0**-12)
    for value in values:
        for p in (weight, other):
            p.grad = torch.full((2,), value, dtype=torch.float16)
        guard.accumulate()
    rest = Looks([other], lr=1.0)
    guard.step([one, rest])
    mean = torch.tensor(sum(values) / 3, dtype=torch.float32)
    assert torch.equal(one.state[weight]["exp_avg"], (0.1 * mean).expand(2).float())
    assert torch.equal(rest.seen[0], mean.half().expand(2))


def test_a_window_that_is_kept_gives_the_means_again():
    """The optimizer raised; the sums are as they were, and so are the gradients' dtypes."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer, guard = fastguard.AdamW([weight], lr=0.1), GradGuard([weight], max_norm=math.inf)
    weight.grad = torch.ones(2, dtype=torch.bfloat16)
    guard.accumulate()
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        guard.step(optimizer)
    assert weight.grad_dtype == torch.bfloat16 and not weight.grad.any()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    assert guard.step(optimizer).total_norm == pytest.approx(2**0.5)


# --- where gradients lie --------------------------------------------------------------------------


@pytest.mark.parametrize("overwrites", [True, False], ids=["a graph's replay", "backward"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_in_static_memory_stay_there(make, overwrites):
    """A CUDA graph writes to the memory that it was captured with, whatever is in .grad."""
    model, twin = small_model(), small_model()
    optimizer, other = make(model.parameters()), make(twin.parameters())
    guard, other_guard = GradGuard(model, max_norm=0.5), GradGuard(twin, max_norm=0.5)
    static = [torch.zeros_like(p) for p in model.parameters()]
    for p, memory in zip(model.parameters(), static, strict=True):
        p.grad = memory
    for step in range(3):
        batches = [batch(3 * step + i, math.nan if i == step else None) for i in range(3)]
        for x in batches:
            if overwrites:
                loss = model(x).square().mean()
                grads = torch.autograd.grad(loss, list(model.parameters()))
                torch._foreach_copy_(static, grads)
            else:
                model(x).square().mean().backward()
            guard.accumulate()
        report = guard.step(optimizer)
        assert report.total_norm == window(twin, other_guard, other, batches).total_norm
        for p, memory in zip(model.parameters(), static, strict=True):
            assert p.grad is memory and not memory.any()
    assert_same_bits(everything(model, optimizer), everything(twin, other))


def test_gradients_in_a_flat_buffer_stay_there():
    flat = torch.zeros(6)
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = flat[:2], flat[2:]
    optimizer, guard = torch.optim.SGD(parameters, lr=1.0), GradGuard(parameters, math.inf)
    for _ in range(2):
        for value in (1.0, 3.0):
            flat.add_(value)  # as a reduction of the flat buffer does
            guard.accumulate()
            assert not flat.any()
        guard.step(optimizer)
    assert [p.tolist() for p in parameters] == [[-4.0] * 2, [-4.0] * 4]


def test_gradients_that_cannot_be_written_are_dropped():
    weight = nn.Parameter(torch.zeros(3))
    guard = GradGuard([weight], max_norm=math.inf)
    weight.grad = torch.ones(1).expand(3)
    guard.accumulate()
    assert weight.grad is None
    with torch.inference_mode():
        inference = torch.full((3,), 3.0)
    weight.grad = inference
    guard.accumulate()
    guard.step(torch.optim.SGD([weight], lr=1.0))
    assert weight.tolist() == [-2.0] * 3 and inference.tolist() == [3.0] * 3


def test_a_backward_after_the_last_accumulate_is_not_lost_in_place():
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model(batch(0)).square().mean().backward()
    guard.accumulate()
    model(batch(1)).square().mean().backward()  # adds to the same tensors
    with pytest.raises(ValueError, match=r"0\.weight has a gradient that was not accumulated"):
        guard.step(optimizer)
    guard.accumulate()
    assert guard.step(optimizer).micro_batches == 2


# --- parameters that come later -------------------------------------------------------------------


@pytest.mark.parametrize("stepped_before", [True, False])
@pytest.mark.parametrize("at", [0, 1], ids=["before the window", "within it"])
def test_a_layer_added_with_its_param_group(stepped_before, at):
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer, guard = fastguard.AdamW(model.parameters(), lr=0.1), GradGuard(model, math.inf)
    if stepped_before:
        window(model, guard, optimizer, [batch(0)])
    optimizer.zero_grad()
    for i in range(3):
        if i == at:
            model.append(nn.Linear(4, 1))
            optimizer.add_param_group({"params": model[1].parameters()})
        model(batch(i)).square().mean().backward()
        guard.accumulate()
    before = model[1].weight.detach().clone()
    report = guard.step(optimizer)
    assert list(report.norms()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not torch.equal(model[1].weight.detach(), before)


# --- GradScalers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before accumulate", "before step"])
def test_an_unscaling_within_a_window_is_refused(when):
    """The sums would be divided by the scale twice, or not at all."""
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(2):
        scaler.scale(model(batch(i)).square().mean()).backward()
        if when == "before accumulate" and i == 1:
            break
        guard.accumulate(scaler=scaler)
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"leave scaler.unscale_ out"):
        if when == "before step":
            guard.step(optimizer, scaler=scaler)
        else:
            guard.accumulate(scaler=scaler)
