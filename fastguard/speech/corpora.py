"""Which recordings to learn from: a spec becomes a checked list of utterances.

    synthetic                 sentences spoken by eSpeak NG, made on the spot
    asterisk[:DIR][@LANG]     telephone prompts of the Debian packages asterisk-core-sounds-LANG
    manifest:FILE.jsonl       one JSON object a line
    librispeech:DIR           LibriSpeech as it is unpacked
    yesno:DIR                 the 60 recordings of OpenSLR 1

Whatever could break a training step later is found here: every recording is decoded once, and a
row that can not be used is left out with its name and a reason.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from fastguard.speech.audio import check_duration, decoded_duration
from fastguard.speech.readers import (
    ASTERISK_SOUNDS,
    CorpusError,
    Rejected,
    Row,
    Unusable,
    read_asterisk,
    read_librispeech,
    read_manifest,
    read_yesno,
)
from fastguard.speech.synthetic import build_synthetic
from fastguard.speech.text import normalize_text

SPECS = "synthetic, asterisk[:DIR][@LANG], manifest:FILE.jsonl, librispeech:DIR, yesno:DIR"
SPLITS = ("train", "dev", "test")
_READERS = {"manifest": read_manifest, "librispeech": read_librispeech, "yesno": read_yesno}


@dataclass(frozen=True)
class Utterance:
    """A recording that can be trained on: ``text`` is normalised, ``duration`` is in seconds."""

    id: str
    audio: Path
    text: str
    split: str
    duration: float


@dataclass
class Corpus:
    spec: str
    utterances: list[Utterance]
    rejected: list[Rejected]

    def split(self, name: str) -> list[Utterance]:
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}: choose one of {', '.join(SPLITS)}")
        return [utterance for utterance in self.utterances if utterance.split == name]

    def summary(self) -> str:
        """A line for each split, and one for each kind of reason with the first rows left out."""
        lines = [f"{self.spec}: {_amount(self.utterances)}"]
        lines += [f"  {name:<5} {_amount(self.split(name))}" for name in SPLITS]
        for kind, count in Counter(row.kind for row in self.rejected).most_common():
            rows = [row for row in self.rejected if row.kind == kind]
            others = ", ..." if count > 3 else ""
            names = ", ".join(row.id for row in rows[:3])
            lines.append(f"  left out {count}: {names}{others} ({rows[0].reason})")
        return "\n".join(lines)


def load_corpus(
    spec: str,
    *,
    max_output_length: Callable[[float], int],
    max_duration: float = 20.0,
    min_duration: float = 0.1,
    cache_dir: Path | None = None,
    seed: int = 0,
    needed: Iterable[str] = ("train",),
) -> Corpus:
    """Read the corpus that ``spec`` names (see the top of this file), less what is unusable.

    ``max_output_length`` tells how many CTC frames the model emits for so many seconds: a text
    of U characters with R equal neighbours needs U + R of them, else its loss is infinite.
    Recordings are kept from ``min_duration`` to ``max_duration`` seconds.  Rows without a split
    get one from :func:`assign_splits`, before the recordings are judged, so that models of
    different strides train and test on the same sentences.  ``cache_dir`` and ``seed`` are for the
    synthetic corpus.

    Raises :class:`CorpusError` for an unknown spec, a corpus that is not there, and one of whose
    ``needed`` splits nothing is left; the message lists what was left out.
    """
    rows, rejected = read_rows(spec, cache_dir=cache_dir, seed=seed)
    corpus = Corpus(spec, [], rejected)
    bar = tqdm(rows, f"reading {spec}", leave=False, delay=1, disable=not sys.stderr.isatty())
    for row in bar:
        try:
            duration = decoded_duration(row.audio, max_duration)
            check_duration(row.audio, duration, min_duration, max_duration)
            check_feasible(row.text, max_output_length(duration))
        except Unusable as reason:
            rejected.append(Rejected(row.id, str(reason)))
        else:
            corpus.utterances.append(Utterance(row.id, row.audio, row.text, row.split, duration))
    if not any(corpus.split(name) for name in needed):
        raise CorpusError(
            f"nothing is left of the split {' or '.join(needed)}; fix or replace these rows, or "
            f"take another split\n{corpus.summary()}"
        )
    return corpus


def read_rows(
    spec: str, *, cache_dir: Path | None = None, seed: int = 0
) -> tuple[list[Row], list[Rejected]]:
    """The rows of a corpus, each with its normalised text and its split, and those left out.

    No recording is looked at: they may be missing, broken, or too short for their texts.

    Raises :class:`CorpusError` for an unknown spec and a corpus that is not there.
    """
    rows, rejected = _sort_out(_read(spec, cache_dir, seed))
    given = {row.text: row.split for row in rows if row.split is not None}
    splits = given | assign_splits(row.text for row in rows if row.text not in given)
    return [replace(row, split=row.split or splits[row.text]) for row in rows], rejected


def assign_splits(texts: Iterable[str]) -> dict[str, str]:
    """Split of each distinct text: of those with 1, with 2 or 3 and with more words, a tenth is
    test, a tenth dev and the rest train (fewer than 5 texts of a length: all train).

    Sentences are ordered by hash, so neither the order of the rows nor a seed moves one, and all
    recordings of a sentence share its split.
    """
    strata = defaultdict(set)
    for text in texts:
        words = len(text.split())
        strata[1 if words == 1 else 2 if words < 4 else 4].add(text)
    splits = {}
    for stratum in strata.values():
        ordered = sorted(stratum, key=lambda text: sha256(text.encode()).digest())
        tenth = int(len(ordered) / 10 + 0.5)
        for rank, text in enumerate(ordered):
            splits[text] = "test" if rank < tenth else "dev" if rank < 2 * tenth else "train"
    return splits


def _read(spec: str, cache_dir: Path | None, seed: int) -> Iterator[Row | Rejected]:
    if spec == "synthetic":
        return read_manifest(build_synthetic(cache_dir, seed))
    if asterisk := re.fullmatch(r"asterisk(?::(.+?))?(?:@(\w+))?", spec):
        return read_asterisk(Path(asterisk[1] or ASTERISK_SOUNDS).expanduser(), asterisk[2] or "en")
    kind, _, place = spec.partition(":")
    if kind in _READERS and place:
        return _READERS[kind](Path(place).expanduser())
    raise CorpusError(f"no corpus {spec!r}: choose one of {SPECS}")


def _sort_out(found: Iterable[Row | Rejected]) -> tuple[list[Row], list[Rejected]]:
    """The rows that are in order so far, with their texts normalised, and the others."""
    rows, rejected, ids = [], [], set()
    for row in found:
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        text = normalize_text(row.text)
        try:
            _check_description(row, text, ids)
        except Unusable as reason:
            rejected.append(Rejected(row.id, str(reason)))
        else:
            ids.add(row.id)
            rows.append(replace(row, text=text))
    return rows, rejected


def _check_description(row: Row, text: str, ids: set[str]) -> None:
    if row.id in ids:
        raise Unusable(f"duplicate id: {row.id} is an earlier row's; rename or drop this one")
    if row.split not in (None, *SPLITS):
        raise Unusable(f"unknown split: {row.split!r}; use one of {', '.join(SPLITS)}")
    if not text:
        raise Unusable(f"no words: nothing of {row.text!r:.60} is spoken; transcribe it")


def encoded(encode: Callable[[str], Sequence], text: str) -> Sequence:
    """What ``encode`` gives; raises :class:`Unusable` for a text that has no tokens."""
    try:
        return encode(text)
    except ValueError as error:
        raise Unusable(f"no tokens: {error}") from error


def check_feasible(tokens: Sequence, frames: int) -> None:
    """Raises :class:`Unusable` if CTC can not align so many tokens to so many frames: each takes
    one, and of two equal neighbours there is a blank between."""
    repeats = sum(a == b for a, b in pairwise(tokens))
    if frames < len(tokens) + repeats:
        raise Unusable(
            f"infeasible target: needs {len(tokens) + repeats} frames ({len(tokens)} symbols + "
            f"{repeats} repeats), has {frames}; check the text, or use a model of smaller stride"
        )


def _amount(utterances: list[Utterance]) -> str:
    minutes = sum(utterance.duration for utterance in utterances) / 60
    return f"{len(utterances)} utterances, {minutes:.1f} min"
