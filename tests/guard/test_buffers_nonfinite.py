"""A buffer that was finite is never committed as NaN or Inf."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard
from fastguard.guard import report as step_report

from .test_buffers import BAD, GOOD, Remembers, assert_same_buffers, buffers_of
from .test_grad_guard import small_model, train_step

# --- what was finite is never committed as NaN --------------------------------------------------


def poison(model, value=math.nan, place=0):
    """As a forward pass outside of the guarded step does."""
    model[1].running_mean[place] = value


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
