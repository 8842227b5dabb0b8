"""Loads utterances as features and tokens, and pads them to batches."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastguard._io.failures import in_a_line

from .audio import check_duration
from .ctc_targets import check_feasible, encoded
from .features import Augment, LogMel, load_audio, one_thread
from .readers import Rejected, Unusable
from .sampler import Draw
from .tokenizer import Tokenizer
from .utterances import Utterance


class LoadError(RuntimeError):
    """A recording could not be loaded for a reason other than its content, such as a lack of
    memory; the message names it."""


@dataclass
class Item:
    """An utterance, loaded."""

    id: str
    text: str
    features: Tensor  # (T, F) float32
    tokens: Tensor  # (U,) int64
    second_view: Tensor | None = None  # (T, F) float32, the same under other masks


@dataclass
class Batch:
    """Utterances; ``targets`` has their tokens one after the other, as torch's CTC loss takes them.

    A batch is empty if every recording was ``rejected``. With two ``views`` of each utterance, B is
    twice their number: all first views, then all second views.
    """

    features: Tensor  # (B, T, F) float32, zeros after the end
    feature_lengths: Tensor  # (B,) int64
    targets: Tensor  # (sum of target_lengths,) int64
    target_lengths: Tensor  # (B,) int64
    ids: list[str]
    texts: list[str]
    rejected: list[Rejected] = field(default_factory=list)
    views: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy whose four tensors are on ``device``."""
        return replace(
            self,
            features=self.features.to(device),
            feature_lengths=self.feature_lengths.to(device),
            targets=self.targets.to(device),
            target_lengths=self.target_lengths.to(device),
        )


class SpeechDataset(Dataset[Item | Rejected]):
    """Features and tokens of each utterance.

    The augmentation of an utterance depends only on ``seed`` and its :class:`Draw`, not on workers
    or on earlier draws. A recording that cannot be used becomes :class:`Rejected`: it is missing,
    incomplete, not finite, outside the durations, or too short for its text.

    Args:
        utterances: of a corpus.
        tokenizer: None gives items without tokens, for evaluation: a reference may have characters
            that no tokenizer knows.
        log_mel: the features.
        augment: of a training set.
        seed: of the augmentation.
        max_output_length: output frames of the model for a duration in seconds; see
            :func:`fastguard.speech.data.corpora.load_corpus`.
        min_duration, max_duration: in seconds.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer | None,
        log_mel: LogMel,
        augment: Augment | None = None,
        seed: int = 0,
        *,
        max_output_length: Callable[[float], int] | None = None,
        min_duration: float = 0.1,
        max_duration: float = 20.0,
    ) -> None:
        self.utterances = utterances
        self.tokenizer = tokenizer
        self.log_mel = log_mel
        self.augment = augment or Augment()
        self.seed = seed
        self.max_output_length = max_output_length
        self.min_duration = min_duration
        self.max_duration = max_duration

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, draw: Draw) -> Item | Rejected:
        utterance = self.utterances[draw.index]
        try:
            with one_thread():
                chance = random.Random(f"{self.seed} {draw.epoch} {draw.index}")
                return self._item(utterance, chance, draw.epoch)
        except Unusable as reason:
            return Rejected(utterance.id, str(reason))
        except Exception as error:
            raise LoadError(f"{utterance.id} could not be loaded: {in_a_line(error)}") from error

    def _item(self, utterance: Utterance, chance: random.Random, epoch: int) -> Item:
        waveform = load_audio(
            utterance.audio, self.log_mel.sample_rate, self.max_duration, part=utterance.part
        )
        tokens = encoded(self.tokenizer.encode, utterance.text) if self.tokenizer else []
        self._check(utterance, tokens, len(waveform))
        if self.augment.speed is not None:
            waveform = self.augment.speed(waveform, chance, partial(self._fits, utterance, tokens))
        features = self.log_mel(waveform)
        if not features.isfinite().all():
            loudest = waveform.abs().max()
            raise Unusable(
                f"features not finite: samples of {str(utterance.audio)!r} reach {loudest:.3g}; "
                "scale them to [-1, 1]"
            )
        tokens = torch.tensor(tokens, dtype=torch.int64)
        first, *second = self.augment.views(features, chance, epoch)
        return Item(utterance.id, utterance.text, first, tokens, *second)

    def _check(self, utterance: Utterance, tokens: Sequence[int], samples: int) -> None:
        seconds = samples / self.log_mel.sample_rate
        check_duration(utterance.audio, seconds, self.min_duration, self.max_duration)
        if self.max_output_length is not None:
            check_feasible(tokens, self.max_output_length(seconds))

    def _fits(self, utterance: Utterance, tokens: Sequence[int], samples: int) -> bool:
        try:
            self._check(utterance, tokens, samples)
        except Unusable:
            return False
        return True


def collate(items: Sequence[Item | Rejected], n_mels: int = 0) -> Batch:
    """The batch of the items that are not rejected; ``n_mels`` is the F of an empty batch."""
    kept = [item for item in items if isinstance(item, Item)]
    views = [[item.features for item in kept], [item.second_view for item in kept]]
    if not kept or kept[0].second_view is None:
        views.pop()
    features = [view for each in views for view in each]
    tokens = [item.tokens for item in kept] * len(views)
    return Batch(
        features=pad_sequence(features or [torch.zeros(0, n_mels)], batch_first=True)[
            : len(features)
        ],
        feature_lengths=torch.tensor([len(view) for view in features], dtype=torch.int64),
        targets=torch.cat(tokens or [torch.zeros(0, dtype=torch.int64)]),
        target_lengths=torch.tensor([len(each) for each in tokens], dtype=torch.int64),
        ids=[item.id for item in kept],
        texts=[item.text for item in kept],
        rejected=[item for item in items if isinstance(item, Rejected)],
        views=len(views),
    )
