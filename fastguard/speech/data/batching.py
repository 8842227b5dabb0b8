"""Utterances to padded batches of similar length, the same ones again after a resume."""

import os
import random
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Thread, current_thread, main_thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fastguard._io.failures import in_a_line

from .audio import check_duration
from .corpora import Utterance, check_feasible, encoded
from .features import Augment, LogMel, load_audio, one_thread
from .readers import Rejected, Unusable
from .tokenizer import Tokenizer


class LoadError(RuntimeError):
    """A recording could not be loaded, for another reason than what is in it; the message names it.

    Of no memory, for one: that it is bad data can not be said.
    """


class Draw(NamedTuple):
    """Which utterance, and in which epoch: with a seed, all that its augmentation depends on."""

    index: int
    epoch: int


@dataclass
class Item:
    id: str
    text: str
    features: Tensor  # (T, F) float32
    tokens: Tensor  # (U,) int64
    second_view: Tensor | None = None  # (T, F) float32, the same under other masks


@dataclass
class Batch:
    """Utterances; ``targets`` holds their tokens one after the other, as torch's CTC loss takes
    them.  There are none where every recording was ``rejected``.

    With two ``views`` of each, B is twice their number: all first views, then all second ones.
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
        """A batch whose four tensors lie on ``device``."""
        return replace(
            self,
            features=self.features.to(device),
            feature_lengths=self.feature_lengths.to(device),
            targets=self.targets.to(device),
            target_lengths=self.target_lengths.to(device),
        )


class SpeechDataset(Dataset[Item | Rejected]):
    """Features and tokens of each utterance; ``augment`` varies those of a training set.

    What happens to an utterance depends on ``seed`` and its :class:`Draw` alone: not on workers,
    nor on what was drawn before it.  A recording that can not be used after all is
    :class:`Rejected`: gone, torn, NaN, outside the durations, or too short for its text by
    ``max_output_length`` (see :func:`fastguard.speech.data.corpora.load_corpus`).

    Without a ``tokenizer`` items have no tokens, as in recognition: a reference may hold characters
    that no tokenizer knows.
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
        waveform = load_audio(utterance.audio, self.log_mel.sample_rate, self.max_duration)
        tokens = encoded(self.tokenizer.encode, utterance.text) if self.tokenizer else []
        self._check(utterance, tokens, len(waveform))
        if self.augment.speed is not None:
            waveform = self.augment.speed(waveform, chance, partial(self._fits, utterance, tokens))
        features = self.log_mel(waveform)
        if not features.isfinite().all():
            loudest = waveform.abs().max()
            raise Unusable(
                f"features not finite: samples of {str(utterance.audio)!r} reach {loudest:.3g}; "
                "scale them to 1"
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
    """The batch of those items that are not rejected; ``n_mels`` is the F of a batch without."""
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


class BucketBatchSampler(Sampler[list[Draw]]):
    """Batches of utterances of similar duration, each utterance once an epoch.

    Of ``batch_size`` utterances, or of as many as fit into ``batch_duration``: the longest times
    their number, in the unit of ``durations``, does not exceed it, and a longer utterance is a
    batch of its own.  (Speed perturbation comes after that: 0.9 lengthens a batch by a ninth.)

    Shuffled utterances are cut into pools of about POOL batches; a pool is sorted by duration and
    cut into batches, and the batches of all pools are shuffled.  So batches are padded little, and
    an utterance meets other neighbours in each epoch.  Without ``shuffle`` all utterances are one
    pool and stay sorted.  The order depends on ``seed`` and the epoch alone.

    Of ``world_size`` ranks each gets the same number of batches, and in one step batches of similar
    duration.  Where they do not divide, the step of the longest is filled with batches that come
    twice.

    A pass that follows a whole one is the next epoch; :meth:`set_epoch` names another.  With
    :meth:`state_dict` and :meth:`load_state_dict` a pass goes on where another one stopped.

    Raises ValueError unless one of ``batch_size`` and ``batch_duration`` is given and positive.
    """

    POOL = 50

    def __init__(
        self,
        durations: Sequence[float],
        *,
        batch_size: int | None = None,
        batch_duration: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_size is None) == (batch_duration is None):
            raise ValueError(
                f"batch_size is {batch_size} and batch_duration {batch_duration}: give one of them"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        if batch_duration is not None and not batch_duration > 0:
            raise ValueError(f"batch_duration is {batch_duration}: give more than 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}: count the ranks from 0")
        self.durations = np.asarray(durations, dtype=np.float64)
        self.batch_size = batch_size
        self.batch_duration = batch_duration
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._position = 0  # batches of this epoch given so far
        self._resumed = False  # the next pass starts at the position
        self._ended = False  # the next pass is the next epoch
        self._plan: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch: from its start, unless it is the one of a loaded state."""
        if epoch != self.epoch or not self._resumed:
            self.epoch, self._position, self._resumed = epoch, 0, False
        self._ended = False

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank."""
        return len(self._batches())

    def __iter__(self) -> Iterator[list[Draw]]:
        if self._ended:
            self.epoch += 1
        if not self._resumed:
            self._position = 0
        self._ended = self._resumed = False
        epoch, batches = self.epoch, self._batches()
        for position in range(self._position, len(batches)):
            self._position = position + 1
            yield [Draw(index, epoch) for index in batches[position].tolist()]
        self._ended = True

    def state_dict(self) -> dict[str, int | float | bool | None]:
        """Where the pass is, and the settings on which its order depends."""
        return {"epoch": self.epoch, "position": self._position, **self._settings}

    def load_state_dict(self, state: dict[str, int | float | bool | None]) -> None:
        """The next pass goes on from there.  Raises ValueError where a setting differs."""
        differing = [
            f"{name} (was {state.get(name)}, is {value})"
            for name, value in self._settings.items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the order of batches can not be resumed: {', '.join(differing)}; use the "
                "settings and the corpus of that run, or start anew"
            )
        self.epoch, self._position = state["epoch"], state["position"]
        self._resumed, self._ended = True, False

    @cached_property
    def _settings(self) -> dict[str, int | float | bool | None]:
        return {
            "utterances": len(self.durations),
            "durations": zlib.crc32(self.durations.tobytes()),
            "batch_size": self.batch_size,
            "batch_duration": self.batch_duration,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }

    def _batches(self) -> list[np.ndarray]:
        """This rank's batches of the epoch."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, self._all_batches()[self.rank :: self.world_size]
        return self._plan[1]

    def _all_batches(self) -> list[np.ndarray]:
        """The batches of all ranks, those of one step after the other."""
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.durations)))
        if self.shuffle:
            draw.shuffle(order)
        batches = [
            batch
            for pool in self._pools(np.array(order, dtype=np.int64))
            for batch in self._cut(pool)
        ]
        longest = self.durations[[batch[-1] for batch in batches]]
        batches = [batches[i] for i in np.argsort(longest, kind="stable")]
        count, ranks = len(batches), self.world_size
        if last := count % ranks:
            batches += [batches[-1 - (last + i) % count] for i in range(ranks - last)]
        steps = [batches[i : i + ranks] for i in range(0, len(batches), ranks)]
        if self.shuffle:
            draw.shuffle(steps)
            for step in steps:
                draw.shuffle(step)
        return [batch for step in steps for batch in step]

    def _pools(self, order: np.ndarray) -> list[np.ndarray]:
        if not self.shuffle or not len(order):
            return [order]
        if self.batch_size is not None:
            size = self.POOL * self.batch_size
            return [order[i : i + size] for i in range(0, len(order), size)]
        pool = self.durations[order].cumsum() // (self.POOL * self.batch_duration)
        return np.split(order, 1 + np.flatnonzero(np.diff(pool)))

    def _cut(self, pool: np.ndarray) -> list[np.ndarray]:
        durations = self.durations[pool]
        ascending = np.argsort(durations, kind="stable")
        pool = pool[ascending]
        if self.batch_size is not None:
            return [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        batches, start = [], 0
        for end, longest in enumerate(durations[ascending].tolist()):
            if end > start and longest * (end - start + 1) > self.batch_duration:
                batches.append(pool[start:end])
                start = end
        return [*batches, pool[start:]] if len(pool) else []


def make_loader(
    dataset: SpeechDataset, sampler: BucketBatchSampler, num_workers: int = 0
) -> StatefulDataLoader:
    """A loader of :class:`Batch` whose ``state_dict()`` tells which batch comes next.

    The state is the sampler's, of the batches that were given out, not of those that workers
    prepare ahead; so it fits a loader with any number of workers, and ``load_state_dict`` raises
    ValueError at once where the sampler's settings differ.  It holds only what
    ``torch.load(weights_only=True)`` accepts.

    A worker that dies, and an error in one, raise where a batch is asked for, and nowhere else.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
        return _Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(collate, n_mels=dataset.log_mel.n_mels),
            worker_init_fn=_leave_the_end_to_the_parent,
            # Its own, or each pass would draw from the global one: a resumed run once more.
            generator=torch.Generator(),
        )


class _Loader(StatefulDataLoader):
    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return _Pass(batches) if self.num_workers else batches

    def state_dict(self) -> dict:
        if self._iterator is None:  # torchdata would begin a pass, and the next one go on with it
            return self.batch_sampler.state_dict()
        state = super().state_dict()
        if self.num_workers:
            state = state["_snapshot"]["_main_snapshot"]
        return state["_index_sampler_state"]

    def load_state_dict(self, state: dict) -> None:
        self.batch_sampler.load_state_dict(state)
        super().load_state_dict({})  # drops the pass that is under way


class _Pass(Iterator[Batch]):
    """The batches of workers.  torch raises for one that was killed in the handler of SIGCHLD:
    wherever the training is by then, in a forward pass, or in the writing of a state.  Here the
    handler waits until the next batch is asked for."""

    _waiting = False
    _handler: Callable | None = None  # torch's; there is one for all loaders

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        # Windows has no such signal, and a thread can set no handler: there torch finds the dead
        # where it waits for a batch.
        if not hasattr(signal, "SIGCHLD") or current_thread() is not main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler is not _Pass._on_death:
            _Pass._handler = handler
            signal.signal(signal.SIGCHLD, _Pass._on_death)

    def __next__(self) -> Batch:
        _Pass._waiting = True
        try:
            if _Pass._handler is not None:  # one may have died since the last batch
                _Pass._handler(signal.SIGCHLD, None)
            return next(self._batches)
        finally:
            _Pass._waiting = False

    @staticmethod
    def _on_death(number: int, frame: object) -> None:
        if _Pass._waiting and _Pass._handler is not None:
            _Pass._handler(number, frame)


def _leave_the_end_to_the_parent(worker: int) -> None:
    """Ctrl-C, and the SIGTERM of a scheduler, reach the workers too; the parent ends the run, and
    them, in order.  Its own SIGTERM must end them: multiprocessing sends it, and then waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's handler ends them at any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_parents_sigterm, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
