"""A loader goes on where another one stopped, with any number of workers."""

import itertools
import os
import signal

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from fastguard.speech.data.batching import SpeechDataset, collate
from fastguard.speech.data.features import Augment, LogMel, SpecAugment, SpeedPerturb
from fastguard.speech.data.loader import make_loader
from fastguard.speech.data.sampler import BucketBatchSampler
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.data.utterances import Utterance

TOKENIZER = CharTokenizer.from_texts([])
LOG_MEL = LogMel()


@pytest.fixture
def many(tmp_path, record):
    """Eleven recordings; the second is gone."""
    made = [
        Utterance(f"{i}", record(tmp_path / f"{i}.wav", 0.3 + i / 20), "abc", "train", 0.3 + i / 20)
        for i in range(11)
    ]
    made[1].audio.unlink()
    return made


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
