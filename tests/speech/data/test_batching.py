"""Recordings to features and tokens, and these to batches."""

import itertools

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.data.batching import Item, SpeechDataset, collate
from fastguard.speech.data.features import Augment, LogMel, SpecAugment, SpeedPerturb
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.sampler import Draw
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.data.utterances import Utterance

TOKENIZER = CharTokenizer.from_texts([])
LOG_MEL = LogMel()


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
