import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.batching import BucketBatchSampler, Item, SpeechDataset, collate
from fastguard.speech.corpora import Utterance
from fastguard.speech.features import LogMel, SpecAugment
from fastguard.speech.tokenizer import CharTokenizer

durations = st.lists(st.floats(0.1, 20.0), max_size=300)
epochs = st.integers(0, 5)


@pytest.fixture
def utterances(tmp_path, record):
    return [
        Utterance(text, record(tmp_path / f"{text}.wav", seconds), text, "train", seconds)
        for text, seconds in [("one", 0.5), ("three", 1.0), ("no", 0.25)]
    ]


class Threads(LogMel):
    """Writes down with how many threads it runs."""

    def forward(self, waveform):
        self.threads = torch.get_num_threads()
        return super().forward(waveform)


def item(name, frames, tokens):
    return Item(name, name.upper(), torch.full((frames, 4), float(frames)), torch.tensor(tokens))


def test_dataset_gives_features_and_tokens(utterances):
    tokenizer, log_mel = CharTokenizer.from_texts([]), LogMel()
    dataset = SpeechDataset(utterances, tokenizer, log_mel)
    assert len(dataset) == 3
    got = dataset[1]
    assert (got.id, got.text) == ("three", "three")
    assert got.features.shape == (log_mel.num_frames_of(1.0), 80)
    assert got.tokens.dtype == torch.int64
    assert tokenizer.decode(got.tokens.tolist()) == "three"
    assert torch.equal(dataset[1].features, got.features)


def test_features_take_one_thread(utterances):
    log_mel = Threads()
    SpeechDataset(utterances, CharTokenizer.from_texts([]), log_mel)[0]
    assert log_mel.threads == 1


def test_only_an_augmented_dataset_draws(utterances):
    tokenizer, log_mel = CharTokenizer.from_texts([]), LogMel()
    plain = SpeechDataset(utterances, tokenizer, log_mel)
    augmented = SpeechDataset(utterances, tokenizer, log_mel, SpecAugment())
    torch.manual_seed(0)
    assert not torch.equal(augmented[1].features, plain[1].features)


def test_collate_pads_features_and_joins_targets():
    batch = collate([item("a", 3, [1, 2]), item("b", 5, [7, 8, 9])])
    assert batch.features.shape == (2, 5, 4)
    assert batch.features.dtype == torch.float32
    assert (batch.features[0, :3] == 3).all()
    assert (batch.features[0, 3:] == 0).all()
    assert (batch.features[1] == 5).all()
    assert batch.feature_lengths.tolist() == [3, 5]
    assert batch.targets.tolist() == [1, 2, 7, 8, 9]
    assert batch.target_lengths.tolist() == [2, 3]
    assert (batch.ids, batch.texts) == (["a", "b"], ["A", "B"])
    for integers in (batch.feature_lengths, batch.targets, batch.target_lengths):
        assert integers.dtype == torch.int64


def test_a_batch_is_what_ctc_loss_takes():
    batch = collate([item("a", 8, [1, 2]), item("b", 9, [3, 3, 1])])
    log_probs = torch.zeros(9, 2, 5).log_softmax(dim=-1)
    loss = torch.nn.functional.ctc_loss(
        log_probs, batch.targets, batch.feature_lengths, batch.target_lengths, reduction="none"
    )
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_to_moves_every_tensor_and_leaves_the_batch():
    batch = collate([item("a", 3, [1, 2])])
    moved = batch.to("meta")
    for name in ("features", "feature_lengths", "targets", "target_lengths"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert (moved.ids, moved.texts) == (["a"], ["A"])


@given(durations, st.integers(1, 9), st.integers(0, 9), epochs, st.booleans())
def test_every_utterance_comes_once_an_epoch(durations, batch_size, seed, epoch, shuffle):
    sampler = BucketBatchSampler(durations, batch_size, seed, shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(durations)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(durations, st.integers(1, 9), st.integers(0, 9), epochs)
def test_the_order_depends_on_seed_and_epoch_alone(durations, batch_size, seed, epoch):
    first = BucketBatchSampler(durations, batch_size, seed)
    first.set_epoch(epoch)
    list(first)
    second = BucketBatchSampler(durations, batch_size, seed)
    second.set_epoch(epoch)
    assert list(first) == list(second)


def test_other_epochs_and_other_seeds_have_other_orders():
    lengths = [float(i % 17) for i in range(200)]
    orders = []
    for seed in range(3):
        sampler = BucketBatchSampler(lengths, 4, seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
    assert all(orders[i] != orders[j] for i in range(9) for j in range(i))


def test_batches_are_short_of_padding_and_not_in_order_of_length():
    lengths = torch.rand(1_000, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[lengths[i] for i in batch] for batch in BucketBatchSampler(lengths, 4, seed=0)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 0.05  # 0.6 for random batches of 4
    means = torch.tensor([sum(batch) / len(batch) for batch in batches])
    assert 0.3 < (means.diff() > 0).float().mean() < 0.7


def test_neighbours_change_between_epochs():
    sampler = BucketBatchSampler([float(i) for i in range(1_000)], 4, seed=0)
    neighbours = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        neighbours.append({frozenset(batch) for batch in sampler})
    assert len(neighbours[0] & neighbours[1]) < 25


def test_without_shuffle_the_epoch_is_sorted():
    sampler = BucketBatchSampler([3.0, 1.0, 2.0, 5.0, 4.0], 2, seed=0, shuffle=False)
    assert list(sampler) == [[1, 2], [0, 4], [3]]
    sampler.set_epoch(1)
    assert list(sampler) == [[1, 2], [0, 4], [3]]


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size is 0"):
        BucketBatchSampler([1.0], 0, seed=0)
