"""Selects the utterances of each batch: of similar length, and the same ones after a resume."""

import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """An utterance in an epoch. Its augmentation depends on this and on a seed only."""

    index: int
    epoch: int


class BucketBatchSampler(Sampler[list[Draw]]):
    """Batches of utterances of similar duration; each utterance comes once per epoch.

    Shuffled utterances are split into pools of about POOL batches. Each pool is sorted by duration
    and split into batches, and the batches of all pools are shuffled. So batches have little
    padding, and an utterance has other neighbours in each epoch. The order depends only on ``seed``
    and the epoch.

    Each rank gets the same number of batches, and all ranks get batches of similar duration in the
    same step. If the batches do not divide evenly, the step of the longest repeats some.

    A pass that follows a whole pass is the next epoch; :meth:`set_epoch` sets another one. With
    :meth:`state_dict` and :meth:`load_state_dict` a pass continues where another one stopped.

    Args:
        durations: of the utterances.
        batch_size: utterances per batch.
        batch_duration: instead of ``batch_size``: the longest duration times the number of
            utterances does not exceed it. A longer utterance is its own batch. Speed perturbation
            comes later: a factor of 0.9 makes a batch longer by a ninth.
        seed: of the order.
        shuffle: without it all utterances are one pool and stay sorted.
        rank, world_size: of this process, and the number of processes.

    Raises:
        ValueError: not exactly one of ``batch_size`` and ``batch_duration`` is given and positive,
            or ``rank`` is not one of ``world_size``.
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
        self._position = 0  # batches of this epoch that were yielded
        self._resumed = False  # the next pass starts at the position
        self._ended = False  # the next pass is the next epoch
        self._plan: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, from its start unless a loaded state is in this epoch."""
        if epoch != self.epoch or not self._resumed:
            self.epoch, self._position, self._resumed = epoch, 0, False
        self._ended = False

    def __len__(self) -> int:
        """Batches of a whole epoch, for this rank."""
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
        """The place in the pass, and the settings that its order depends on."""
        return {"epoch": self.epoch, "position": self._position, **self._settings}

    def load_state_dict(self, state: dict[str, int | float | bool | None]) -> None:
        """Continue the pass of ``state``; raises ValueError if a setting differs."""
        differing = [
            f"{name} (was {state.get(name)}, is {value})"
            for name, value in self._settings.items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the order of batches cannot be resumed: {', '.join(differing)}; use the "
                "settings and the corpus of that run, or start a new run"
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
        """The batches of this rank in the epoch."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, self._all_batches()[self.rank :: self.world_size]
        return self._plan[1]

    def _all_batches(self) -> list[np.ndarray]:
        """The batches of all ranks, step by step."""
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
