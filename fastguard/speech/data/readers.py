"""One reader per kind of corpus: from the files on the disk to rows, without checking recordings.

A reader yields a :class:`Row` for each recording that it finds, or :class:`Rejected` if the row
itself cannot be used. It raises :class:`CorpusError` if the corpus does not exist.
:func:`fastguard.speech.data.corpora.load_corpus` normalises the texts and checks the recordings.
"""

import codecs
import gzip
import itertools
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


def user_path(place: str | Path) -> Path:
    """The path, with ``~`` replaced by a home folder; raises CorpusError if there is none."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:  # no HOME, and no entry of the user
        raise CorpusError(f"{place} cannot be found: {error}") from error


def lines(path: Path) -> Iterator[tuple[int, str | Rejected]]:
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
        for _, line in lines(transcript):
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
    for _, line in lines(transcript):
        if isinstance(line, Rejected):
            raise CorpusError(f"{transcript}, {line.id}: {line.reason}")
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            yield name.strip(), text.strip()
