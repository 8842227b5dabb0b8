"""How a decision reaches fastguard's, torch's fused and any other optimizer, and a GradScaler."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from fastguard.thresholds import AdaGC
from tests.tensors import assert_same_bits, bits

from .test_grad_guard import everything, set_gradient_norms, small_model, train_step

OPTIMIZERS = {
    "fastguard.AdamW": lambda p: fastguard.AdamW(p, lr=0.1),
    "fastguard.Adam": lambda p: fastguard.Adam(p, lr=0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Muon-like": lambda p: OnlyCalls(p),
}


class OnlyCalls(torch.optim.Optimizer):
    """Somebody's own optimizer: no fused flag, no closure, a state of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["calls"] = self.state[p].get("calls", torch.zeros(())) + 1
                    p.sub_(p.grad, alpha=group["lr"])


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def seeded(seed, bad=None):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    if bad is not None:
        x[0, 0] = bad
    return x


def without_batch_norm():
    # A bias before a BatchNorm has a gradient of rounding noise, which Adam makes a full step of.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_clips_as_torch_would(make):
    ours, theirs = without_batch_norm(), without_batch_norm()
    ours_opt, theirs_opt = make(ours.parameters()), make(theirs.parameters())
    guard = GradGuard(ours, max_norm=0.02)
    for seed in range(4):
        assert train_step(ours, ours_opt, guard, seeded(seed)).verdict is Verdict.CLIP
        theirs_opt.zero_grad()
        theirs(seeded(seed)).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.02)
        theirs_opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skip_leaves_no_trace(make, bad, scaled):
    model = small_model()
    optimizer = make(model.parameters())
    guard = GradGuard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (scaler.scale(loss) if scaled else loss).backward()
        return guard.step(optimizer, scaler=scaler)

    step(seeded(0))
    before = everything(model, optimizer)
    assert step(seeded(1, bad)).skipped
    assert_same_bits(before, everything(model, optimizer))
    assert not hasattr(optimizer, "grad_scale") or optimizer.grad_scale is None
    assert not hasattr(optimizer, "found_inf") or optimizer.found_inf is None
    assert not step(seeded(2)).skipped


def test_a_scaler_changes_nothing_but_the_scale(make):
    outcomes = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2)):
        model = without_batch_norm()
        optimizer = make(model.parameters())
        guard = GradGuard(model, max_norm=0.02)
        for seed in range(4):
            optimizer.zero_grad()
            loss = model(seeded(seed)).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            report = guard.step(optimizer, scaler=scaler)
        outcomes.append((report.total_norm, list(model.parameters())))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-4)
    for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert scaler.get_scale() == 4096.0 * 4


def test_a_scaler_that_has_unscaled_already(make):
    model = small_model()
    optimizer = make(model.parameters())
    guard = GradGuard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):  # its stage is set back
        optimizer.zero_grad()
        scaler.scale(model(seeded(0)).square().mean()).backward()
        scaler.unscale_(optimizer)
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
        report = guard.step(optimizer, scaler=scaler)
        assert report.total_norm == pytest.approx(norm.item(), rel=1e-5)


def test_a_disabled_scaler_is_no_scaler(make):
    model = small_model()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(seeded(0)).square().mean()).backward()
    assert not GradGuard(model).step(optimizer, scaler=scaler).skipped


def test_an_outlier_does_not_lower_the_scale_and_a_bad_loss_neither():
    parameters = [nn.Parameter(torch.ones(10))]
    optimizer = fastguard.AdamW(parameters)
    guard = GradGuard(parameters, skip_norm=10.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    verdicts = []
    for norm, loss in ([(1.0, 1.0)] * 16) + [(1e6, 1.0), (1.0, math.nan)]:
        set_gradient_norms(parameters, norm * 4)
        verdicts.append(guard.step(optimizer, scaler=scaler, loss=loss).verdict)
    assert verdicts[-2:] == [Verdict.SKIP_OUTLIER, Verdict.SKIP_NONFINITE]
    assert scaler.get_scale() == 4.0


def test_adagc_reaches_each_parameter(make):
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    optimizer = make(parameters)
    guard = GradGuard(parameters, max_norm=math.inf, threshold=AdaGC(warmup=2, relative=1.0))
    for scale in (1.0, 1.0, 50.0):
        parameters[0].grad = torch.full((4,), 0.5 * scale)
        parameters[1].grad = torch.full((2,), 0.5)
        before = [p.detach().clone() for p in parameters]
        report = guard.step(optimizer)
    assert report.verdict is Verdict.CLIP
    assert report.clip_coef == pytest.approx(1 / 50)
    moved = [(b - p.detach()).abs().max() for b, p in zip(before, parameters, strict=True)]
    if isinstance(optimizer, (OnlyCalls,)):
        assert [m.item() for m in moved] == pytest.approx([0.05, 0.05])
    for p in parameters:  # both saw a gradient of 0.5 per element, three times
        for name in ("exp_avg", "momentum_buffer", "square_avg"):
            if name in optimizer.state[p]:
                first = optimizer.state[parameters[0]][name]
                torch.testing.assert_close(optimizer.state[p][name], first[: p.numel()])


def test_adagc_where_only_some_parameters_have_gradients():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    guard = GradGuard(parameters, max_norm=math.inf, threshold=AdaGC(warmup=1, relative=1.0))
    for present, value in (((0, 1), 1.0), ((1, 2), 10.0), ((0,), 10.0)):
        for i, p in enumerate(parameters):
            p.grad = torch.full((2,), value) if i in present else None
        guard.step(optimizer)
    norms = guard.state_dict()["ema_norms"]
    assert norms == pytest.approx(
        {"parameter 0": 2**0.5, "parameter 1": 2**0.5, "parameter 2": 200**0.5}
    )


def test_gradients_stay_as_they_are_with_fastguards_optimizers():
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters())
    guard = GradGuard(model, max_norm=1e-3)
    model(seeded(0)).square().mean().backward()
    before = bits(p.grad for p in model.parameters())
    versions = [p.grad._version for p in model.parameters()]
    assert guard.step(optimizer).verdict is Verdict.CLIP
    assert_same_bits(before, bits(p.grad for p in model.parameters()))
    assert versions == [p.grad._version for p in model.parameters()]


def test_a_scheduler_hears_of_each_step(recwarn):
    for optimizer_class in (fastguard.AdamW, torch.optim.SGD):
        model = small_model()
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        guard = GradGuard(model)
        train_step(model, optimizer, guard, seeded(0))
        scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_what_an_optimizer_raises_leaves_no_decision_behind():
    model = small_model()
    optimizer = fastguard.AdamW(model.parameters())
    guard = GradGuard(model)
    train_step(model, optimizer, guard, seeded(0))
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(1)
    before = bits(p.detach() for p in model.parameters())
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: its exp_avg must be"):
        train_step(model, optimizer, guard, seeded(1))
    assert_same_bits(before, bits(p.detach() for p in model.parameters()))
    assert optimizer.decision is None


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise MemoryError("no room for the moments")


def test_what_an_optimizer_raises_leaves_the_scale_and_the_statistics():
    model = small_model()
    optimizer, guard = Fails(model.parameters()), GradGuard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for _ in range(2):
        scaler.scale(model(seeded(0)).square().mean()).backward()
        with pytest.raises(MemoryError, match="no room"):
            guard.step(optimizer, scaler=scaler)
        assert scaler.get_scale() == 1024.0
        assert guard.state_dict()["statistics"]["seen"] == 0


def two_optimizers(kind):
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2))
    return [one, two], [kind([one]), kind([two])]


def test_adagc_gives_each_optimizer_the_coefficients_of_its_own_parameters(make):
    def stepped(shares):
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        optimizers = [make([parameters[i] for i in share]) for share in shares]
        guard = GradGuard(parameters, max_norm=math.inf, threshold=AdaGC(warmup=2, relative=1.0))
        for scale in (1.0, 1.0, 50.0):
            for p, factor in zip(parameters, (1.0, scale, 2.0), strict=True):
                p.grad = torch.full((4,), 0.5 * factor)
            assert guard.step(optimizers).verdict is (Verdict.APPLY, Verdict.CLIP)[scale > 1]
        return bits(p.detach() for p in parameters)

    assert_same_bits(stepped([[1], [2, 0]]), stepped([[0, 1, 2]]))


@pytest.mark.parametrize("scaled", [False, True])
def test_several_optimizers_share_one_verdict(make, scaled):
    (one, two), optimizers = two_optimizers(make)
    guard = GradGuard([one, two], max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    (reference_one, reference_two), _ = two_optimizers(make)
    whole = make([reference_one, reference_two])
    for bad in (False, True, False):
        one.grad, two.grad = torch.full((4,), 3.0), torch.full((3, 2), math.nan if bad else 1.0)
        factor = scaler.scale(torch.ones(())) if scaled else 1.0
        for p in (one, two):
            p.grad *= factor
        report = guard.step(optimizers, scaler=scaler if scaled else None)
        assert report.skipped == bad
        if not bad:
            assert report.total_norm == pytest.approx(math.sqrt(42), rel=1e-6)
            reference_one.grad, reference_two.grad = torch.full((4,), 3.0), torch.ones(3, 2)
            nn.utils.clip_grad_norm_([reference_one, reference_two], 1.0)
            whole.step()
    for p, right in ((one, reference_one), (two, reference_two)):
        torch.testing.assert_close(p, right, rtol=1e-5, atol=1e-6)
    if scaled:
        assert scaler.get_scale() == 1024.0 * 2 / 2 * 2


def test_unscaled_for_one_of_two_optimizers_only():
    (one, two), optimizers = two_optimizers(fastguard.AdamW)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(one.sum() + two.sum()).backward()
    scaler.unscale_(optimizers[0])
    with pytest.raises(ValueError, match="for some of the optimizers"):
        GradGuard([one, two]).step(optimizers, scaler=scaler)


def test_what_unscaling_found_elsewhere_is_heeded(make):
    """ShardedGradScaler has asked the other ranks; a guard that sees its own shard could not."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {torch.device("cpu"): torch.ones(1)}
    assert GradGuard([weight]).step(optimizer, scaler=scaler).verdict is Verdict.SKIP_NONFINITE
    assert weight.tolist() == [1.0] * 3
    assert scaler.get_scale() == 2.0


def test_fused_sgd_does_not_skip_into_uninitialised_momentum():
    weight = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    guard = GradGuard([weight])
    torch.use_deterministic_algorithms(True)  # and with it empty memory is filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        for value in (math.nan, 0.0):
            weight.grad = torch.full_like(weight, value)
            guard.step(optimizer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.abs().max() == 0


def test_an_optimizer_that_is_fused_in_part():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "fused": True}, {"params": [two], "fused": False}]
    optimizer = torch.optim.AdamW(groups)
    one.grad, two.grad = torch.ones(2), torch.full((2,), math.nan)
    assert GradGuard([one, two]).step(optimizer).skipped
    assert one.tolist() == two.tolist() == [1.0, 1.0]


def test_a_max_norm_of_zero(make):
    weight = nn.Parameter(torch.ones(2))
    optimizer = make([weight])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    weight.grad = torch.ones(2)
    GradGuard([weight], max_norm=0.0).step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.ones(2))


def test_no_optimizer_and_one_twice():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for wrong in ([], [optimizer, optimizer]):
        with pytest.raises(ValueError, match="one optimizer or several different ones"):
            GradGuard([weight]).step(wrong)
    assert weight.tolist() == [1.0, 1.0]


def test_a_fused_optimizer_still_moves_where_the_norm_is_beyond_float32():
    """1/coef is Inf in float32 there; a gradient divided by it would be zeroed."""
    weight = nn.Parameter(torch.zeros(10_000))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.full((10_000,), 3e38)
    report = GradGuard([weight], max_norm=1.0).step(optimizer)
    assert report.verdict is Verdict.CLIP
    assert weight.abs().min() > 0


@pytest.mark.parametrize("bad", [False, True])
def test_another_optimizers_scaler_state_counts_and_is_forgotten(bad):
    """One scaler, one optimizer that the guard does not step."""
    ours, other = (nn.Linear(2, 2) for _ in range(2))
    optimizer = fastguard.AdamW(ours.parameters(), lr=0.1)
    alone = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = GradGuard(ours, 1.0)
    for _ in range(2):
        loss = ours(torch.ones(1, 2)).sum() + other(torch.ones(1, 2)).sum()
        scaler.scale(loss).backward()
        if bad:
            other.weight.grad.fill_(math.inf)
        scaler.step(alone)
        guard.step(optimizer, scaler=scaler)
    assert scaler.get_scale() == (2.0 if bad else 8.0)
