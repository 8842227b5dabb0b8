"""Buffers after a skip are as before it, whatever the forward pass or the user did to them."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, ops
from fastguard.guard import report as step_report
from fastguard.ops.settle import can_settle

from .test_grad_guard import small_model, train_step


class Remembers(nn.Module):
    """Puts things in a buffer's place in its forward pass."""

    def __init__(self, first, put):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))
        self.register_buffer("kept", first)
        self.put = put

    def forward(self, x):
        self.put(self, x)
        return x @ self.weight


def steps(model, *inputs):
    """Guarded steps on these inputs; whether each was skipped."""
    guard = GradGuard(model)
    optimizer = fastguard.AdamW(model.parameters())
    return [train_step(model, optimizer, guard, x).skipped for x in inputs]


GOOD, BAD = torch.ones(6, 4), torch.full((6, 4), math.nan)


def test_a_users_tensor_in_a_buffers_place_is_not_written():
    model = Remembers(torch.zeros(6, 4), lambda self, x: setattr(self, "kept", x))
    batches = [GOOD.clone(), BAD.clone(), GOOD * 2]
    assert steps(model, *batches[:2]) == [False, True]
    assert torch.equal(model.kept, GOOD)
    assert batches[1].isnan().all()
    assert torch.equal(batches[0], GOOD)


def test_an_accepted_buffer_of_another_shape_comes_back():
    model = Remembers(torch.zeros(1), lambda self, x: setattr(self, "kept", x.sum(1)))
    assert steps(model, GOOD, BAD) == [False, True]
    assert model.kept.tolist() == [4.0] * 6


def test_an_accepted_buffer_of_another_dtype_comes_back():
    model = Remembers(torch.zeros(1), lambda self, x: setattr(self, "kept", x.sum().double()[None]))
    assert steps(model, GOOD, BAD) == [False, True]
    assert model.kept.tolist() == [24.0]
    assert model.kept.dtype == torch.float64


def test_a_buffer_that_the_forward_pass_registered_goes_again():
    def put(self, x):
        if x.isnan().any():
            self.register_buffer("new", x)

    model = Remembers(torch.zeros(1), put)
    assert steps(model, GOOD, BAD) == [False, True]
    assert list(model._buffers) == ["kept"]


@pytest.mark.parametrize(
    "first",
    [
        torch.zeros(1).expand(3),
        torch.eye(3).to_sparse_csr(),
        torch.eye(3).to_sparse(),
        torch.zeros(0),
        torch.arange(3),
        None,
    ],
    ids=["expanded", "csr", "coo", "empty", "integer", "none"],
)
def test_buffers_of_all_kinds_stay(first):
    model = Remembers(first, lambda self, x: None)
    assert steps(model, GOOD, BAD, GOOD) == [False, True, False]
    assert model.kept is first


def test_an_expanded_buffer_that_becomes_a_dense_one():
    model = Remembers(torch.zeros(1).expand(6), lambda self, x: setattr(self, "kept", x.sum(1)))
    assert steps(model, GOOD, BAD) == [False, True]
    assert model.kept.tolist() == [4.0] * 6


def test_a_buffer_made_in_inference_mode():
    with torch.inference_mode():
        first = torch.zeros(2)
    model = Remembers(first, lambda self, x: None)
    assert steps(model, GOOD, BAD, GOOD) == [False, True, False]
    assert model.kept.tolist() == [0.0, 0.0]


def test_a_lazy_layer_whose_first_step_is_skipped():
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d(), nn.Linear(8, 1))
    guard = GradGuard(model)
    model(BAD)  # makes the parameters, which an optimizer needs
    optimizer = fastguard.AdamW(model.parameters())
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model[1].running_mean.tolist() == [0.0] * 8
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped
    assert model[1].running_mean.isfinite().all()


def test_a_buffer_in_two_places():
    model = nn.ModuleList([Remembers(torch.zeros(1), _count), Remembers(torch.zeros(1), _count)])
    model[1].kept = model[0].kept
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in (GOOD, BAD):
        optimizer.zero_grad()
        (model[0](x) + model[1](x)).sum().backward()
        guard.step(optimizer)
    assert model[0].kept is model[1].kept
    assert model[0].kept.item() == 2.0


def _count(self, x):
    self.kept += 1


def test_a_module_that_moves_to_another_dtype_and_back():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.randn(6, 4))
    mean = model[1].running_mean.clone()
    model.double()
    assert train_step(model, optimizer, guard, BAD.double()).skipped
    torch.testing.assert_close(model[1].running_mean, mean.double())


def test_parts_that_come_later_are_protected():
    model = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 1))
    guard = GradGuard(model)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), guard, GOOD)
    model[1] = nn.BatchNorm1d(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model[1].running_mean.tolist() == [0.0] * 8
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped
    mean = model[1].running_mean.clone()
    assert train_step(model, optimizer, guard, BAD).skipped
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_loaded_into_the_module_or_a_part_of_it_is_good(whole):
    model = small_model()
    guard = GradGuard(model)
    part = model if whole else model[1]
    part.load_state_dict({k: v + 5 for k, v in part.state_dict().items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model[1].running_mean.tolist() == [5.0] * 8


def test_a_state_loaded_into_a_copy_says_nothing_of_the_module():
    model = small_model()
    guard = GradGuard(model)
    twin = copy.deepcopy(model)
    model(BAD).sum().backward()
    twin.load_state_dict(twin.state_dict())
    assert guard.step(torch.optim.SGD(model.parameters(), lr=0.1)).skipped
    assert model[1].running_mean.tolist() == [0.0] * 8


@pytest.mark.parametrize("measure", ["step", "backward"])
def test_modules_with_a_guard_can_be_copied_and_pickled(measure):
    model = small_model()
    guard = GradGuard(model, measure=measure)
    again = pickle.loads(pickle.dumps(model))
    again.load_state_dict(copy.deepcopy(model).state_dict())
    del guard
    again.load_state_dict(model.state_dict())


def test_what_the_user_commits_is_kept():
    model = small_model()
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, guard, torch.randn(6, 4))
    torch.optim.swa_utils.update_bn([torch.randn(6, 4)], model)
    guard.commit_buffers()
    mean = model[1].running_mean.clone()
    model.train()
    assert train_step(model, optimizer, guard, BAD).skipped
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.AdamW])
def test_an_average_of_weights_in_a_buffer_follows_accepted_steps_only(make):
    model = small_model()
    model.register_buffer("average", torch.zeros(8, 4))
    optimizer = make(model.parameters(), lr=0.1)

    def update(*_):
        model.average.lerp_(model[0].weight.detach(), 0.5)

    optimizer.register_step_post_hook(update)
    guard = GradGuard(model)
    expected = torch.zeros(8, 4)
    for bad in (False, True, False, True, True):
        report = train_step(model, optimizer, guard, BAD if bad else torch.randn(6, 4))
        if not report.skipped:
            expected = expected.lerp(model[0].weight.detach(), 0.5)
        assert torch.equal(model.average, expected)


def test_loading_a_part_does_not_commit_the_others():
    model = small_model()
    model.add_module("other", nn.BatchNorm1d(3))
    guard = GradGuard(model)
    optimizer = torch.optim.SGD(model[:4].parameters(), lr=0.1)
    model[:4](BAD).sum().backward()
    model.other.load_state_dict({k: v + 2 for k, v in model.other.state_dict().items()})
    assert guard.step(optimizer).skipped
    assert model[1].running_mean.tolist() == [0.0] * 8
    assert model.other.running_mean.tolist() == [2.0] * 3


def test_a_pretrained_layer_that_is_added_keeps_its_statistics():
    model = small_model()
    guard = GradGuard(model)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), guard, GOOD)
    model.append(nn.BatchNorm1d(1))
    model[4].running_mean.fill_(7.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    optimizer.zero_grad()
    model(GOOD).sum().backward()
    assert guard.step(optimizer, loss=math.nan).skipped
    assert model[4].running_mean.tolist() == [7.0]


def test_what_an_exception_left_in_the_buffers_is_not_committed_later():
    model = small_model()
    guard = GradGuard(model)
    optimizer = fastguard.AdamW(model.parameters())
    train_step(model, optimizer, guard, torch.randn(6, 4))
    mean = model[1].running_mean.clone()
    model(BAD)
    with pytest.raises(ValueError, match="loss must be one real number"):
        guard.step(optimizer, loss=torch.ones(2))
    assert torch.equal(model[1].running_mean, mean)


def test_a_replaced_buffer_in_two_places_stays_one():
    shared = torch.zeros(1)

    class Shares(Remembers):
        def __init__(self):
            super().__init__(shared, lambda self, x: None)
            self.register_buffer("again", shared)

        def forward(self, x):
            self.kept = self.again = x.sum(0)[:1].detach()
            return super().forward(x)

    model = Shares()
    assert steps(model, GOOD, BAD) == [False, True]
    assert model.kept is model.again
    assert model.kept.tolist() == [6.0]


@pytest.mark.parametrize("x, healed", [(GOOD, False), (BAD, True)])
def test_a_refused_micro_batch_leaves_good_buffers_and_no_nan(x, healed):
    model = small_model()
    guard = GradGuard(model)
    mean = model[1].running_mean.clone()
    model(x).sum().backward()
    with pytest.raises(ValueError, match="weight must be a positive number"):
        guard.accumulate(weight=0.0)
    assert torch.equal(model[1].running_mean, mean) == healed
    assert model[1].running_mean.isfinite().all()


def test_a_buffer_that_is_infinite_by_nature_heals_nothing():
    model = small_model()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    guard = GradGuard(model)
    model(GOOD).sum().backward()
    mean = model[1].running_mean.clone()
    with pytest.raises(ValueError, match="loss must be one"):
        guard.step(fastguard.AdamW(model.parameters()), loss=torch.ones(2))
    assert torch.equal(model[1].running_mean, mean)


# --- what was finite is never committed as NaN --------------------------------------------------


def poison(model, value=math.nan, place=0):
    """As a forward pass outside of the guarded step does."""
    model[1].running_mean[place] = value


def buffers_of(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_same_buffers(model, expected):
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, b in found.items():
        assert torch.equal(b, expected[name]), name


def gan(**options):
    torch.manual_seed(0)
    nets = [small_model() for _ in range(2)]
    nets[1][3] = nn.Linear(8, 4)  # latents of 4, pictures of 4
    optimizers = [fastguard.AdamW(net.parameters(), lr=0.01) for net in nets]
    return nets, optimizers


def gan_steps(nets, optimizers, guards, latents):
    (critic, generator), verdicts = nets, []
    for step, latent in enumerate(latents):
        for net in nets:
            net.zero_grad()
        real = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        (critic(generator(latent).detach()) - critic(real)).mean().backward()
        verdicts.append(guards[0].step(optimizers[0]).skipped)
        for net in nets:
            net.zero_grad()
        good = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 + step))
        (-critic(generator(good))).mean().backward()
        verdicts.append(guards[1].step(optimizers[1]).skipped)
    return verdicts


@pytest.mark.parametrize("named", [False, True])
def test_a_gans_bad_latent_leaves_no_nan_in_the_other_nets_statistics(named, caplog):
    nets, optimizers = gan()
    critic, generator = nets
    guards = [GradGuard(critic, buffers=[generator] if named else ()), GradGuard(generator)]
    latents = [torch.randn(6, 4), torch.full((6, 4), math.nan), torch.randn(6, 4)]
    verdicts = gan_steps(nets, optimizers, guards, latents)
    assert verdicts == [False, False, True, False, False, False]
    for net in nets:
        assert all(b.isfinite().all() for b in net.buffers())
        assert net.eval()(torch.randn(6, 4)).isfinite().all()
    said = [r.getMessage() for r in caplog.records if "became NaN or Inf" in r.getMessage()]
    assert len(said) == (0 if named else 2)  # the mean and the variance
    if not named:
        assert said[0].startswith("The buffer 1.running_mean became NaN or Inf though")
        assert "GradGuard(buffers=[...])" in said[0]
        # The count of that layer went back with them: both forward passes of the second round.
        assert generator[1].num_batches_tracked == 4


@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_buffer_that_became_nan_is_put_back_in_an_accepted_step(make, value, caplog):
    """With the others of its module, and no others; the parameters are stepped."""
    model = small_model()
    model.append(nn.BatchNorm1d(1))
    optimizer, guard = make(model.parameters(), lr=0.1), GradGuard(model)
    train_step(model, optimizer, guard, torch.randn(6, 4))
    before, weight = buffers_of(model), model[0].weight.detach().clone()
    optimizer.zero_grad()
    model(torch.randn(6, 4)).square().mean().backward()
    poison(model, value, place=3)
    other = buffers_of(model[4])
    for _ in range(2):  # the same verdict is said once
        assert not guard.step(optimizer).skipped
        assert_same_buffers(model[1], {k[2:]: v for k, v in before.items() if k[0] == "1"})
        assert_same_buffers(model[4], other)
        poison(model, value, place=3)
    assert not torch.equal(model[0].weight.detach(), weight)
    said = [r.getMessage() for r in caplog.records if "became NaN or Inf" in r.getMessage()]
    assert len(said) == 1 and "1.running_mean " in said[0]
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped  # heals
    train_step(model, optimizer, guard, torch.randn(6, 4))
    assert model[1].num_batches_tracked == before["1.num_batches_tracked"] + 1


def test_an_infinity_that_was_there_before_is_committed():
    model = small_model()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf, 1.0]))
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model.mask[0] = 5.0
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.mask[2] = math.nan
    assert not train_step(model, optimizer, guard, GOOD).skipped
    assert model.mask.tolist() == [5.0, -math.inf, 1.0]


@pytest.mark.parametrize(
    "put",
    [
        lambda self, x: setattr(self, "kept", self.kept + self.bad),
        lambda self, x: setattr(self, "kept", x.sum(1) + self.bad),  # of another shape
        lambda self, x: setattr(self, "kept", self.kept.double() + self.bad),
    ],
    ids=["replaced", "another shape", "another dtype"],
)
def test_a_replaced_buffer_that_is_not_finite_is_not_committed(put, caplog):
    model = Remembers(torch.ones(2), put)
    model.bad = 0.0
    model.register_buffer("count", torch.tensor(0))
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    assert not train_step(model, optimizer, guard, GOOD).skipped
    before = model.kept.clone()
    model.bad = math.nan
    optimizer.zero_grad()
    model(GOOD).sum().backward()
    model.count += 1
    assert not guard.step(optimizer).skipped
    assert torch.equal(model.kept, before) and model.count == 0
    assert "The buffer kept became NaN or Inf" in caplog.text
    assert train_step(model, optimizer, guard, BAD).skipped
    assert torch.equal(model.kept, before)


def test_a_micro_batch_that_is_good_does_not_commit_a_nan(caplog):
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    for bad in (False, True, False):
        model(torch.randn(6, 4)).square().mean().backward()
        if bad:
            poison(model)
        assert not guard.accumulate().skipped
        assert model[1].running_mean.isfinite().all()
    assert not guard.step(optimizer).skipped
    assert model[1].num_batches_tracked == 2
    assert caplog.text.count("1.running_mean became NaN or Inf") == 1


def test_the_host_learns_of_it_later_on_a_device(monkeypatch, caplog):
    ready = False
    monkeypatch.setattr(step_report.Transfer, "ready", property(lambda self: ready))
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model(GOOD).square().mean().backward()
    poison(model)
    guard.step(optimizer)
    assert model[1].running_mean.isfinite().all() and not caplog.text
    ready = True
    guard.poll()
    assert "1.running_mean became NaN or Inf" in caplog.text


@pytest.mark.parametrize("kind", ["module", "modules", "pairs", "generator of pairs"])
def test_more_buffers_are_kept_as_the_modules_own(kind):
    model, other = small_model(), small_model()
    given = {
        "module": other,
        "modules": [nn.ReLU(), other],
        "pairs": list(other.named_buffers()),
        "generator of pairs": other.named_buffers(),
    }[kind]
    guard = GradGuard(model, buffers=given)
    optimizer = fastguard.AdamW(model.parameters())
    other(GOOD * 3)
    assert not train_step(model, optimizer, guard, GOOD).skipped
    kept = buffers_of(other)
    other(GOOD * 5)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(other, kept)
    if "pairs" not in kind:  # what is loaded into it, or into a part, is good
        other[1].load_state_dict({k: v + 2 for k, v in other[1].state_dict().items()})
        kept = buffers_of(other)
        assert train_step(model, optimizer, guard, BAD).skipped
        assert_same_buffers(other, kept)


def test_parameters_alone_with_buffers():
    model = small_model()
    guard = GradGuard(model.parameters(), buffers=model)
    optimizer = fastguard.AdamW(model.parameters())
    before = buffers_of(model)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(model, before)


@pytest.mark.parametrize("wrong", ["model", [3], [torch.zeros(1)], [("name", None)]])
def test_what_is_no_buffer_is_refused(wrong):
    with pytest.raises(TypeError, match=r"buffers are modules or \(name, buffer\) pairs"):
        GradGuard(small_model(), buffers=wrong)


# --- where modules come from --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_state_dict", "commit_buffers", "GradGuard"])
def test_what_is_committed_in_inference_mode_can_be_written_later(how):
    model = small_model()
    guard = GradGuard(model)
    with torch.inference_mode():
        if how == "load_state_dict":
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        elif how == "commit_buffers":
            model.eval()(GOOD)
            guard.commit_buffers()
        else:
            guard = GradGuard(model)
    model.train()
    optimizer = fastguard.AdamW(model.parameters())
    assert not train_step(model, optimizer, guard, GOOD).skipped
    kept = buffers_of(model)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(model, kept)


def test_a_buffer_that_is_assigned_in_inference_mode():
    model = small_model()
    model.register_buffer("cache", torch.zeros(2))
    guard, optimizer = GradGuard(model), fastguard.AdamW(model.parameters())
    with torch.inference_mode():
        model.cache = model.cache + 1
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache += math.nan
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("first", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("make", [fastguard.AdamW, torch.optim.SGD])
def test_a_guard_built_on_the_meta_device(make, first):
    with torch.device("meta"):
        model = small_model()
        guard = GradGuard(model, max_norm=0.5)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = make(model.parameters(), lr=0.1)
    assert train_step(model, optimizer, guard, first).skipped == first.isnan().any()
    assert not train_step(model, optimizer, guard, torch.randn(6, 4)).skipped
    kept = buffers_of(model)
    assert all(b.isfinite().all() for b in kept.values())
    assert train_step(model, optimizer, guard, BAD).skipped
    assert_same_buffers(model, kept)


def test_a_buffer_that_moves_to_the_meta_device():
    """There are no values in it then: nothing to look at, and nothing to put back."""
    model = small_model()
    model.register_buffer("cache", torch.ones(2))
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache = model.cache.to("meta")
    kept = buffers_of(model)
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.is_meta
    del kept["cache"]
    assert all(torch.equal(model.get_buffer(name), value) for name, value in kept.items())


def test_a_deep_copy_with_a_guard_of_its_own():
    model = small_model()
    guard = GradGuard(model)
    twin, twin_guard = copy.deepcopy((model, guard))
    optimizer = fastguard.AdamW(twin.parameters())
    mean = model[1].running_mean.clone()
    assert not train_step(twin, optimizer, twin_guard, GOOD).skipped
    kept = buffers_of(twin)
    assert train_step(twin, optimizer, twin_guard, BAD).skipped
    assert_same_buffers(twin, kept)
    assert torch.equal(model[1].running_mean, mean)


def test_buffers_that_no_state_dict_holds():
    model = small_model()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model.cache += 1
    assert not train_step(model, optimizer, guard, GOOD).skipped
    model.cache += math.nan
    assert train_step(model, optimizer, guard, BAD).skipped
    assert model.cache.tolist() == [1.0, 1.0]


def test_a_buffer_on_another_device_than_the_verdict(monkeypatch):
    """As after a rollback, whose verdict is the host's: no kernel is asked for both."""
    buffer, saved = torch.ones(2), torch.zeros(2)
    elsewhere = torch.ones(2, device="meta")
    assert can_settle([buffer], [saved], torch.device("cpu"))
    assert not can_settle([buffer, elsewhere], [saved, elsewhere], torch.device("cpu"))


@pytest.mark.parametrize("verdict", [ops.Verdict.APPLY, ops.Verdict.SKIP_NONFINITE])
def test_buffers_that_share_memory_are_settled_as_one(verdict):
    """Many enough that several threads write them."""
    before, now = torch.arange(300_000.0), torch.arange(300_000.0) + 0.5
    memory = now.clone()
    buffers = [memory[:200_000], memory[100_000:]] * 4
    saved = [before[:200_000].clone(), before[100_000:].clone()] * 4
    ops.settle_(buffers, saved, torch.tensor(int(verdict)), torch.arange(8))
    expected = before if verdict.skipped else now
    assert torch.equal(memory, expected)
    assert all(map(torch.equal, saved, [expected[:200_000], expected[100_000:]] * 4))
