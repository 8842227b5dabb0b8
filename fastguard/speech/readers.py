"""One reader per kind of corpus: from the files as they lie on the disk to rows, judging nothing.

A reader yields a :class:`Row` for each recording it finds, or :class:`Rejected` where it can tell
itself that there is none to be had; it raises :class:`CorpusError` where the corpus is not there.
:func:`fastguard.speech.corpora.load_corpus` normalises the texts and checks the recordings.
"""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastguard.speech.text import needs_english

ASTERISK_SOUNDS = Path("/usr/share/asterisk/sounds")
ASTERISK_VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
# What asterisk-core-sounds-en 1.6.1 writes, and what a speller of the recording would write.
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
    """A corpus that can not be used, and what to do about it."""


class Unusable(ValueError):
    """Why a recording or its row is left out; reads "kind: the numbers, and the cure"."""


@dataclass(frozen=True)
class Row:
    """A recording as its corpus describes it: ``text`` is raw, ``split`` may be unknown."""

    id: str
    audio: Path
    text: str
    split: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A row that was left out; ``reason`` reads "kind: the numbers, and the cure"."""

    id: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


def read_manifest(path: Path) -> Iterator[Row | Rejected]:
    """One JSON object a line: ``audio_filepath`` (relative to the manifest's folder, and the row's
    id), ``text``, and optionally ``split``.  Other keys are ignored, ``duration`` too: it is
    measured.  ``offset`` is refused, since ignoring it would pair the text with a whole recording.
    """
    if not path.is_file():
        raise CorpusError(f"there is no manifest {path}: give manifest:FILE.jsonl")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _manifest_row(line, number, path.parent)


def _manifest_row(line: bytes, number: int, folder: Path) -> Row | Rejected:
    try:
        entry = json.loads(line)
        audio, text = entry["audio_filepath"], entry["text"]
        if not (isinstance(audio, str) and isinstance(text, str)):
            raise TypeError(f"audio_filepath is {audio!r} and text is {text!r}")
    except (ValueError, KeyError, TypeError) as error:
        cure = 'write {"audio_filepath": "a.wav", "text": "hello"}'
        return Rejected(
            f"line {number}", f"malformed line: {type(error).__name__}: {error}; {cure}"
        )
    if "offset" in entry:
        cure = "cut the segment into a file of its own"
        return Rejected(audio, f"offset not supported: offset is {entry['offset']!r}; {cure}")
    return Row(audio, folder / audio, text, entry.get("split"))


def read_librispeech(root: Path) -> Iterator[Row]:
    """``root/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`` with a flac file for each line;
    the split is the subset's first word (train-clean-100, dev-other, ...)."""
    transcripts = sorted(root.glob("*-*/*/*/*.trans.txt"))
    if not transcripts:
        raise CorpusError(
            f"no SUBSET/SPEAKER/CHAPTER/*.trans.txt in {root}: give librispeech:DIR, where DIR is "
            "the folder that holds train-clean-100 and the other subsets"
        )
    for transcript in transcripts:
        split = transcript.relative_to(root).parts[0].partition("-")[0]
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Row(name, transcript.with_name(f"{name}.flac"), text, split)


def read_yesno(root: Path) -> Iterator[Row]:
    """``1_0_0_1_1_1_0_0.wav``: the name spells the recording, 0 for "no" and 1 for "yes" (the
    speaker says them in Hebrew)."""
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
    """The Asterisk telephone prompts: ``root/VOICE/NAME.wav``, and transcripts "NAME: text" in
    ``core-sounds-LANGUAGE.txt.gz``, in ``root`` or in the documentation of the Debian package.

    English 1.6.1 holds 568 recordings, 551 of them with words (tones and silences have a note in
    brackets for a text).  Left out here: demo-instruct, whose "500", "1234" and "28.8" are not
    read digit by digit; in the other languages every prompt with a digit or a key in its text,
    which only English can spell; and recordings that no transcript names.
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
            cure = f"spell {text!r:.60} out in {language!r}"
            yield Rejected(
                name, f"digits in the text: only English is read with number words; {cure}"
            )
        else:
            yield Row(name, voice / f"{name}.wav", text)
    for path in sorted(voice.rglob("*.wav")):
        if (name := path.relative_to(voice).with_suffix("").as_posix()) not in named:
            yield Rejected(name, "no transcript: core-sounds has no line for it; add one")


def _asterisk_english(name: str, voice: Path, text: str) -> Row | Rejected:
    if name == "demo-instruct":
        numbers = "28.8, 500, 1234 and 8500 are not read digit by digit"
        return Rejected(name, f"ambiguous numbers: {numbers}; spell them as they are spoken")
    for wrong, right in ASTERISK_TYPOS.items():
        text = text.replace(wrong, right)
    return Row(name, voice / f"{name}.wav", text)


def _asterisk_transcripts(root: Path, voice: Path, language: str) -> Iterator[tuple[str, str]]:
    package = f"asterisk-core-sounds-{language}"
    file = f"core-sounds-{language}.txt.gz"
    places = [root / file, Path("/usr/share/doc", package, file)]
    transcript = next((place for place in places if place.is_file()), None)
    missing = [what for what, there in ((voice, voice.is_dir()), (file, transcript)) if not there]
    if missing:
        raise CorpusError(
            f"{' and '.join(map(str, missing))} not found: apt-get install {package} {package}-wav "
            f"(an image whose dpkg skips /usr/share/doc needs {file} put into {root})"
        )
    with gzip.open(transcript, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                yield name.strip(), text.strip()
