"""Corpora of spoken digits in six voices, one of which is only in the test split.

    apt-get install asterisk-core-sounds-{en,es,fr,it}-wav flite \\
        asterisk-prompt-{es-co,fr-armelle,it-menardi-wav}
    python bench/spoken_digits.py recorded FOLDER [--sounds DIR]
    python bench/spoken_digits.py english FOLDER [--sounds DIR]

An utterance has 1 to 5 digits of one voice, drawn with a fixed seed. FOLDER gets a WAV file for
each (16 bits, 8 or 16 kHz) and digits.jsonl, a manifest with the splits:

    train   80 utterances of each of five voices
    dev      8 utterances of each of five voices
    test   100 utterances of the sixth voice

"recorded" has two speakers each of Spanish, French and Italian, and holds out it_IT_f_Menardi.
"english" has one speaker (Allison), four voices of flite, which are made of recordings of as many
speakers, and eSpeak NG's; it holds out flite's slt. Recordings have one digit each, and are joined
with pauses of 0 to 0.2 seconds.
"""

import argparse
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from fastguard.speech.data.synthetic import SAMPLE_RATE, _find_espeak, _speak

WORDS = {
    "en": "zero one two three four five six seven eight nine",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove",  # codespell:ignore tre
}
RECORDED = {  # folder: language
    "es": "es",
    "es_MX_f_Allison": "es",
    "fr": "fr",
    "fr_CA_f_June": "fr",
    "it_IT_f_Menardi": "it",
    "it_IT_m_Carlo": "it",
}
ENGLISH = ("allison", "awb", "espeak", "kal", "rms", "slt")
HELD_OUT = ("it_IT_f_Menardi", "slt")
COUNTS = {"train": 80, "dev": 8}  # utterances of a voice
TEST = 100
MOST_DIGITS = 5
RATE = 8000  # Hz, of the recordings
LONGEST_PAUSE = 0.2  # seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=["recorded", "english"])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the corpus")
    parser.add_argument("--sounds", type=Path, default=Path("/usr/share/asterisk/sounds"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make = {"recorded": recorded, "english": english}[args.corpus]
    rows = list(make(args.folder, args.sounds, random.Random(0)))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.folder / "digits.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} utterances in {args.folder / 'digits.jsonl'}")


def recorded(folder: Path, sounds: Path, draw: random.Random) -> Iterator[dict]:
    """Write the utterances of recorded voices; yield the rows of the manifest."""
    for voice, language in RECORDED.items():
        digits = [recording(sounds / voice / "digits", digit) for digit in range(10)]
        for row, spoken in utterances(voice, language, draw):
            samples = joined(digits, spoken, draw)
            soundfile.write(folder / row["audio_filepath"], samples, RATE, "PCM_16")
            yield row


def english(folder: Path, sounds: Path, draw: random.Random) -> Iterator[dict]:
    """Write the utterances of English voices; yield the rows of the manifest."""
    for voice in ENGLISH:
        drawn = list(utterances(voice, "en", draw))
        rows = [row for row, _ in drawn]
        paths = [folder / row["audio_filepath"] for row in rows]
        if voice == "allison":
            digits = [recording(sounds / "en" / "digits", digit) for digit in range(10)]
            for path, (_, spoken) in zip(paths, drawn, strict=True):
                soundfile.write(path, joined(digits, spoken, draw), RATE, "PCM_16")
        elif voice == "espeak":
            library, data, *_ = _find_espeak()
            style = {"voice": "en-us", "rate": 160, "pitch": 50}
            requests = [{"text": row["text"], **style} for row in rows]
            listing = folder / "requests.jsonl"
            spoken = _speak(requests, listing, library, data)
            for path, samples in zip(paths, spoken, strict=True):
                soundfile.write(path, samples, SAMPLE_RATE, "PCM_16")
            listing.unlink()
        else:
            for path, row in zip(paths, rows, strict=True):
                command = ["flite", "-voice", voice, "-t", row["text"], "-o", path]
                subprocess.run(command, check=True)
        yield from rows


def utterances(voice: str, language: str, draw: random.Random) -> Iterator[tuple[dict, list[int]]]:
    """Rows of the manifest, and the digits of each."""
    words = WORDS[language].split()
    for split, count in ({"test": TEST} if voice in HELD_OUT else COUNTS).items():
        for number in range(count):
            spoken = draw.choices(range(10), k=draw.randint(1, MOST_DIGITS))
            name = f"{voice}-{split}-{number:03d}.wav"
            text = " ".join(words[digit] for digit in spoken)
            row = {"audio_filepath": name, "text": text, "split": split, "speaker": voice}
            yield row, spoken


def recording(folder: Path, digit: int) -> np.ndarray:
    """Samples of one digit: float64 [n]. A .gsm file has no header."""
    path = folder / f"{digit}.wav"
    if path.exists():
        samples, rate = soundfile.read(path)
        if rate != RATE:
            raise SystemExit(f"{path} has {rate} Hz, not {RATE}: use the package named above")
        return samples
    raw = {"format": "RAW", "subtype": "GSM610", "samplerate": RATE, "channels": 1}
    return soundfile.read(path.with_suffix(".gsm"), **raw)[0]


def joined(digits: list[np.ndarray], spoken: list[int], draw: random.Random) -> np.ndarray:
    """The recordings of ``spoken``, with a drawn pause after each."""
    pieces = []
    for digit in spoken:
        pieces += [digits[digit], np.zeros(int(draw.uniform(0, LONGEST_PAUSE) * RATE))]
    return np.concatenate(pieces)


if __name__ == "__main__":
    main()
