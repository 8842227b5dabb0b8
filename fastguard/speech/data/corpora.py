"""Reads a corpus: a spec becomes a checked list of utterances; see :mod:`.specs`.

In a corpus of moderate size everything that could break a training step is found here: every
recording is decoded once, and a row that cannot be used is left out with its name and a reason.
"""

import json
import math
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from fastguard._extras import MissingExtra

from .audio import check_duration, decoded_duration, header_duration
from .ctc_targets import check_feasible, encoded
from .part import CHANNELS
from .readers import CorpusError, Rejected, Row, Unusable
from .specs import read_spec
from .text import TextError, TextRules, normalized
from .utterances import SPLITS, Utterance, Utterances

DECODED_ROWS = 2_000
MAX_ID = 4_096  # characters; Linux has no longer paths
MAX_TEXT = 10_000  # characters; ten minutes of speech


@dataclass
class Change:
    """A kind of change that normalising made to ``count`` texts, and the first of them."""

    count: int
    id: str
    written: str
    text: str


@dataclass
class Corpus:
    """The utterances of a corpus.

    Attributes:
        spec: as given.
        utterances: those that can be used.
        rejected: those that are left out, with reasons.
        decoded: whether every recording was decoded; otherwise durations are unchecked.
        changes: what normalising changed, by the steps of fastguard.speech.data.text.normalized.
        unsplit: rows that named no split; they got one by their texts.
    """

    spec: str
    utterances: Utterances
    rejected: list[Rejected]
    decoded: bool = True
    changes: dict[str, Change] = field(default_factory=dict)
    unsplit: int = 0

    def split(self, name: str) -> Utterances:
        """The utterances of "train", "dev" or "test"; raises ValueError for another name."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}: choose one of {', '.join(SPLITS)}")
        return self.utterances.of_split(name)

    def drop_infeasible(
        self,
        encode: Callable[[str], Sequence],
        max_output_length: Callable[[float], int],
        needed: Iterable[str] = ("train",),
    ) -> "Corpus":
        """A copy without the training utterances that CTC cannot align. Evaluation-only utterances
        need no tokens.

        Args:
            encode: text to tokens; utterances for which it raises ValueError are left out too.
            max_output_length: see :func:`load_corpus`.
            needed: splits of which at least one must not be empty.

        Raises:
            CorpusError: nothing is left of the ``needed`` splits.
        """
        kept, rejected = [], list(self.rejected)
        for index, utterance in enumerate(self.utterances):
            if utterance.split != "train":
                kept.append(index)
                continue
            try:
                tokens = encoded(encode, utterance.text)
                check_feasible(tokens, max_output_length(utterance.duration))
            except Unusable as reason:
                rejected.append(Rejected(utterance.id, str(reason)))
            else:
                kept.append(index)
        left = replace(self, utterances=self.utterances.select(kept), rejected=rejected)
        return left.with_something_in(needed)

    def summary(self, between: str = "\n  ") -> str:
        """The size of each split, and of each kind of reason the first rows that are left out.

        Args:
            between: stands between two of these; the default makes a line of each.
        """
        lines = [f"{self.spec}: {_amount(self.utterances)}"]
        lines += [f"{name:<5} {_amount(self.split(name))}" for name in SPLITS]
        if not self.decoded:
            lines.append("not decoded: durations are from the manifest and from headers")
        for kind, count in Counter(row.kind for row in self.rejected).most_common():
            rows = [row for row in self.rejected if row.kind == kind]
            others = ", ..." if count > 3 else ""
            names = ", ".join(row.id for row in rows[:3])
            lines.append(f"left out {count}: {names}{others} ({rows[0].reason})")
        for kind, change in sorted(self.changes.items(), key=lambda item: -item[1].count):
            example = f"{_cut(change.written)} -> {_cut(change.text)}"
            lines.append(f"texts changed {change.count}, {kind}: {change.id} ({example})")
        return between.join(lines)

    def write_left_out(self, file: TextIO) -> None:
        """Write a line of JSON with the id and the reason of each row that was left out."""
        for row in self.rejected:
            print(_json_line(asdict(row)), file=file)

    def with_something_in(self, splits: Iterable[str]) -> "Corpus":
        """This corpus; raises CorpusError if all of these splits are empty."""
        if not any(len(self.split(name)) for name in splits):
            raise CorpusError(
                f"no usable row in the split {' or '.join(splits)}; correct or replace these rows, "
                f"or use another split; {self.summary('; ')}"
            )
        return self


def load_corpus(
    spec: str,
    *,
    max_output_length: Callable[[float], int] | None = None,
    max_duration: float = 20.0,
    min_duration: float = 0.1,
    check: Literal["auto", "decode", "header"] = "auto",
    cache_dir: Path | None = None,
    seed: int = 0,
    channel: str = "mix",
    needed: Iterable[str] = ("train",),
    rules: TextRules | None = None,
    silent: bool = False,
    changed: TextIO | None = None,
) -> Corpus:
    """Read a corpus, without the rows that cannot be used.

    Rows without a split get one from :func:`assign_splits`, before the recordings are checked, so
    that models of different strides train and test on the same sentences.

    Args:
        spec: names the corpus; see the top of specs.py.
        max_output_length: output frames of the model for a duration in seconds. A text of U
            characters with R equal neighbours needs U + R of them, otherwise its loss is infinite.
            Leave it out for a tokenizer of larger units, and call :meth:`Corpus.drop_infeasible`
            with that tokenizer.
        max_duration, min_duration: of a recording, in seconds. A header that claims more is
            believed.
        check: "decode" decodes every recording. "header" uses the durations of the manifest, and
            those of headers for the other rows; damaged recordings are found when they are loaded
            (see SpeechDataset). "auto" decodes up to DECODED_ROWS rows.
        cache_dir: of the synthetic corpus, and of recordings from tar files.
        seed: of the synthetic corpus.
        channel: a key of part.CHANNELS, for the rows that do not name their own.
        needed: splits of which at least one must not be empty.
        rules: by which texts are normalised; default TextRules().
        silent: whether rows without words are kept, if they have a split.
        changed: gets a line of JSON for each text that normalising changed.

    Raises:
        CorpusError: the spec is unknown, the corpus does not exist, or nothing is left of the
            ``needed`` splits; the message lists what was left out.
    """
    sorting = _Sorting(rules or TextRules(), silent, changed, CHANNELS[channel])
    rows, rejected = _rows(spec, cache_dir, seed, sorting), sorting.rejected
    decoded = check == "decode" or (check == "auto" and len(rows) <= DECODED_ROWS)
    durations, kept = rows.durations, []
    bar = tqdm(rows, f"reading {spec}", leave=False, delay=1, disable=not sys.stderr.isatty())
    for index, row in enumerate(bar):
        try:
            if decoded:
                durations[index] = decoded_duration(row.audio, max_duration, row.part)
            elif math.isnan(row.duration):
                durations[index] = header_duration(row.audio, row.part)
            check_duration(row.audio, durations[index], min_duration, max_duration)
        except Unusable as reason:
            rejected.append(Rejected(row.id, str(reason)))
        else:
            kept.append(index)
    kept_rows = rows.with_durations(durations).select(kept)
    corpus = Corpus(spec, kept_rows, rejected, decoded, sorting.changes, sorting.unsplit)
    if max_output_length is None:
        return corpus.with_something_in(needed)
    return corpus.drop_infeasible(str, max_output_length, needed)


def read_rows(
    spec: str,
    *,
    cache_dir: Path | None = None,
    seed: int = 0,
    channel: str = "mix",
    rules: TextRules | None = None,
) -> tuple[Utterances, list[Rejected]]:
    """The rows of a corpus, each with its normalised text and its split, and those left out.

    No recording is opened: they may be missing, damaged, or too short for their texts. Durations
    are those of a manifest, or NaN.

    Raises:
        CorpusError: the spec is unknown, or the corpus does not exist.
    """
    sorting = _Sorting(rules or TextRules(), channel=CHANNELS[channel])
    return _rows(spec, cache_dir, seed, sorting), sorting.rejected


def assign_splits(texts: Iterable[str]) -> dict[str, str]:
    """The split of each distinct text. Of the texts with 1, with 2 or 3, and with more words, a
    tenth is test, a tenth is dev and the rest is train; fewer than 5 texts of a length are train.

    Texts are ordered by hash, so the split of a text does not depend on the order of the rows or on
    a seed, and all recordings of a text have the same split.
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


def _rows(spec: str, cache_dir: Path | None, seed: int, sorting: "_Sorting") -> Utterances:
    try:
        sorting.rules.check()
    except (TextError, MissingExtra) as error:
        raise CorpusError(str(error)) from error
    return _with_splits(Utterances(sorting.sort_out(read_spec(spec, cache_dir, seed))))


class _Sorting:
    """Separates the rows whose descriptions can be used, with normalised texts, from those in
    ``rejected``. The recordings are not checked here."""

    def __init__(
        self,
        rules: TextRules,
        silent: bool = False,
        changed: TextIO | None = None,
        channel: int | None = None,
    ) -> None:
        self.rules = rules
        self.silent = silent
        self.changed = changed
        self.channel = channel
        self.changes: dict[str, Change] = {}
        self.rejected: list[Rejected] = []
        self.unsplit = 0

    def sort_out(self, found: Iterable[Row | Rejected]) -> Iterator[Utterance]:
        ids = set()
        for row in found:
            if isinstance(row, Rejected):
                self.rejected.append(Rejected(_shown(row.id), row.reason))
                continue
            try:
                text, kinds = self._checked_text(row, ids)
            except Unusable as reason:
                self.rejected.append(Rejected(_shown(row.id), str(reason)))
            else:
                ids.add(row.id)
                self._note(row, text, kinds)
                self.unsplit += row.split is None
                duration = math.nan if row.duration is None else row.duration
                part = row.part
                if part.channel is None and self.channel is not None:
                    part = replace(part, channel=self.channel)
                yield Utterance(row.id, row.audio, text, row.split, duration, part)

    def _checked_text(self, row: Row, ids: set[str]) -> tuple[str, set[str]]:
        """The normalised text of a row, and what was changed; raises Unusable."""
        _check_description(row, ids)
        try:
            text, kinds = normalized(row.text, self.rules)
        except TextError as error:
            raise Unusable(str(error)) from error
        if row.written is not None and row.written != row.text:
            kinds.add("corrected by the corpus's reader")
        if text or (self.silent and row.split is not None):
            return text, kinds
        raise Unusable(
            f"no words: nothing of {row.text!r:.60} is spoken; transcribe it"
            + (", or give it a split" if self.silent else "")
        )

    def _note(self, row: Row, text: str, kinds: set[str]) -> None:
        if not kinds:
            return
        written = row.text if row.written is None else row.written
        for kind in kinds:
            if kind in self.changes:
                self.changes[kind].count += 1
            else:
                self.changes[kind] = Change(1, row.id, written, text)
        if self.changed is not None:
            line = {"id": row.id, "written": written, "text": text, "changed": sorted(kinds)}
            print(_json_line(line), file=self.changed)


def _check_description(row: Row, ids: set[str]) -> None:
    """Raise Unusable for an id, a split or a text that cannot be used."""
    if len(row.id) > MAX_ID:
        raise Unusable(f"id too long: {len(row.id)} characters, over {MAX_ID}; shorten the path")
    if row.id != (shown := _shown(row.id)):
        raise Unusable(f"control characters: in {shown}; rename the file")
    if row.id in ids:
        raise Unusable(f"duplicate id: an earlier row has {row.id}; rename or remove this one")
    if row.split not in (None, *SPLITS):
        raise Unusable(f"unknown split: {row.split!r:.60}; use one of {', '.join(SPLITS)}")
    if len(row.text) > MAX_TEXT:
        raise Unusable(f"text too long: {len(row.text)} characters, over {MAX_TEXT}; cut it")


def _json_line(values: dict[str, object]) -> str:
    """JSON that is safe to print: control characters and line separators are escaped."""
    line = json.dumps(values, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _cut(text: str) -> str:
    """The start of a text, quoted, for a line of a log."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _shown(id: str) -> str:
    """``id`` for a line of a log: short, and without control characters, which could imitate
    further lines."""
    short = id if len(id) <= MAX_ID else id[:60] + "..."
    if short.isprintable():
        return short
    # Cc: control; Cs: half a character; Zl, Zp: line and paragraph separators
    odd = any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in short)
    return ascii(short) if odd else short


def _with_splits(rows: Utterances) -> Utterances:
    """Give rows without a split that of their text: another row's, or an assigned one."""
    texts = set(rows.of_split(None).texts())
    given = {text: name for name in SPLITS for text in rows.of_split(name).texts() if text in texts}
    return rows.with_splits(given | assign_splits(texts - given.keys()))


def _amount(utterances: Utterances) -> str:
    return f"{len(utterances)} utterances, {utterances.durations.sum() / 60:.1f} min"
