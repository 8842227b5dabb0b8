"""GradGuard.accumulate: a bad micro-batch is as if it had never been."""

import copy
import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from fastguard.thresholds import ZClip
from tests.tensors import assert_same_bits

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


@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("bad_places", [[0], [1], [2], [0, 1], [1, 2], [0, 2]])
def test_a_bad_micro_batch_leaves_no_trace(make, bad_places):
    """NeMo's skip_nan_grad zeroes the whole window; here the others count, as their mean."""
    runs = []
    for bad in (True, False):
        model = small_model()
        optimizer = make(model.parameters(), lr=0.1)
        guard = GradGuard(model, max_norm=0.5)
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
