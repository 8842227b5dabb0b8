"""Buffers after a skip are as before it, whatever the forward pass or the user did to them."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard

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


def buffers_of(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_same_buffers(model, expected):
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, b in found.items():
        assert torch.equal(b, expected[name]), name


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


def test_modules_with_a_guard_can_be_copied_and_pickled():
    model = small_model()
    guard = GradGuard(model)
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
