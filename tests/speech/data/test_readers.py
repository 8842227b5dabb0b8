import gzip
from collections import Counter
from itertools import pairwise

import pytest

from fastguard.speech.data.corpora import SPLITS, load_corpus
from fastguard.speech.data.readers import (
    ASTERISK_SOUNDS,
    ASTERISK_VOICES,
    CorpusError,
    Row,
    read_asterisk,
    read_librispeech,
    read_yesno,
)

ALLISON = ASTERISK_SOUNDS / ASTERISK_VOICES["en"]
needs_asterisk = pytest.mark.skipif(
    not ALLISON.is_dir(),
    reason="asterisk packages are absent: "
    "apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav",
)


def prompts(folder, language, transcripts, recorded=()):
    """An Asterisk tree; no reader opens the recordings, so they stay empty."""
    with gzip.open(folder / f"core-sounds-{language}.txt.gz", "wt", encoding="utf-8") as file:
        file.write(transcripts)
    voice = folder / ASTERISK_VOICES[language]
    voice.mkdir()
    for name in recorded:
        (voice / name).parent.mkdir(exist_ok=True)
        (voice / name).touch()
    return list(read_asterisk(folder, language)), voice


def test_librispeech_takes_the_split_from_the_subset(tmp_path):
    for subset, speaker in [("train-clean-100", "19"), ("dev-other", "84")]:
        chapter = tmp_path / subset / speaker / "7"
        chapter.mkdir(parents=True)
        lines = f"{speaker}-7-0000 CHAPTER ONE\n{speaker}-7-0001 IT'S LATE\n"
        (chapter / f"{speaker}-7.trans.txt").write_text(lines)
    dev = tmp_path / "dev-other" / "84" / "7"
    assert list(read_librispeech(tmp_path))[:2] == [
        Row("84-7-0000", dev / "84-7-0000.flac", "CHAPTER ONE", "dev"),
        Row("84-7-0001", dev / "84-7-0001.flac", "IT'S LATE", "dev"),
    ]
    assert [row.split for row in read_librispeech(tmp_path)] == ["dev", "dev", "train", "train"]


def test_yesno_reads_the_file_name(tmp_path):
    for name in ("1_0_0.wav", "0_1_1.wav", "README.wav"):
        (tmp_path / name).touch()
    assert [(row.id, row.text) for row in read_yesno(tmp_path)] == [
        ("0_1_1", "no yes yes"),
        ("1_0_0", "yes no no"),
    ]


def test_asterisk_pairs_transcripts_and_recordings(tmp_path):
    rows, voice = prompts(
        tmp_path,
        "en",
        "; a comment: not a prompt\n\ndigits/1: one\nvm-x:  Press 5: now\nempty:\n",
        ["digits/1.wav", "vm-x.wav", "spare.wav"],
    )
    assert rows[:3] == [
        Row("digits/1", voice / "digits" / "1.wav", "one"),
        Row("vm-x", voice / "vm-x.wav", "Press  five : now"),
        Row("empty", voice / "empty.wav", ""),
    ]
    assert [(row.id, row.kind) for row in rows[3:]] == [("spare", "no transcript")]


def test_asterisk_english_is_respelt(tmp_path):
    text = "to umute, visit www.asterisk.org"
    rows, _ = prompts(
        tmp_path, "en", f"a: {text}\nb: exclaimation-point [!]\ndemo-instruct: dial 500\n"
    )
    assert rows[0].text == "to unmute, visit w w w dot asterisk dot org"
    assert rows[1].text == "exclamation-point [!]"
    assert rows[2].kind == "ambiguous numbers"


def test_asterisk_reads_numbers_in_english_only(tmp_path):
    rows, _ = prompts(tmp_path, "es", "a: marque 1\nb: ¿Qué tal?\nc: adiós (3 veces)\n")
    assert [getattr(row, "kind", "kept") for row in rows] == ["digits in the text", "kept", "kept"]
    assert "'marque 1' out in 'es'" in rows[0].reason


def test_asterisk_transcripts_may_start_with_a_byte_order_mark(tmp_path):
    rows, _ = prompts(tmp_path, "it", "\ufeff; Italian: prompts\na: ciao\n")
    assert [row.id for row in rows] == ["a"]


@pytest.mark.parametrize(
    "read, cure",
    [
        (read_librispeech, "the folder that holds train-clean-100"),
        (read_yesno, "the waves_yesno folder"),
        (
            lambda place: read_asterisk(place, "fr"),
            "apt-get install asterisk-core-sounds-fr asterisk-core-sounds-fr-wav",
        ),
        (lambda place: read_asterisk(place, "xx"), "choose one of en, es, fr, it, ru"),
    ],
)
def test_a_corpus_that_is_not_there(tmp_path, read, cure):
    with pytest.raises(CorpusError, match=cure):
        list(read(tmp_path))


@needs_asterisk
def test_asterisk_english():
    corpus = load_corpus("asterisk", max_output_length=lambda seconds: int(seconds * 25) + 1)
    kinds = Counter(row.kind for row in corpus.rejected)
    assert kinds == {"no words": 17, "too long": 6, "ambiguous numbers": 1, "no recording": 1}
    assert [len(corpus.split(name)) for name in SPLITS] == [439, 54, 51]
    texts = {name: {u.text for u in corpus.split(name)} for name in SPLITS}
    assert all(not texts[a] & texts[b] for a, b in pairwise([*SPLITS, "train"]))
    assert set().union(*map(set, (u.text for u in corpus.utterances))) == set(
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    minutes = sum(u.duration for u in corpus.utterances) / 60
    assert minutes == pytest.approx(20.5, abs=0.1)


@needs_asterisk
def test_asterisk_at_stride_8_is_half_infeasible():
    corpus = load_corpus("asterisk", max_output_length=lambda seconds: int(seconds * 12.5) + 1)
    assert Counter(row.kind for row in corpus.rejected)["infeasible target"] > 150
