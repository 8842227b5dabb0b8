"""GradGuard: what is skipped, what is clipped, and that a skip leaves no trace."""

import copy
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fastguard import GradGuard, GradientExplosionError, Verdict
from tests.drawn import gradients
from tests.tensors import assert_same_bits, bits, parameters_with


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def train_step(model, optimizer, guard, x, **kwargs):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    return guard.step(optimizer, **kwargs)


def everything(model, optimizer):
    """All that a skipped step must leave alone, as bits."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [v for v in state.values() if isinstance(v, torch.Tensor)]
    return bits(t.detach() for t in tensors)


def set_gradient_norms(parameters, norm):
    total = sum(p.numel() for p in parameters)
    for p in parameters:
        p.grad = torch.full_like(p, norm / math.sqrt(total))


def test_clips_like_torch_clip_and_step():
    ours, theirs = small_model(), small_model()
    ours_opt, theirs_opt = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (ours, theirs))
    guard = GradGuard(ours, max_norm=0.01)
    for step in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        report = train_step(ours, ours_opt, guard, x)
        theirs_opt.zero_grad()
        theirs(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        theirs_opt.step()
        assert report.total_norm == pytest.approx(norm.item(), rel=1e-5)
        assert report.verdict is Verdict.CLIP
        assert report.clip_coef == pytest.approx(0.01 / norm.item(), rel=1e-3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skip_leaves_no_trace(optimizer_class, bad):
    """Also not in BatchNorm's running statistics, into which the forward pass wrote the NaN."""
    model = small_model()
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1)
    guard = GradGuard(model)
    train_step(model, optimizer, guard, torch.randn(6, 4))
    before = everything(model, optimizer)
    x = torch.randn(6, 4)
    x[2, 1] = bad
    report = train_step(model, optimizer, guard, x, batch_id="utterance 7")
    assert report.verdict is Verdict.SKIP_NONFINITE
    assert report.skipped
    assert report.batch_id == "utterance 7"
    assert_same_bits(before, everything(model, optimizer))
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped
    assert model.eval()(torch.randn(3, 4)).isfinite().all()


def test_accepted_steps_keep_their_running_statistics():
    guarded, plain = small_model(), small_model()
    guard = GradGuard(guarded, max_norm=math.inf)
    optimizer = torch.optim.SGD(guarded.parameters(), lr=0.0)
    for step in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        train_step(guarded, optimizer, guard, x)
        plain(x)
    assert torch.equal(guarded[1].running_var, plain[1].running_var)
    assert guarded[1].num_batches_tracked == 3


def poisoned(model, optimizer, guard):
    """One training step on a batch with a NaN, after a forward pass through the module."""
    x = torch.randn(6, 4)
    x[0] = math.nan
    return train_step(model, optimizer, guard, x)


def test_buffers_survive_however_the_module_was_called():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = {k: v + 5 for k, v in model.state_dict().items()}
    model.load_state_dict(checkpoint)
    model.eval()
    model[1].train()  # partial train mode
    before = everything(model, optimizer)
    optimizer.zero_grad()
    x = torch.full((6, 4), math.nan)
    model[3](model[2](model[1](model[0](x)))).sum().backward()  # not through the module itself
    assert guard.step(optimizer).skipped
    assert_same_bits(before, everything(model, optimizer))
    assert model[1].num_batches_tracked == 5


def test_buffers_survive_gradient_accumulation():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.randn(6, 4))
    before = everything(model, optimizer)
    optimizer.zero_grad()
    for x in (torch.randn(6, 4), torch.full((6, 4), math.nan), torch.randn(6, 4)):
        model(x).square().mean().backward()
    assert guard.step(optimizer).skipped
    assert_same_bits(before, everything(model, optimizer))


def test_a_buffer_that_the_forward_pass_replaced_is_put_back():
    model = small_model()
    model.register_buffer("scale", torch.ones(2), persistent=False)
    model.register_buffer("cache", None)
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.scale, model.cache = torch.full((3,), math.nan), torch.ones(1)
    assert poisoned(model, optimizer, guard).skipped
    assert model.scale.tolist() == [1.0, 1.0]
    assert model.cache is None


@pytest.mark.parametrize("change", ["unfreeze", "add", "assign"])
def test_parameters_that_come_later_are_watched(change):
    model = small_model()
    model[3].weight.requires_grad_(change != "unfreeze")
    guard = GradGuard(model)
    if change == "unfreeze":
        model[3].weight.requires_grad_()
    elif change == "add":
        model.append(nn.Linear(1, 1))
    else:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = poisoned(model, optimizer, guard)
    assert report.verdict is Verdict.SKIP_NONFINITE
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_optimizer_with_parameters_of_its_own_is_refused():
    model, head = small_model(), nn.Linear(1, 1)
    guard = GradGuard(model)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    head(model(torch.randn(6, 4))).sum().backward()
    with pytest.raises(ValueError, match=r"a parameter of shape \(1, 1\).*does not watch"):
        guard.step(optimizer)


def test_a_single_parameter_and_shared_sparse_and_complex_gradients():
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.full((2, 3), math.nan)
    assert GradGuard(weight).step(torch.optim.SGD([weight], lr=1.0)).skipped

    one, two = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    one.grad = two.grad = torch.full((4,), 3.0)
    report = GradGuard([one, two], max_norm=3.0).step(torch.optim.SGD([one, two], lr=1.0))
    assert report.total_norm == 6.0
    torch.testing.assert_close(two.detach(), torch.full((4,), -1.5))

    table = nn.Embedding(10, 3, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    report = GradGuard(table, max_norm=1.0).step(torch.optim.SGD(table.parameters(), lr=1.0))
    assert report.total_norm == pytest.approx(math.sqrt(12))
    torch.testing.assert_close(table.weight.grad.to_dense().norm(), torch.tensor(1.0))

    wave = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    wave.grad = torch.tensor([3 + 4j])
    assert GradGuard(wave, max_norm=1.0).step(torch.optim.SGD([wave], lr=1.0)).total_norm == 5.0
    torch.testing.assert_close(wave.grad, torch.tensor([0.6 + 0.8j]))


@settings(max_examples=50, deadline=None)
@given(gradients(magnitudes=False))
def test_never_writes_a_nonfinite_number(grads):
    """Whatever is in the gradients, the parameters stay finite and a skip changes no bit."""
    parameters = parameters_with(grads)
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    guard = GradGuard(parameters, max_norm=1.0)
    expect_skip = any(not g.isfinite().all() for g in grads)
    before = bits(p.detach() for p in parameters) + bits(p.grad for p in parameters)
    report = guard.step(optimizer)
    assert report.skipped == expect_skip
    if expect_skip:
        after = bits(p.detach() for p in parameters) + bits(p.grad for p in parameters)
        assert_same_bits(before, after)
        names = [f"parameter {i}" for i, g in enumerate(grads) if not g.isfinite().all()]
        assert list(report.nonfinite) == names
        assert report.first_nonfinite.startswith(names[0] + "[")
    assert all(p.isfinite().all() for p in parameters)


def test_patience_ends_the_run_and_says_what_was_seen():
    parameters = parameters_with([torch.ones(3), torch.ones(3)])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = GradGuard([("encoder.weight", parameters[0]), ("head.bias", parameters[1])], patience=3)
    parameters[1].grad[2] = math.nan
    for batch in ("a", "b"):
        guard.step(optimizer, batch_id=batch)
    with pytest.raises(GradientExplosionError) as caught:
        guard.step(optimizer, batch_id="c")
    message = str(caught.value)
    for part in (
        "3 steps in a row",
        "batches: a, b, c",
        "non-finite first: head.bias",
        "head.bias[2]",
        "what to try: ",
        "learning rate",
    ):
        assert part in message, message
    assert [r.batch_id for r in caught.value.reports] == ["a", "b", "c"]


def test_the_error_survives_pickling_and_names_steps_where_batches_have_no_id():
    parameters = parameters_with([torch.tensor([math.nan])])
    with pytest.raises(GradientExplosionError, match="batches: 0\n") as caught:
        GradGuard(parameters, patience=1).step(torch.optim.SGD(parameters, lr=0.1))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert repr(again.reports) == repr(caught.value.reports)


def test_an_overflow_of_float64_is_not_called_a_nan():
    parameters = parameters_with([torch.full((2,), 1e200, dtype=torch.float64)])
    with pytest.raises(
        GradientExplosionError, match=r"1 had a norm above 1.8e308 in the sum of its sq"
    ):
        GradGuard(parameters, patience=1).step(torch.optim.SGD(parameters, lr=0.1))


def test_patience_counts_only_skips_in_a_row():
    parameters = parameters_with([torch.ones(3)])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = GradGuard(parameters, patience=2)
    for _ in range(5):
        set_gradient_norms(parameters, math.nan)
        guard.step(optimizer)
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)


def test_outliers_in_the_error_come_with_their_norms_and_the_threshold():
    parameters = parameters_with([torch.ones(3)])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = GradGuard(parameters, skip_norm=10.0, patience=1)
    for _ in range(16):
        set_gradient_norms(parameters, 1.0)
        guard.step(optimizer)
    set_gradient_norms(parameters, 500.0)
    with pytest.raises(
        GradientExplosionError, match=r"above skip_norm=10 \(500\).*\n(.*\n)*.*raise skip_norm"
    ):
        guard.step(optimizer)


def test_warnings_use_the_words_of_the_logs(caplog):
    parameters = parameters_with([torch.ones(3)])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = GradGuard(parameters, skip_norm=10.0)
    with caplog.at_level(logging.WARNING, "fastguard.guard.report_files"):
        for norm in [*[1.0] * 16, 50.0, math.inf]:
            set_gradient_norms(parameters, norm)
            guard.step(optimizer)
    assert [r.getMessage() for r in caplog.records] == [
        "Large gradient norm: 50 at batch 16, skipping (skip_norm=10); risen most: parameter 0 50 "
        "(50 times its usual 1, since step 16)",
        "Infinite gradient, skipping batch 17 (norm inf, first at parameter 0[0])",
    ]


def test_grad_scaler():
    """Unscaled before it is measured; a skip still lowers the scale, an outlier does not."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = GradGuard(model, max_norm=math.inf, skip_norm=100.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step(x):
        optimizer.zero_grad()
        scaler.scale(model(x).sum()).backward()
        return guard.step(optimizer, scaler=scaler)

    weight = model.weight.detach().clone()
    report = step(torch.ones(1, 4))
    assert report.total_norm == pytest.approx(math.sqrt(5))
    torch.testing.assert_close(model.weight.detach(), weight - 0.1)
    assert step(torch.full((1, 4), math.inf)).verdict is Verdict.SKIP_NONFINITE
    assert scaler.get_scale() == 512.0
    for _ in range(16):
        step(torch.ones(1, 4))
    weight = model.weight.detach().clone()
    assert step(torch.full((1, 4), 1000.0)).verdict is Verdict.SKIP_OUTLIER
    assert torch.equal(model.weight.detach(), weight)
    assert scaler.get_scale() == 512.0


def test_state_dict_resumes_exactly():
    norms = [3.0] * 20 + [50.0, math.nan, 2.0, math.nan, math.nan]
    parameters = [nn.Parameter(torch.zeros(10))]
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def run(guard, norms):
        reports = []
        for norm in norms:
            set_gradient_norms(parameters, norm)
            reports.append(guard.step(optimizer, batch_id=f"b{norm}"))
        return reports

    make = lambda: GradGuard(parameters, skip_norm=10.0, patience=4)  # noqa: E731
    whole = make()
    expected = run(whole, [*norms, 1.0, 60.0])
    first, second = make(), make()
    run(first, norms)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [(r.step, r.verdict) for r in run(second, [1.0, 60.0])] == [
        (r.step, r.verdict) for r in expected[-2:]
    ]
    third = make()
    third.load_state_dict(first.state_dict())
    with pytest.raises(GradientExplosionError, match="batches: bnan, bnan, bnan, bnan"):
        run(third, [math.nan] * 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_norm": -1}, "max_norm must be a number >= 0"),
        ({"skip_norm": math.nan}, "skip_norm must be a number >= 0"),
        ({"patience": 0}, "patience must be at least 1 step, got 0"),
    ],
)
def test_refuses_arguments_that_can_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradGuard(small_model(), **arguments)


def test_refuses_an_empty_list_of_parameters():
    with pytest.raises(ValueError, match="GradGuard got no parameters"):
        GradGuard([])
