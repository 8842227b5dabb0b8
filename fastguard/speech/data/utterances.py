"""Stores many utterances in a few arrays that worker processes share."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from .part import WHOLE, Part

SPLITS = ("train", "dev", "test")
_CODES = (*SPLITS, None)


@dataclass(frozen=True)
class Utterance:
    """A recording with its normalised text.

    Attributes:
        id: unique in the corpus.
        audio: path of the recording.
        text: normalised.
        split: one of SPLITS; None while the corpus is read.
        duration: in seconds; NaN while it is unknown.
        part: of the recording that is used.
    """

    id: str
    audio: Path
    text: str
    split: str | None
    duration: float
    part: Part = WHOLE


class Utterances(Sequence[Utterance]):
    """A sequence of :class:`Utterance` without an object for each: the strings are in one buffer,
    and a selection refers to the same buffer.

    The columns are tensors, because torch gives tensors to worker processes as shared memory, for
    every start method.
    """

    def __init__(self, utterances: Iterable[Utterance] = ()) -> None:
        buffer, ends = bytearray(), array("q", [0])
        splits, durations = array("B"), array("d")
        parts = array("d")
        for utterance in utterances:
            for string in (utterance.id, str(utterance.audio), utterance.text):
                buffer += string.encode("utf-8", "surrogatepass")
                ends.append(len(buffer))
            splits.append(_CODES.index(utterance.split))
            durations.append(utterance.duration)
            part = utterance.part
            parts.append(part.start)
            parts.append(math.nan if part.seconds is None else part.seconds)
            parts.append(math.nan if part.channel is None else part.channel)
        self._buffer = _tensor(buffer, torch.uint8)
        self._ends = _tensor(ends, torch.int64)
        self._splits = _tensor(splits, torch.uint8)
        self._durations = _tensor(durations, torch.float64)
        # Start, seconds and channel of each; NaN for None.
        self._parts = _tensor(parts, torch.float64).view(-1, 3)
        self._rows = torch.arange(len(durations))

    @property
    def durations(self) -> np.ndarray:
        """Durations (N,) float64, in seconds."""
        return self._durations[self._rows].numpy()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> "Utterances": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = int(self._rows[index])
        return self._utterance(row, self._ends[3 * row : 3 * row + 4].tolist())

    def __iter__(self) -> Iterator[Utterance]:
        ends = self._ends.numpy().copy()
        for row in self._rows.tolist():
            yield self._utterance(row, ends[3 * row : 3 * row + 4].tolist())

    def _utterance(self, row: int, ends: list[int]) -> Utterance:
        # numpy() at each use: torch moves the columns when they are first shared.
        strings = self._buffer.numpy()[ends[0] : ends[3]].tobytes()
        id, audio, text = (
            strings[start - ends[0] : end - ends[0]].decode("utf-8", "surrogatepass")
            for start, end in pairwise(ends)
        )
        split = _CODES[self._splits.numpy()[row]]
        duration = float(self._durations.numpy()[row])
        return Utterance(id, Path(audio), text, split, duration, self._part(row))

    def _part(self, row: int) -> Part:
        start, seconds, channel = self._parts.numpy()[row].tolist()
        return Part(
            start,
            None if math.isnan(seconds) else seconds,
            None if math.isnan(channel) else int(channel),
        )

    def select(self, indices: np.ndarray) -> "Utterances":
        """These utterances, in this order."""
        return self._with(_rows=self._rows[torch.from_numpy(np.asarray(indices, np.int64))])

    def of_split(self, name: str | None) -> "Utterances":
        """The utterances of a split; those without a split for None."""
        return self._with(_rows=self._rows[self._splits[self._rows] == _CODES.index(name)])

    def texts(self) -> Iterator[str]:
        """The text of each utterance."""
        ends = self._ends.numpy().copy()
        for row in self._rows.tolist():
            start, end = ends[3 * row + 2 : 3 * row + 4].tolist()
            yield self._buffer.numpy()[start:end].tobytes().decode("utf-8", "surrogatepass")

    def with_splits(self, of_text: Mapping[str, str]) -> "Utterances":
        """A copy in which utterances without a split get the split of their text."""
        open = self.of_split(None)
        codes = [SPLITS.index(of_text[text]) for text in open.texts()]
        codes = torch.tensor(codes, dtype=torch.uint8)
        return self._with(_splits=self._splits.index_put((open._rows,), codes))

    def with_durations(self, seconds: np.ndarray) -> "Utterances":
        """A copy with other durations (N,) float64, in seconds."""
        values = torch.from_numpy(np.asarray(seconds, np.float64))
        return self._with(_durations=self._durations.index_put((self._rows,), values))

    def _with(self, **columns: Tensor) -> "Utterances":
        made = object.__new__(Utterances)
        made.__dict__.update(self.__dict__ | columns)
        return made


def _tensor(values: bytearray | array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if len(values) else torch.empty(0, dtype=dtype)
