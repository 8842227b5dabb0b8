"""Reads manifests: files with one JSON object per line, and tables with a header (csv, tsv).

A manifest is named by its file; by ``train=FILE,dev=FILE,test=FILE`` if each split has its own; or
by a folder that holds such files, as Common Voice and Hugging Face's datasets have them.
"""

import csv
import json
import math
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from .part import CHANNELS, Part
from .readers import CorpusError, Rejected, Row, lines, user_path

#: The split of each name that a row, a file or a folder may have.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("dev", "development", "valid", "val", "validation", "eval", "evaluation"), "dev"
    ),
    **dict.fromkeys(("test", "testing"), "test"),
}
# The first that a row has is used: NeMo's and those of other toolkits and of Hugging Face.
_AUDIO = (
    *("audio_filepath", "audio", "audio_path", "audio_file", "file_name", "filename", "file"),
    *("path", "wav", "wav_filename", "wav_path"),
)
_TEXT = ("text", "sentence", "transcript", "transcription", "transcript_text", "normalized_text")
# Not used, because in some corpora they are something else; an error names the one to rename.
_DOUBTFUL = {"text": ("label", "target", "words", "txt", "raw_text"), "audio_filepath": ("id",)}
# Of a segment in other toolkits: with these alone, a text would be paired with all of a recording.
_OTHER_STARTS = ("start", "start_time", "begin", "begin_time", "segment_start")
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
_TABLES = (".csv", ".tsv")
_MOST_SECONDS = 1e9  # 30 years
_MOST_DIGITS = 400  # of an integer; the error of Python's own limit gives advice for programmers
_EXAMPLE = '{"audio_filepath": "a.wav", "text": "hello"}'


@dataclass(frozen=True)
class _File:
    """A manifest, and the split that all its rows have; None if each row says."""

    path: Path
    split: str | None = None


def read_manifest(place: Path | str) -> Iterator[Row | Rejected]:
    """Read the manifest, or the manifests, that ``place`` names; see the top of this file.

    Keys of a row, or columns of a table: the recording (``audio_filepath`` or another of _AUDIO,
    relative to the manifest's folder; also the row's id) and the text (``text`` or another of
    _TEXT); and optionally ``split``, ``duration`` and ``offset`` in seconds, and ``channel``, left,
    right or a number from 0. Numbers may be in quotes; null and empty cells are left out. Other
    keys are ignored.

    With an ``offset`` the row is the segment of the recording that begins there and has the
    ``duration``, or goes to the end. Without one the row is the whole recording.

    Raises:
        CorpusError: a file does not exist, or is not such a file.
    """
    files = _files(str(place))
    base = Path(os.path.commonpath([file.path.absolute().parent for file in files]))
    for file in files:
        if not file.path.is_file():
            raise CorpusError(
                f"the manifest {file.path} does not exist: give manifest:FILE, a folder, or "
                "manifest:train=FILE,dev=FILE,test=FILE"
            )
        within = file.path.absolute().parent.relative_to(base).as_posix()
        prefix = "" if within == "." else f"{within}/"
        read = _table_rows if _suffix(file.path) in _TABLES else _json_rows
        for row in read(file, prefix):
            if len(files) > 1 and isinstance(row, Rejected) and row.id.startswith("line "):
                row = Rejected(f"{prefix}{file.path.name}, {row.id}", row.reason)
            yield row


def absolute_files(place: str) -> str:
    """``place`` with absolute paths."""
    parts = [(split, user_path(path).absolute()) for split, path in named_files(place)]
    return ",".join(f"{split}={path}" if split else str(path) for split, path in parts)


def named_files(place: str) -> list[tuple[str, str]]:
    """(SPLIT, FILE) of ``train=FILE,dev=FILE``; ("", FILE) for a place without splits."""
    names = "|".join(SPLIT_NAMES)
    if not re.match(rf"({names})=", place):
        return [("", place)]
    pieces = re.split(rf",(?=(?:{names})=)", place)
    return [(name, path) for name, _, path in (piece.partition("=") for piece in pieces)]


def _files(place: str) -> list[_File]:
    found = []
    for split, path in named_files(place):
        path = user_path(path)
        if not path.is_dir():
            found.append(_File(path, SPLIT_NAMES.get(split)))
        elif split:
            raise CorpusError(f"{path} is a folder: give {split}=FILE, or manifest:{path} alone")
        else:
            found += _files_in(path)
    return found


def _files_in(folder: Path) -> list[_File]:
    """The manifests of a folder: train.tsv, dev.tsv and test.tsv, or train/metadata.csv and so on,
    or one metadata.csv."""
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz").rpartition(".")[0]
        if _suffix(path) in _SUFFIXES and name in SPLIT_NAMES:
            found.append(_File(path, SPLIT_NAMES[name]))
        elif path.name in SPLIT_NAMES and path.is_dir():
            found += [_File(inner, SPLIT_NAMES[path.name]) for inner in _metadata(path)]
    found = found or [_File(path) for path in _metadata(folder)]
    if not found:
        raise CorpusError(
            f"{folder} has no manifest: name its files train, dev and test with .jsonl, .csv or "
            ".tsv, or give manifest:FILE"
        )
    splits = [file.split for file in found]
    if twice := [split for split in splits if splits.count(split) > 1]:
        names = ", ".join(file.path.name for file in found if file.split == twice[0])
        raise CorpusError(
            f"{folder} has more than one manifest of a split: {names}; choose with "
            "manifest:train=FILE,dev=FILE,test=FILE"
        )
    return found


def _metadata(folder: Path) -> list[Path]:
    places = [folder / f"metadata{suffix}" for suffix in _SUFFIXES]
    return [place for place in places if place.is_file()]


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


# --- lines of JSON and tables ---------------------------------------------------------------------


def _json_rows(file: _File, prefix: str) -> Iterator[Row | Rejected]:
    for number, line in lines(file.path):
        if number == 1:
            _check_lines_of_json(file.path, line)
        if isinstance(line, Rejected):
            yield line
            continue
        try:
            entry = json.loads(
                line, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer
            )
            if not isinstance(entry, dict):
                raise TypeError(f"{entry!r:.60} is not an object with keys")
            yield _row(entry, file, file.path.parent, prefix)
        # RecursionError: a thousand brackets
        except (ValueError, TypeError, RecursionError) as error:
            yield _malformed(number, error, f"write {_EXAMPLE}")


def _table_rows(file: _File, prefix: str) -> Iterator[Row | Rejected]:
    """A row per line. A tab-separated table has no quotes, as those of Common Voice."""
    header: list[str] = []
    folder = clips = file.path.parent
    for number, line in lines(file.path):
        if isinstance(line, Rejected):
            if not header:
                raise CorpusError(f"{file.path}, line {number}, its header: {line.reason}")
            yield line
            continue
        if not header:
            header, options = _header(file.path, line)
            if (folder / "clips").is_dir():  # Common Voice names files of this folder
                clips = folder / "clips"
            continue
        try:
            cells = next(csv.reader([line], strict=True, **options))
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns, and the header has {len(header)}")
            entry = {key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}
            plain = os.sep not in entry.get("path", os.sep) and "/" not in entry["path"]
            yield _row(entry, file, clips if plain else folder, prefix)
        except (ValueError, TypeError, csv.Error) as error:
            yield _malformed(number, error, "write a recording per line, with the header's columns")


def _header(path: Path, line: str) -> tuple[list[str], dict]:
    """The columns of a table, and how csv reads it; raises CorpusError."""
    if _suffix(path) == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        options = {"delimiter": max(",;\t|", key=line.count)}
    try:
        cells = next(csv.reader([line], **options))
    except csv.Error as error:
        raise CorpusError(
            f"{path}, line 1: {line[:60]!r} is no header of a table: {error}"
        ) from error
    header = [cell.strip().strip('"').lower() for cell in cells]
    for key, others in (("audio_filepath", _AUDIO), ("text", _TEXT)):
        if not any(other in header for other in others):
            raise CorpusError(
                f"{path}, line 1: a table begins with a header, and {line[:60]!r} has no column "
                f"{key!r}, nor {', '.join(others[1:])}{_doubtful(key, header)}"
            )
    if len(set(header)) < len(header):
        raise CorpusError(f"{path}, line 1: {line[:60]!r} has a column twice: rename one")
    return header, options


def _malformed(number: int, error: Exception, todo: str) -> Rejected:
    reason = f"malformed line: {type(error).__name__}: {error!s:.200}; {todo}"
    return Rejected(f"line {number}", reason)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"{digits[:20]}... is a number of {len(digits)} digits")
    return int(digits)


def _check_lines_of_json(path: Path, line: str | Rejected) -> None:
    """Raise CorpusError for a table or a list, in which every line would be malformed."""
    start = line.lstrip() if isinstance(line, str) else "{"
    if start.startswith("{"):
        return
    if start[:1] not in '["' and re.search(r"[,\t|]", start):
        raise CorpusError(
            f"{path}, line 1: {start[:60]!r} is a row of a table, and the name does not end in "
            ".csv or .tsv: rename it, and give it a header such as audio_filepath,text"
        )
    if start.strip() == "[":
        raise CorpusError(
            f"{path}, line 1: a JSON list, but a manifest has one object per line: "
            f"jq -c '.[]' {path} > NEW.jsonl"
        )


# --- a row ----------------------------------------------------------------------------------------


def _row(entry: dict[str, object], file: _File, folder: Path, prefix: str) -> Row | Rejected:
    """The row of these keys; raises ValueError or TypeError for one that is malformed."""
    audio, text = _found(entry, "audio_filepath", _AUDIO), text_of(entry)
    if isinstance(audio, dict):  # an Audio feature of Hugging Face's datasets
        audio = audio.get("path")
    if not (isinstance(audio, str) and isinstance(text, str)):
        raise TypeError(f"audio_filepath is {audio!r:.60} and text is {text!r:.60}")
    id = audio if os.path.isabs(audio) else prefix + audio
    offset, duration = _seconds(entry, "offset"), _seconds(entry, "duration")
    if offset is None and (other := _other_start(entry)):
        return Rejected(
            id, f"segment: {other} is {entry[other]!r:.60}; rename it to offset, in seconds"
        )
    if duration == 0 and offset is not None:
        return Rejected(id, f"segment: offset is {offset:g} and duration 0; correct the duration")
    part = Part(offset or 0.0, None if offset is None else duration, _channel(entry))
    if part.start > 0:
        end = "" if duration is None else f"{part.start + duration:.3f}"
        id += f"#{part.start:.3f}-{end}"
    split = entry.get("split") or None
    split = SPLIT_NAMES.get(split.lower(), split) if isinstance(split, str) else split
    if file.split not in (None, split) and split is not None:
        todo = "correct one of them"
        return Rejected(id, f"two splits: {split!r:.60} in the {file.split} of the corpus; {todo}")
    return Row(id, folder / audio, text, split or file.split, duration, part)


def text_of(entry: dict[str, object]) -> object:
    """The text of a row with these keys; raises ValueError where there is none."""
    return _found(entry, "text", _TEXT)


def _found(entry: dict[str, object], key: str, names: tuple[str, ...]) -> object:
    """The value of the first of these keys; raises ValueError, which names a key to rename."""
    name = next((name for name in names if entry.get(name) is not None), None)
    if name is not None:
        return entry[name]
    if any(name in entry for name in names):
        return None
    there = ", ".join(map(repr, entry))[:120]
    raise ValueError(f"no key {key!r} among {there}{_doubtful(key, entry) or f': add {key!r}'}")


def _doubtful(key: str, names: Container[str]) -> str:
    """Advice to rename a key that may be meant; "" if there is none."""
    meant = next((name for name in _DOUBTFUL[key] if name in names), None)
    return f": rename {meant!r} to {key!r}" if meant else ""


def _other_start(entry: dict[str, object]) -> str | None:
    """A key by which another toolkit names the start of a segment."""
    for key in _OTHER_STARTS:
        if key in entry and not isinstance(entry[key], bool):
            try:
                if float(entry[key]) > 0:
                    return key
            except (TypeError, ValueError, OverflowError):
                continue  # not a time: a word, a list
    return None


def _seconds(entry: dict[str, object], key: str) -> float | None:
    """A number of seconds, which may be in quotes; None if the key is missing."""
    value = entry.get(key)
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < _MOST_SECONDS:
        raise ValueError(f"{key} is {value!r:.60}, which is not a number of seconds")
    return seconds


def _channel(entry: dict[str, object]) -> int | None:
    """The number of a channel, from 0; None if the key is missing."""
    value = entry.get("channel")
    if value is None or value == "":
        return None
    names = {name: number for name, number in CHANNELS.items() if number is not None}
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,4}", str(value)):
        raise ValueError(f"channel is {value!r:.60}: give {', '.join(names)}, or a number from 0")
    return int(value)
