"""Error rates of a model on a split: of the whole and of each utterance."""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastguard._io.files import replacing
from fastguard.speech.data.batching import Batch
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.tokenizer import Tokenizer

from .decoding import Decode, greedy_decode

logger = logging.getLogger(__name__)

LONG = 4
"""Number of words from which an utterance counts as long."""


@dataclass(frozen=True)
class Scored:
    """An utterance, its hypothesis, and the errors in it."""

    id: str
    reference: str
    hypothesis: str
    words: int
    substitutions: int
    deletions: int
    insertions: int
    characters: int
    character_errors: int
    #: In seconds; None if unknown.
    duration: float | None = None
    #: False if the log_probs had NaN; the hypothesis is empty then.
    finite: bool = True

    @property
    def errors(self) -> int:
        """Word errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Errors per word of the reference; NaN if it has none."""
        return _per(self.errors, self.words)

    @property
    def cer(self) -> float:
        """Errors per character of the reference; NaN if it has none."""
        return _per(self.character_errors, self.characters)


def _per(errors: int, all: int) -> float:
    return errors / all if all else float("nan")


def score(
    id: str, reference: str, hypothesis: str, duration: float | None = None, finite: bool = True
) -> Scored:
    """The errors of a hypothesis, by jiwer. With an empty reference each word is an insertion."""
    if not reference.split():
        inserted = " ".join(hypothesis.split())
        counts = {"words": 0, "substitutions": 0, "deletions": 0}
        counts |= {"insertions": len(inserted.split()), "characters": 0}
        counts |= {"character_errors": len(inserted)}
        return Scored(id, "", hypothesis, **counts, duration=duration, finite=finite)
    words = jiwer.process_words(reference, hypothesis)
    letters = jiwer.process_characters(reference, hypothesis)
    return Scored(
        id,
        reference,
        hypothesis,
        words=words.hits + words.substitutions + words.deletions,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        characters=letters.hits + letters.substitutions + letters.deletions,
        character_errors=letters.substitutions + letters.deletions + letters.insertions,
        duration=duration,
        finite=finite,
    )


@dataclass(frozen=True)
class ErrorRates:
    """Errors of all utterances, per word and per character of the references; rates can exceed 1.

    ``words`` is the number of words in the references. The last three count the word errors.
    """

    wer: float
    cer: float
    words: int
    substitutions: int
    deletions: int
    insertions: int


def pooled(rows: Sequence[Scored]) -> ErrorRates:
    """Error rates over all rows together; NaN if there are no words."""
    words = sum(row.words for row in rows)
    characters = sum(row.characters for row in rows)
    return ErrorRates(
        wer=_per(sum(row.errors for row in rows), words),
        cer=_per(sum(row.character_errors for row in rows), characters),
        words=words,
        substitutions=sum(row.substitutions for row in rows),
        deletions=sum(row.deletions for row in rows),
        insertions=sum(row.insertions for row in rows),
    )


@dataclass(frozen=True)
class Evaluation:
    """The scored utterances, in the order of the loader."""

    rows: list[Scored]

    @cached_property
    def rates(self) -> ErrorRates:
        """Error rates over all utterances."""
        return pooled(self.rows)

    @property
    def long_rows(self) -> list[Scored]:
        """Utterances of LONG words or more: single words and letters are another task."""
        return [row for row in self.rows if row.words >= LONG]

    @property
    def seconds(self) -> float:
        """Total duration, of the utterances whose duration is known."""
        return sum(row.duration or 0.0 for row in self.rows)

    def worst(self, count: int | None = None) -> list[Scored]:
        """The rows with the most word errors, then character errors, first; all by default."""
        return sorted(self.rows, key=lambda r: (-r.errors, -r.character_errors, r.id))[:count]


def wer_interval(
    rows: Sequence[Scored], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the WER (Bisani and Ney 2004).

    Args:
        rows: the utterances, which are resampled with replacement.
        level: coverage of the interval.
        samples: number of resamplings.
        seed: of the resampling.

    Returns:
        Lower and upper bound; NaN if there are no words.
    """
    if not any(row.words for row in rows):
        return float("nan"), float("nan")
    errors = np.array([row.errors for row in rows])
    words = np.array([row.words for row in rows])
    draw = np.random.default_rng(seed)
    rates = []
    for _ in range(samples):
        drawn = draw.integers(len(rows), size=len(rows))
        if spoken := words[drawn].sum():
            rates.append(errors[drawn].sum() / spoken)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    decode: Decode = greedy_decode,
    *,
    durations: Mapping[str, float] | None = None,
    progress: str = "evaluating",
    rejected: list[Rejected] | None = None,
) -> Evaluation:
    """Recognise ``batches`` and compare the hypotheses with the texts; targets are not read.

    A warning names utterances whose log_probs have NaN; their hypotheses are empty.

    Args:
        forward: gives log_probs (B, T, V) and lengths (B,) of a batch on any device. It takes care
            of device, precision and evaluation mode.
        batches: of a loader.
        tokenizer: of the model.
        decode: log-probabilities to tokens.
        durations: in seconds, by id.
        progress: label of the progress bar.
        rejected: gets recordings that cannot be used; without it a warning names each.
    """
    durations = durations or {}
    rows: list[Scored] = []
    hidden = not sys.stderr.isatty()
    for batch in tqdm(batches, progress, leave=False, disable=hidden, unit="batch"):
        if rejected is not None:
            rejected += batch.rejected
        for left_out in batch.rejected if rejected is None else ():
            logger.warning("Left out of the evaluation: %s: %s", left_out.id, left_out.reason)
        if not len(batch):
            continue
        log_probs, lengths = forward(batch)
        finite = _finite(log_probs, lengths)
        tokens = decode(log_probs, lengths.where(finite, 0))
        for id, text, found, good in zip(
            batch.ids, batch.texts, tokens, finite.tolist(), strict=True
        ):
            rows.append(score(id, text, tokenizer.decode(found), durations.get(id), good))
    if bad := [row.id for row in rows if not row.finite]:
        logger.warning(
            "The model's output is NaN for %d of %d utterances, which count as deleted: %s",
            len(bad),
            len(rows),
            ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else ""),
        )
    return Evaluation(rows)


def _finite(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """(B,) bool: whether the log_probs have no NaN up to the length."""
    frames = torch.arange(log_probs.shape[1], device=lengths.device)
    inside = frames < lengths[:, None]
    return ~(log_probs.isnan().any(dim=-1).to(inside.device) & inside).any(dim=-1)


def write(folder: Path, found: Evaluation) -> None:
    """Write hypotheses.jsonl, alignments.txt and rates.json, utterances with most errors first: all
    files, or none if the disk is full. Raises OSError."""
    with (
        replacing(folder / "hypotheses.jsonl") as hypotheses,
        replacing(folder / "alignments.txt") as alignments,
        replacing(folder / "rates.json") as rates,
    ):
        _write_rows(hypotheses, alignments, found.worst())
        text = json.dumps(_without_nan(_summary(found)), indent=2) + "\n"
        rates.write_text(text, encoding="utf-8", newline="\n")


def _write_rows(hypotheses: Path, alignments: Path, rows: list[Scored]) -> None:
    with hypotheses.open("w", encoding="utf-8") as file:
        for row in rows:
            values = _without_nan(dataclasses.asdict(row) | {"wer": row.wer, "cer": row.cer})
            print(json.dumps(values, ensure_ascii=False), file=file)
    with alignments.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, "aligning", leave=False, delay=1, disable=not sys.stderr.isatty()):
            file.write(f"{row.id}: {row.errors} errors in {row.words} words\n{alignment(row)}\n")


def _summary(found: Evaluation) -> dict:
    """The content of rates.json."""
    return {
        "utterances": len(found.rows),
        "minutes": found.seconds / 60,
        **dataclasses.asdict(found.rates),
        "wer_interval": wer_interval(found.rows),
        "long": {
            "utterances": len(found.long_rows),
            "words": sum(row.words for row in found.long_rows),
            "wer": pooled(found.long_rows).wer if found.long_rows else None,
        },
        "nonfinite": [row.id for row in found.worst() if not row.finite],
    }


def alignment(row: Scored) -> str:
    """Three lines: the reference, the hypothesis under it, and S, D or I under each error."""
    if not row.words:
        marks = " ".join("I".ljust(len(word)) for word in row.hypothesis.split())
        return f"REF:\nHYP: {row.hypothesis}\n     {marks.rstrip()}\n"
    words = jiwer.process_words(row.reference, row.hypothesis)
    text = jiwer.visualize_alignment(words, show_measures=False, skip_correct=False)
    return text[text.index("REF:") :].rstrip("\n") + "\n"


def _without_nan(value):
    """``value`` with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if value != value else value
