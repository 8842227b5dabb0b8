import itertools
import os
import signal

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from fastguard.speech.data.batching import (
    BucketBatchSampler,
    Draw,
    Item,
    SpeechDataset,
    collate,
    make_loader,
)
from fastguard.speech.data.corpora import Utterance
from fastguard.speech.data.features import Augment, LogMel, SpecAugment, SpeedPerturb
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.tokenizer import CharTokenizer

durations = st.lists(st.floats(0.1, 20.0), max_size=300)
epochs = st.integers(0, 5)
TOKENIZER = CharTokenizer.from_texts([])
LOG_MEL = LogMel()


@pytest.fixture
def utterances(tmp_path, record):
    return [
        Utterance(text, record(tmp_path / f"{text}.wav", seconds), text, "train", seconds)
        for text, seconds in [("one", 0.5), ("three", 1.0), ("no", 0.25)]
    ]


@pytest.fixture
def many(tmp_path, record):
    """Eleven recordings; the second is gone."""
    made = [
        Utterance(f"{i}", record(tmp_path / f"{i}.wav", 0.3 + i / 20), "abc", "train", 0.3 + i / 20)
        for i in range(11)
    ]
    made[1].audio.unlink()
    return made


class Threads(LogMel):
    """Writes down with how many threads it runs."""

    def forward(self, waveform):
        self.threads = torch.get_num_threads()
        return super().forward(waveform)


def item(name, frames, tokens):
    return Item(name, name.upper(), torch.full((frames, 4), float(frames)), torch.tensor(tokens))


def indices(batches):
    return [[draw.index for draw in batch] for batch in batches]


def sampled(durations, epoch=0, **options):
    sampler = BucketBatchSampler(durations, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


# --- items and batches ---------------------------------------------------------------------------


def test_dataset_gives_features_and_tokens(utterances):
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL)
    assert len(dataset) == 3
    got = dataset[Draw(1, 0)]
    assert (got.id, got.text) == ("three", "three")
    assert got.features.shape == (LOG_MEL.num_frames_of(1.0), 80)
    assert got.tokens.dtype == torch.int64
    assert TOKENIZER.decode(got.tokens.tolist()) == "three"
    assert torch.equal(dataset[Draw(1, 9)].features, got.features)  # nothing is augmented


def test_features_take_one_thread(utterances):
    log_mel = Threads()
    SpeechDataset(utterances, TOKENIZER, log_mel)[Draw(0, 0)]
    assert log_mel.threads == 1


def test_augmentation_depends_on_seed_epoch_and_index_alone(utterances):
    augment = Augment(SpeedPerturb((0.9, 1.1)), SpecAugment())
    first = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment, seed=1)
    second = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment, seed=1)
    draws = [Draw(i, epoch) for i in range(3) for epoch in range(3)]
    torch.manual_seed(0)
    forward = {draw: first[draw].features for draw in draws}
    torch.manual_seed(1)
    backward = {draw: second[draw].features for draw in reversed(draws)}
    assert all(torch.equal(forward[draw], backward[draw]) for draw in draws)
    other = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment, seed=2)
    versions = [*(forward[Draw(1, epoch)] for epoch in range(3)), other[Draw(1, 0)].features]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(versions, 2))


def test_two_views_differ_in_their_masks(utterances):
    masks = SpecAugment(freq_masks=1, freq_width=80, time_masks=0)
    augment = Augment(SpeedPerturb((0.9, 1.1)), masks, two_views=True)
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment)
    plain = SpeechDataset(utterances, TOKENIZER, LOG_MEL, Augment(SpeedPerturb((0.9, 1.1))))
    items = [dataset[Draw(1, epoch)] for epoch in range(1, 21)]
    whole = [plain[Draw(1, epoch)].features for epoch in range(1, 21)]
    for item, features in zip(items, whole, strict=True):  # the same speed, and nothing but masks
        for view in (item.features, item.second_view):
            torch.testing.assert_close(view, features.where(view != 0, 0.0))
    different = [not torch.equal(item.features, item.second_view) for item in items]
    assert sum(different) > 15
    again = dataset[Draw(1, 4)]
    assert torch.equal(again.second_view, items[3].second_view)
    assert plain[Draw(1, 0)].second_view is None


def test_masks_and_second_views_begin_after_the_warm_up(utterances):
    augment = Augment(SpeedPerturb((0.9,)), SpecAugment(2, 80), two_views=True, warmup=2)
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment)
    plain = SpeechDataset(utterances, TOKENIZER, LOG_MEL, Augment(SpeedPerturb((0.9,))))
    for epoch in (1, 2):
        item = dataset[Draw(1, epoch)]
        assert torch.equal(item.features, plain[Draw(1, epoch)].features)
        assert item.second_view is None
    item = dataset[Draw(1, 3)]
    assert not torch.equal(item.features, plain[Draw(1, 3)].features)
    assert item.second_view is not None


def test_a_batch_of_two_views():
    tokens = [torch.tensor([1]), torch.tensor([2, 3])]
    items = [
        Item(str(n), "", torch.full((n, 4), float(n)), tokens[n - 1], torch.full((n, 4), -float(n)))
        for n in (1, 2)
    ]
    batch = collate([*items, Rejected("gone", "torn")])
    assert (len(batch), batch.views, batch.ids) == (2, 2, ["1", "2"])
    assert batch.features[:, 0, 0].tolist() == [1, 2, -1, -2]
    assert batch.feature_lengths.tolist() == [1, 2, 1, 2]
    assert batch.targets.tolist() == [1, 2, 3, 1, 2, 3]
    assert batch.target_lengths.tolist() == [1, 2, 1, 2]
    assert batch.to("cpu").views == 2
    assert len(collate([Rejected("gone", "torn")], 4)) == 0


def test_speeds_change_the_length(utterances):
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL, Augment(SpeedPerturb()))
    lengths = {len(dataset[Draw(1, epoch)].features) for epoch in range(30)}
    assert lengths == {91, 101, 112}


@pytest.mark.parametrize(
    "limits",
    [
        {"max_output_length": lambda seconds: int(seconds * 6)},  # "three": 5 letters, 1 repeat
        {"max_duration": 1.0, "min_duration": 1.0},
    ],
)
def test_a_speed_that_does_not_fit_is_left_out(utterances, limits):
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL, Augment(SpeedPerturb()), **limits)
    lengths = {len(dataset[Draw(1, epoch)].features) for epoch in range(30)}
    assert lengths == ({101, 112} if "max_output_length" in limits else {101})


@pytest.mark.parametrize(
    "samples, options, kind",
    [
        (None, {}, "no recording"),
        (np.full(16_000, np.nan), {}, "samples not finite"),
        (np.full(16_000, 1e30), {}, "features not finite"),
        (np.zeros(0), {}, "too short"),
        (np.zeros(1_000), {}, "too short"),
        (np.zeros(16_000), {"max_duration": 0.5}, "too long"),
        (np.zeros(16_000), {"max_output_length": lambda seconds: 5}, "infeasible target"),
    ],
)
def test_what_can_not_be_used_when_it_is_loaded_is_rejected(tmp_path, samples, options, kind):
    path = tmp_path / "a.wav"
    if samples is not None:
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    row = Utterance("a", path, "three", "train", 1.0)
    got = SpeechDataset([row], TOKENIZER, LOG_MEL, **options)[Draw(0, 0)]
    assert (got.id, got.kind) == ("a", kind)


def test_a_text_without_tokens_is_rejected(tmp_path, record):
    row = Utterance("a", record(tmp_path / "a.wav"), "été", "dev", 1.0)
    got = SpeechDataset([row], TOKENIZER, LOG_MEL)[Draw(0, 0)]
    assert got.kind == "no tokens"
    assert "['é']" in got.reason


def test_collate_pads_features_and_joins_targets():
    batch = collate([item("a", 3, [1, 2]), Rejected("c", "why"), item("b", 5, [7, 8, 9])])
    assert len(batch) == 2
    assert batch.features.shape == (2, 5, 4)
    assert batch.features.dtype == torch.float32
    assert (batch.features[0, :3] == 3).all()
    assert (batch.features[0, 3:] == 0).all()
    assert (batch.features[1] == 5).all()
    assert batch.feature_lengths.tolist() == [3, 5]
    assert batch.targets.tolist() == [1, 2, 7, 8, 9]
    assert batch.target_lengths.tolist() == [2, 3]
    assert (batch.ids, batch.texts) == (["a", "b"], ["A", "B"])
    assert batch.rejected == [Rejected("c", "why")]


@pytest.mark.parametrize("items", [[item("a", 3, [1])], [Rejected("c", "why")]])
def test_a_batch_keeps_its_types_when_nothing_is_left(items):
    batch = collate(items, n_mels=4)
    assert batch.features.dtype == torch.float32
    for integers in (batch.feature_lengths, batch.targets, batch.target_lengths):
        assert integers.dtype == torch.int64
    if isinstance(items[0], Rejected):
        assert batch.features.shape == (0, 0, 4)
        assert (len(batch), batch.ids, batch.rejected) == (0, [], items)


def test_a_batch_is_what_ctc_loss_takes():
    batch = collate([item("a", 8, [1, 2]), item("b", 9, [3, 3, 1])])
    log_probs = torch.zeros(9, 2, 5).log_softmax(dim=-1)
    loss = torch.nn.functional.ctc_loss(
        log_probs, batch.targets, batch.feature_lengths, batch.target_lengths, reduction="none"
    )
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_to_moves_every_tensor_and_leaves_the_batch():
    batch = collate([item("a", 3, [1, 2]), Rejected("c", "why")])
    moved = batch.to("meta")
    for name in ("features", "feature_lengths", "targets", "target_lengths"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert (moved.ids, moved.texts, moved.rejected) == (["a"], ["A"], batch.rejected)


# --- the order of batches ------------------------------------------------------------------------


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


def make(utterances, num_workers):
    augment = Augment(SpeedPerturb(), SpecAugment())
    dataset = SpeechDataset(utterances, TOKENIZER, LOG_MEL, augment, seed=7)
    sampler = BucketBatchSampler([u.duration for u in utterances], batch_size=2, seed=7)
    sampler.set_epoch(1)
    return make_loader(dataset, sampler, num_workers)


def equal(first, second):
    tensors = ("features", "feature_lengths", "targets", "target_lengths")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors) and (
        first.ids,
        first.texts,
        first.rejected,
    ) == (second.ids, second.texts, second.rejected)


@pytest.mark.parametrize("num_workers, resumed_with", [(0, 0), (2, 2), (2, 0), (0, 1)])
@pytest.mark.parametrize("taken", [0, 1, 4, 6, 7])  # 6: the last batch; 7: the end of the pass
def test_a_loader_resumes_bit_for_bit(many, tmp_path, num_workers, resumed_with, taken):
    uninterrupted = make(many, 0)
    first, second = list(uninterrupted), list(uninterrupted)
    assert len(first) == 6
    assert sum(len(batch.rejected) for batch in first) == 1

    stopped = make(many, num_workers)
    batches = list(itertools.islice(stopped, taken))
    assert all(map(equal, batches, first))
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = make(many, resumed_with)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state_dict()["position"] == min(taken, 6)
    for expected in (first[taken:], second):
        got = list(resumed)
        assert len(got) == len(expected)
        assert all(map(equal, got, expected))


def test_torchdatas_own_loader_resumes_the_sampler(many):
    def own():
        loader = make(many, 0)
        return StatefulDataLoader(
            loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=collate, num_workers=2
        )

    expected = list(make(many, 0))
    stopped, resumed = own(), own()
    list(itertools.islice(stopped, 3))
    resumed.load_state_dict(stopped.state_dict())
    got = list(resumed)
    assert len(got) == 3
    assert all(map(equal, got, expected[3:]))


def test_a_loader_refuses_a_state_of_another_corpus_at_once(many):
    state = make(many, 0).state_dict()
    with pytest.raises(ValueError, match=r"utterances \(was 11, is 10\)"):
        make(many[1:], 0).load_state_dict(state)


def test_workers_outlive_an_interrupt(many):
    loader = make(many, 2)
    batches = iter(loader)
    first = next(batches)
    for worker in batches._batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len([first, *batches]) == 6
