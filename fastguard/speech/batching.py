"""Utterances to padded batches of similar length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from fastguard.speech.corpora import Utterance
from fastguard.speech.features import LogMel, SpecAugment, load_audio, one_thread
from fastguard.speech.tokenizer import CharTokenizer


@dataclass
class Item:
    id: str
    text: str
    features: Tensor  # (T, F) float32
    tokens: Tensor  # (U,) int64


@dataclass
class Batch:
    """B utterances; ``targets`` holds their tokens one after the other, as torch's CTC loss takes
    them."""

    features: Tensor  # (B, T, F) float32, zeros after the end
    feature_lengths: Tensor  # (B,) int64
    targets: Tensor  # (sum of target_lengths,) int64
    target_lengths: Tensor  # (B,) int64
    ids: list[str]
    texts: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """A batch whose four tensors lie on ``device``."""
        return replace(
            self,
            features=self.features.to(device),
            feature_lengths=self.feature_lengths.to(device),
            targets=self.targets.to(device),
            target_lengths=self.target_lengths.to(device),
        )


class SpeechDataset(Dataset[Item]):
    """Features and tokens of each utterance; ``augment`` masks the features of a training set."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: CharTokenizer,
        log_mel: LogMel,
        augment: SpecAugment | None = None,
    ) -> None:
        self.utterances = utterances
        self.tokenizer = tokenizer
        self.log_mel = log_mel
        self.augment = augment

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Item:
        utterance = self.utterances[index]
        with one_thread():
            features = self.log_mel(load_audio(utterance.audio, self.log_mel.sample_rate))
            if self.augment is not None:
                features = self.augment(features)
        tokens = torch.tensor(self.tokenizer.encode(utterance.text))
        return Item(utterance.id, utterance.text, features, tokens)


def collate(items: Sequence[Item]) -> Batch:
    return Batch(
        features=pad_sequence([item.features for item in items], batch_first=True),
        feature_lengths=torch.tensor([len(item.features) for item in items]),
        targets=torch.cat([item.tokens for item in items]),
        target_lengths=torch.tensor([len(item.tokens) for item in items]),
        ids=[item.id for item in items],
        texts=[item.text for item in items],
    )


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of utterances of similar duration, each utterance once an epoch.

    Shuffled utterances are cut into pools of POOL batches; a pool is sorted by duration and cut
    into batches, and the batches of all pools are shuffled.  So batches are padded little, and an
    utterance meets other neighbours in each epoch.  The order depends on ``seed`` and the epoch
    alone.  Without ``shuffle`` all utterances are one pool and stay sorted.

    ``durations`` may be in any unit.  Raises ValueError for a batch size under 1.
    """

    POOL = 50

    def __init__(
        self, durations: Sequence[float], batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        self.durations = list(durations)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.durations) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.durations)))
        if not self.shuffle:
            return iter(self._batches(order))
        draw = random.Random(f"{self.seed} {self.epoch}")
        draw.shuffle(order)
        pool = self.POOL * self.batch_size
        batches = [
            batch
            for start in range(0, len(order), pool)
            for batch in self._batches(order[start : start + pool])
        ]
        draw.shuffle(batches)
        return iter(batches)

    def _batches(self, pool: list[int]) -> list[list[int]]:
        pool = sorted(pool, key=self.durations.__getitem__)
        return [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
