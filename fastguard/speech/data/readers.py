"""One reader per kind of corpus: from the files on the disk to rows, without checking recordings.

A reader yields a :class:`Row` for each recording that it finds, or :class:`Rejected` if the row
itself cannot be used. It raises :class:`CorpusError` if the corpus does not exist.
:func:`fastguard.speech.data.corpora.load_corpus` normalises the texts and checks the recordings.
"""

import codecs
import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from .part import WHOLE, Part
from .text import needs_english, spell_keys

LONGEST_LINE = 1 << 20
_FOREIGN_MARKS = {  # longer marks first: UTF-32's starts with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ASTERISK_SOUNDS = Path("/usr/share/asterisk/sounds")
ASTERISK_VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
# What the transcripts of asterisk-core-sounds-en 1.6.1 say, and what the recordings say.
ASTERISK_TYPOS = {
    "umute": "unmute",
    "fourtieth": "fortieth",
    "represenatives": "representatives",
    "witheld": "withheld",
    "Un-indentified": "Unidentified",
    "exclaimation": "exclamation",
    "www.asterisk.org": "w w w dot asterisk dot org",
}


_MOST_DIGITS = (
    400  # of an integer in a manifest; the error of Python's own limit gives advice for programmers
)
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "valid", "val", "validation", "development"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OTHER_KEYS = {
    "audio_filepath": ("audio", "path", "file", "file_name", "filename", "wav", "audio_path",
                       "wav_filename", "audio_file"),
    "text": ("sentence", "transcript", "transcription", "transcript_text", "label", "target",
             "normalized_text", "words", "txt"),
}  # fmt: skip


class CorpusError(ValueError):
    """A corpus cannot be used; the message says why and what to do."""


class Unusable(ValueError):
    """A recording or its row is left out; the message reads "kind: the values; what to do"."""


@dataclass(frozen=True)
class Row:
    """A recording as its corpus describes it.

    Attributes:
        id: unique in the corpus.
        audio: path of the recording.
        text: the transcript, not normalised.
        split: "train", "dev", "test", or None if unknown.
        duration: in seconds; None if unknown.
        part: of the recording that the text belongs to.
        written: the transcript in the corpus, if the reader corrected it.
    """

    id: str
    audio: Path
    text: str
    split: str | None = None
    duration: float | None = None
    part: Part = WHOLE
    written: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rejected:
    """A row that is left out; ``reason`` reads "kind: the values; what to do"."""

    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The part of the reason before the colon."""
        return self.reason.partition(":")[0]


def read_manifest(path: Path) -> Iterator[Row | Rejected]:
    """Read a file with one JSON object per line.

    Keys: ``audio_filepath`` (relative to the manifest's folder; also the row's id), ``text``, and
    optionally ``split`` and ``duration`` in seconds. Other keys are ignored. An ``offset`` other
    than 0 is refused, because without it the text would be paired with a whole recording.

    Raises:
        CorpusError: the file does not exist, or is not such a file.
    """
    if not path.is_file():
        raise CorpusError(f"the manifest {path} does not exist: give manifest:FILE.jsonl")
    for number, line in _lines(path):
        if number == 1:
            _check_lines_of_json(path, line)
        yield _manifest_row(line, number, path.parent) if isinstance(line, str) else line


def _manifest_row(line: str, number: int, folder: Path) -> Row | Rejected:
    try:
        entry = json.loads(
            line, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer
        )
        if not isinstance(entry, dict):
            raise TypeError(f"{entry!r:.60} is not an object with keys")
        _check_keys(entry)
        audio, text = entry["audio_filepath"], entry["text"]
        if not (isinstance(audio, str) and isinstance(text, str)):
            raise TypeError(f"audio_filepath is {audio!r:.60} and text is {text!r:.60}")
        if _seconds(entry, "offset"):
            todo = "cut the segment into its own file"
            reason = f"offset not supported: offset is {entry['offset']!r:.60}; {todo}"
            return Rejected(audio, reason)
        split = entry.get("split")
        split = _SPLIT_NAMES.get(split.lower(), split) if isinstance(split, str) else split
        return Row(audio, folder / audio, text, split, _seconds(entry, "duration"))
    # RecursionError: a thousand brackets
    except (ValueError, TypeError, RecursionError) as error:
        todo = 'write {"audio_filepath": "a.wav", "text": "hello"}'
        return Rejected(
            f"line {number}", f"malformed line: {type(error).__name__}: {error!s:.200}; {todo}"
        )


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


def _check_keys(entry: dict[str, object]) -> None:
    """Raise ValueError for a missing key; it names the key of another toolkit to rename."""
    for key, others in _OTHER_KEYS.items():
        if key not in entry:
            there = [other for other in others if other in entry]
            todo = f"rename {there[0]!r} to {key!r}" if there else f"add {key!r}"
            raise ValueError(f"no key {key!r} among {', '.join(map(repr, entry))[:120]}: {todo}")


def _check_lines_of_json(path: Path, line: str | Rejected) -> None:
    """Raise CorpusError for a table or a list, in which every line would be malformed."""
    start = line.lstrip() if isinstance(line, str) else "{"
    if start.startswith("{"):
        return
    if path.suffix in (".csv", ".tsv") or (start[:1] not in '["' and re.search(r"[,\t|]", start)):
        raise CorpusError(
            f"{path}, line 1: {start[:60]!r} is a row of a table, but a manifest is JSON: write "
            'one object per line, {"audio_filepath": "a.wav", "text": "hello"}'
        )
    if start.strip() == "[":
        raise CorpusError(
            f"{path}, line 1: a JSON list, but a manifest has one object per line: "
            f"jq -c '.[]' {path} > NEW.jsonl"
        )


def _seconds(entry: dict[str, object], key: str) -> float | None:
    """A number of seconds, which may be in quotes; None if the key is missing."""
    value = entry.get(key)
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{key} is {value!r:.60}, which is not a number of seconds")
    return seconds


def _lines(path: Path) -> Iterator[tuple[int, str | Rejected]]:
    """The lines of a UTF-8 file that are not empty, with their numbers from 1.

    A line over LONGEST_LINE bytes, or in another encoding, becomes :class:`Rejected`.

    Raises:
        CorpusError: the file cannot be read, or is in UTF-16 or UTF-32.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if number == 1:
                    _check_encoding(path, line)
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    yield number, _too_long(file, number)
                elif line.strip():
                    yield number, _decoded(line, number)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: {error}; copy it again") from error


def _check_encoding(path: Path, start: bytes) -> None:
    mark = next((mark for mark in _FOREIGN_MARKS if start.startswith(mark)), None)
    # Without a mark, every other byte of ASCII in UTF-16 is NUL.
    name = _FOREIGN_MARKS.get(mark, "utf-16") if mark or b"\0" in start[:2] else None
    if name:
        raise CorpusError(f"{path} is {name}: convert it, iconv -f {name} -t utf-8 {path} > NEW")


def _too_long(file: BinaryIO, number: int) -> Rejected:
    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass
    return Rejected(
        f"line {number}", f"line too long: over {LONGEST_LINE} bytes; write one recording per line"
    )


def _decoded(line: bytes, number: int) -> str | Rejected:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        todo = "convert the file with iconv -t utf-8"
        return Rejected(f"line {number}", f"malformed line: not UTF-8: {error}; {todo}")


def read_librispeech(root: Path) -> Iterator[Row]:
    """Read ``root/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt``, with a FLAC file per line.

    The split is the first word of the subset's name (train-clean-100, dev-other, ...).
    """
    transcripts = sorted(root.glob("*-*/*/*/*.trans.txt"))
    if not transcripts:
        raise CorpusError(
            f"no SUBSET/SPEAKER/CHAPTER/*.trans.txt in {root}: give librispeech:DIR, where DIR is "
            "the folder that holds train-clean-100 and the other subsets"
        )
    for transcript in transcripts:
        split = transcript.relative_to(root).parts[0].partition("-")[0]
        for _, line in _lines(transcript):
            if isinstance(line, Rejected):
                yield replace(line, id=f"{transcript.name}, {line.id}")
                continue
            name, _, text = line.partition(" ")
            yield Row(name, transcript.with_name(f"{name}.flac"), text, split)


def read_yesno(root: Path) -> Iterator[Row]:
    """Read files like ``1_0_0_1_1_1_0_0.wav``. The name is the transcript: 0 for "no" and 1 for
    "yes" (the speaker says the Hebrew words)."""
    recordings = [p for p in sorted(root.glob("*.wav")) if re.fullmatch(r"[01](_[01])*", p.stem)]
    if not recordings:
        raise CorpusError(
            f"no file like 0_1_1_0_1_0_0_1.wav in {root}: give yesno:DIR, where DIR is the "
            "waves_yesno folder of the archive"
        )
    for path in recordings:
        yield Row(
            path.stem, path, path.stem.replace("0", "no").replace("1", "yes").replace("_", " ")
        )


def read_asterisk(root: Path, language: str) -> Iterator[Row | Rejected]:
    """Read the Asterisk telephone prompts: ``root/VOICE/NAME.wav``, with transcripts "NAME: text"
    in ``core-sounds-LANGUAGE.txt.gz``, in ``root`` or in the documentation of the Debian package.

    English 1.6.1 has 568 recordings, 551 of them with words; tones and silences have a note in
    brackets as text. Left out are demo-instruct, whose "500", "1234" and "28.8" are not read digit
    by digit; in other languages every prompt with a digit or a key in its text, because numbers and
    keys are spelled in English only; and recordings without a transcript.
    """
    if language not in ASTERISK_VOICES:
        raise CorpusError(f"no asterisk@{language}: choose one of {', '.join(ASTERISK_VOICES)}")
    voice = root / ASTERISK_VOICES[language]
    named = set()
    for name, text in _asterisk_transcripts(root, voice, language):
        named.add(name)
        if language == "en":
            yield _asterisk_english(name, voice, text)
        elif needs_english(text):
            todo = f"spell {text!r:.60} out in {language!r}"
            yield Rejected(
                name, f"digits in the text: they become number words in English only; {todo}"
            )
        else:
            yield Row(name, voice / f"{name}.wav", text)
    for path in sorted(voice.rglob("*.wav")):
        if (name := path.relative_to(voice).with_suffix("").as_posix()) not in named:
            yield Rejected(name, "no transcript: core-sounds has no line for it; add one")


def _asterisk_english(name: str, voice: Path, text: str) -> Row | Rejected:
    if name == "demo-instruct":
        numbers = "28.8, 500, 1234 and 8500 are not read digit by digit"
        return Rejected(name, f"ambiguous numbers: {numbers}; spell them as spoken")
    spoken = text
    for wrong, right in ASTERISK_TYPOS.items():
        spoken = spoken.replace(wrong, right)
    # The voice reads the keys of a menu one by one.
    spoken = spell_keys(spoken) if needs_english(spoken) else spoken
    return Row(name, voice / f"{name}.wav", spoken, written=text)


def _asterisk_transcripts(root: Path, voice: Path, language: str) -> Iterator[tuple[str, str]]:
    package = f"asterisk-core-sounds-{language}"
    file = f"core-sounds-{language}.txt.gz"
    places = [root / file, Path("/usr/share/doc", package, file)]
    transcript = next((place for place in places if place.is_file()), None)
    missing = [what for what, there in ((voice, voice.is_dir()), (file, transcript)) if not there]
    if missing:
        raise CorpusError(
            f"{' and '.join(map(str, missing))} not found: apt-get install {package} {package}-wav "
            f"(if dpkg skips /usr/share/doc, put {file} into {root})"
        )
    for _, line in _lines(transcript):
        if isinstance(line, Rejected):
            raise CorpusError(f"{transcript}, {line.id}: {line.reason}")
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            yield name.strip(), text.strip()
