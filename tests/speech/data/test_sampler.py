"""Batches of similar length, each utterance once an epoch, in an order that can be resumed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.data.sampler import BucketBatchSampler, Draw

durations = st.lists(st.floats(0.1, 20.0), max_size=300)
epochs = st.integers(0, 5)


def indices(batches):
    return [[draw.index for draw in batch] for batch in batches]


def sampled(durations, epoch=0, **options):
    sampler = BucketBatchSampler(durations, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(durations, st.integers(1, 9), st.integers(0, 9), epochs, st.booleans())
def test_every_utterance_comes_once_an_epoch(durations, batch_size, seed, epoch, shuffle):
    sampler = BucketBatchSampler(durations, batch_size=batch_size, seed=seed, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    drawn = sorted(draw for batch in batches for draw in batch)
    assert drawn == [Draw(index, epoch) for index in range(len(durations))]
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(durations, st.floats(1.0, 60.0), st.booleans())
def test_a_batch_lasts_no_longer_than_its_budget(durations, batch_duration, shuffle):
    batches = indices(sampled(durations, batch_duration=batch_duration, shuffle=shuffle))
    assert sorted(itertools.chain(*batches)) == list(range(len(durations)))
    for batch in batches:
        longest = max(durations[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_duration


def test_a_budget_is_used():
    lengths = torch.rand(1_000, generator=torch.Generator().manual_seed(0)).add(0.5).tolist()
    batches = indices(sampled(lengths, batch_duration=20.0))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert sum(padded) / len(padded) > 17
    assert sum(lengths) / sum(padded) > 0.97


@given(durations, st.integers(1, 9), st.integers(0, 9), epochs)
def test_the_order_depends_on_seed_and_epoch_alone(durations, batch_size, seed, epoch):
    options = {"batch_size": batch_size, "seed": seed}
    used = BucketBatchSampler(durations, **options)
    list(used)
    used.set_epoch(epoch)
    assert list(used) == sampled(durations, epoch, **options)


def test_other_epochs_and_other_seeds_have_other_orders():
    lengths = [float(i % 17) for i in range(200)]
    orders = [
        indices(sampled(lengths, epoch, batch_size=4, seed=seed))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_a_pass_after_a_whole_one_is_the_next_epoch():
    sampler = BucketBatchSampler([1.0, 2.0, 3.0], batch_size=2)
    sampler.set_epoch(4)
    assert [{d.epoch for batch in sampler for d in batch} for _ in range(2)] == [{4}, {5}]
    next(iter(sampler))  # 6, left early
    assert {d.epoch for batch in sampler for d in batch} == {6}


def test_batches_are_short_of_padding_and_not_in_order_of_length():
    lengths = torch.rand(1_000, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[lengths[i] for i in batch] for batch in indices(sampled(lengths, batch_size=4))]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 0.05  # 0.6 for random batches of 4
    means = torch.tensor([sum(batch) / len(batch) for batch in batches])
    assert 0.3 < (means.diff() > 0).float().mean() < 0.7


def test_neighbours_change_between_epochs():
    lengths = [float(i) for i in range(1_000)]
    first, second = (
        {frozenset(batch) for batch in indices(sampled(lengths, epoch, batch_size=4))}
        for epoch in range(2)
    )
    assert len(first & second) < 25


def test_without_shuffle_the_epoch_is_sorted():
    for epoch in range(2):
        batches = sampled([3.0, 1.0, 2.0, 5.0, 4.0], epoch, batch_size=2, shuffle=False)
        assert indices(batches) == [[1, 2], [0, 4], [3]]


@given(durations, st.integers(1, 5), st.booleans(), epochs)
def test_ranks_share_an_epoch(durations, world_size, by_size, epoch):
    options = {"batch_size": 3} if by_size else {"batch_duration": 40.0}
    whole = {tuple(b) for b in indices(sampled(durations, epoch, **options))}
    ranks = [
        indices(sampled(durations, epoch, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-len(whole) // world_size)}
    given_out = [tuple(b) for batches in ranks for b in batches]
    assert set(given_out) == whole
    assert len(given_out) - len(whole) < world_size


def test_ranks_have_batches_of_similar_duration_in_a_step():
    lengths = torch.rand(1_001, generator=torch.Generator().manual_seed(0)).tolist()
    ranks = [indices(sampled(lengths, batch_size=4, rank=rank, world_size=4)) for rank in range(4)]
    longest = torch.tensor([[max(lengths[i] for i in b) for b in batches] for batches in ranks])
    assert (longest.amax(0) - longest.amin(0)).max() < 0.05
    assert longest.argmax(0).unique().tolist() == [0, 1, 2, 3]  # the longest is not always one's


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_duration": 0.0}, "batch_duration is 0.0"),
        ({}, "give one of them"),
        ({"batch_size": 1, "batch_duration": 1.0}, "give one of them"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2 of 2"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler([1.0], **options)


# --- resume --------------------------------------------------------------------------------------


def test_a_sampler_goes_on_where_another_stopped():
    lengths = [float(i % 7 + 1) for i in range(40)]
    whole = BucketBatchSampler(lengths, batch_duration=20.0, seed=3)
    whole.set_epoch(2)
    batches = list(whole)
    for taken in (0, 1, 5, len(batches)):
        stopped = BucketBatchSampler(lengths, batch_duration=20.0, seed=3)
        stopped.set_epoch(2)
        assert list(itertools.islice(stopped, taken)) == batches[:taken]
        resumed = BucketBatchSampler(lengths, batch_duration=20.0, seed=3)
        resumed.load_state_dict(stopped.state_dict())
        resumed.set_epoch(2)  # what a training loop says at the start of its epoch
        assert list(resumed) == batches[taken:]
        assert list(resumed) == sampled(lengths, 3, batch_duration=20.0, seed=3)


def test_set_epoch_gives_up_a_position_in_another_epoch():
    stopped = BucketBatchSampler([1.0, 2.0, 3.0], batch_size=1)
    list(itertools.islice(stopped, 2))
    resumed = BucketBatchSampler([1.0, 2.0, 3.0], batch_size=1)
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(1)
    assert list(resumed) == sampled([1.0, 2.0, 3.0], 1, batch_size=1)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"batch_size": 3}, r"batch_size \(was 2, is 3\)"),
        ({"world_size": 2}, r"world_size \(was 1, is 2\)"),
        ({"durations": [1.0, 2.0]}, r"utterances \(was 3, is 2\), durations"),
        ({"durations": [1.0, 2.0, 4.0]}, r"resumed: durations \(was"),
    ],
)
def test_a_state_of_other_settings_is_refused(change, named):
    options = {"durations": [1.0, 2.0, 3.0], "batch_size": 2}
    state = BucketBatchSampler(**options).state_dict()
    with pytest.raises(ValueError, match=named):
        BucketBatchSampler(**options | change).load_state_dict(state)
