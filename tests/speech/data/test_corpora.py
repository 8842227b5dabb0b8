import io
import json
import re
from collections import Counter

import numpy as np
import pytest
import soundfile

from fastguard.speech.data import corpora, synthetic
from fastguard.speech.data.corpora import SPLITS, CorpusError, assign_splits, load_corpus
from fastguard.speech.data.specs import absolute
from fastguard.speech.data.text import TextRules


def plenty(seconds):
    return 10_000


def stride_4(seconds):
    return int(seconds * 25) + 1


def load(spec, **options):
    return load_corpus(spec, **{"max_output_length": plenty} | options)


@pytest.fixture
def manifest(tmp_path, record):
    """manifest(*rows): a manifest of one good recording, "good.wav" of one second, and the rows."""

    def write(*rows):
        good = {"audio_filepath": "good.wav", "text": "all is well", "split": "train"}
        record(tmp_path / "good.wav")
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (good, *rows)))
        return f"manifest:{path}"

    return write


def reasons(corpus):
    return {row.id: row.reason for row in corpus.rejected}


@pytest.mark.parametrize(
    "name, rate, channels",
    [("a.wav", 8_000, 1), ("a.flac", 44_100, 2), ("a.ogg", 16_000, 1), ("a.mp3", 44_100, 1)],
)
def test_a_good_row(manifest, tmp_path, record, name, rate, channels):
    record(tmp_path / name, 1.5, rate, channels)
    corpus = load(manifest({"audio_filepath": name, "text": "Press 1!", "split": "dev"}))
    assert corpus.rejected == []
    (utterance,) = corpus.split("dev")
    assert (utterance.id, utterance.audio, utterance.text) == (name, tmp_path / name, "press 1")
    assert utterance.duration == pytest.approx(1.5, abs=0.1 if name == "a.mp3" else 1e-4)
    assert [utterance.id for utterance in corpus.split("train")] == ["good.wav"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"audio_filepath": "gone.wav"}, r"no recording: '.*gone\.wav' does not exist"),
        ({"audio_filepath": "torn.wav"}, "unreadable audio: .*torn.wav.*convert it"),
        ({"audio_filepath": "torn.raw"}, "unreadable audio: .*convert it"),
        ({"audio_filepath": "nan.wav"}, "samples not finite: 2 of 16000 in '.*nan.wav' are NaN"),
        ({"audio_filepath": "none.wav"}, r"too short: 0\.00 s, under 0\.1 s"),
        ({"audio_filepath": "short.wav"}, r"too short: 0\.05 s, under 0\.1 s"),
        ({"audio_filepath": "long.wav"}, r"too long: 20\.50 s, over 20 s"),
        ({"text": "[beep]"}, r"no words: nothing of '\[beep\]' is spoken"),
        ({"split": "half"}, "unknown split: 'half'; use one of train, dev, test"),
        ({"split": ["dev"]}, r"unknown split: \['dev'\]"),
        ({"audio_filepath": "good.wav"}, "duplicate id: an earlier row has good.wav"),
        ({"text": None}, "malformed line: TypeError: .*text is None"),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(manifest, tmp_path, record, change, reason):
    record(tmp_path / "short.wav", 0.05)
    record(tmp_path / "long.wav", 20.5, rate=8_000)
    record(tmp_path / "fine.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    (tmp_path / "torn.wav").write_bytes(b"RIFF torn off")
    (tmp_path / "torn.raw").write_bytes(b"no header")
    bad = np.zeros(16_000)
    bad[[5, 9]] = np.nan, np.inf
    soundfile.write(tmp_path / "nan.wav", bad, 16_000, subtype="FLOAT")

    row = {"audio_filepath": "fine.wav", "text": "hello", "split": "dev"} | change
    corpus = load(manifest(row))
    assert [utterance.id for utterance in corpus.utterances] == ["good.wav"]
    (rejected,) = corpus.rejected
    assert rejected.id == ("line 2" if row["text"] is None else row["audio_filepath"])
    assert re.match(reason, rejected.reason), rejected.reason


def test_a_rejected_row_does_not_take_the_id(manifest):
    silent = {"audio_filepath": "b.wav", "text": "", "split": "dev"}
    corpus = load(manifest(silent, silent | {"text": "hello"}))
    assert [row.kind for row in corpus.rejected] == ["no words", "no recording"]


def test_limits_of_duration_are_parameters(manifest, tmp_path, record):
    record(tmp_path / "long.wav", 1.25)
    row = {"audio_filepath": "long.wav", "text": "hello", "split": "dev"}
    assert load(manifest(row), max_duration=1.25, min_duration=1.0).rejected == []
    corpus = load(manifest(row), max_duration=1.2)
    assert reasons(corpus)["long.wav"].startswith("too long: 1.25 s, over 1.2 s")


@pytest.mark.parametrize("frames, kept", [(9, True), (8, False)])
def test_a_target_needs_a_frame_for_each_symbol_and_each_repeat(
    manifest, tmp_path, record, frames, kept
):
    record(tmp_path / "a.wav", 0.5)
    spec = manifest({"audio_filepath": "a.wav", "text": "see off", "split": "train"})
    asked = []

    def max_output_length(seconds):
        asked.append(seconds)
        return frames if seconds == 0.5 else 1_000

    corpus = load(spec, max_output_length=max_output_length)
    assert asked == [1.0, 0.5]
    assert ("a.wav" in [u.id for u in corpus.split("train")]) == kept
    if not kept:
        wanted = "infeasible target: needs 9 frames (7 symbols + 2 repeats), has 8"
        assert reasons(corpus)["a.wav"].startswith(wanted)


def test_what_is_only_recognised_needs_no_frames(manifest, tmp_path, record):
    record(tmp_path / "a.wav", 0.5)
    spec = manifest({"audio_filepath": "a.wav", "text": "a b" * 100, "split": "dev"})
    assert len(load(spec, max_output_length=lambda seconds: 50).split("dev")) == 1


def test_a_row_without_a_split_gets_one_by_its_text(manifest, tmp_path, record):
    texts = [f"{a} {b}" for a in "abcdefghij" for b in "klmnopqrst"]
    rows = [{"audio_filepath": f"{i}.wav", "text": text} for i, text in enumerate(texts)]
    for row in rows:
        record(tmp_path / row["audio_filepath"], 0.11)
    corpus = load(manifest(*rows))
    assert [len(corpus.split(name)) for name in SPLITS] == [81, 10, 10]
    expected = assign_splits(texts)
    assert all(u.split == expected[u.text] for u in corpus.utterances if u.id != "good.wav")


def test_a_row_without_a_split_joins_its_sentence(manifest, tmp_path, record):
    record(tmp_path / "a.wav")
    record(tmp_path / "b.wav")
    corpus = load(
        manifest(
            {"audio_filepath": "a.wav", "text": "Hello.", "split": "test"},
            {"audio_filepath": "b.wav", "text": "hello"},
        )
    )
    assert [utterance.id for utterance in corpus.split("test")] == ["a.wav", "b.wav"]


def test_splits_do_not_depend_on_what_the_model_can_align(manifest, tmp_path, record):
    rows = [{"audio_filepath": f"{i}.wav", "text": "a" + i * "b"} for i in range(40)]
    for row in rows:
        record(tmp_path / row["audio_filepath"], 0.11)
    spec = manifest(*rows)
    fine = {u.id: u.split for u in load(spec).utterances}
    coarse = {u.id: u.split for u in load(spec, max_output_length=lambda seconds: 30).utterances}
    assert 10 < len(coarse) < len(fine)
    assert all(fine[id] == split for id, split in coarse.items())


def test_a_corpus_without_a_training_row_says_what_it_left_out(manifest, tmp_path, record):
    record(tmp_path / "long.wav", 2.5)
    spec = manifest({"audio_filepath": "long.wav", "text": "hello", "split": "dev"})
    cause = r"(?s)no usable row in the split train.*dev   1 utt.*good\.wav \(too short: 1\.00"
    with pytest.raises(CorpusError, match=cause):
        load(spec, min_duration=2.0)


def test_summary_counts_and_names(manifest):
    gone = [{"audio_filepath": f"gone{i}.wav", "text": "hi", "split": "dev"} for i in range(5)]
    corpus = load(manifest(*gone, {"audio_filepath": "c.wav", "text": "?"}))
    assert corpus.summary().splitlines()[1:4] == [
        "  train 1 utterances, 0.0 min",
        "  dev   0 utterances, 0.0 min",
        "  test  0 utterances, 0.0 min",
    ]
    first, second = (line for line in corpus.summary().splitlines() if "left out" in line)
    assert first.startswith("  left out 5: gone0.wav, gone1.wav, gone2.wav, ... (no recording: ")
    assert second.startswith("  left out 1: c.wav (no words: nothing of '?' is spoken")


def test_only_three_splits_exist(manifest):
    with pytest.raises(ValueError, match="'valid': choose one of train, dev, test"):
        load(manifest()).split("valid")


@pytest.mark.parametrize(
    "spec",
    ["", "timit", "manifest", "manifest:", "yesno:", "synthetic:x", "asterisks", "asterisk:"],
)
def test_unknown_specs_are_told_the_known_ones(spec):
    with pytest.raises(
        CorpusError, match=r"unknown corpus '.*': choose one of synthetic, asterisk\["
    ):
        load(spec)


def test_changed_texts_are_counted_and_listed(manifest, tmp_path, record):
    record(tmp_path / "a.wav")
    record(tmp_path / "b.wav")
    rows = [
        {"audio_filepath": "a.wav", "text": "Hello (noise)", "split": "dev"},
        {"audio_filepath": "b.wav", "text": "Good bye", "split": "dev"},
        {"audio_filepath": "gone.wav", "text": "[beep]", "split": "dev"},
    ]
    changed, left_out = io.StringIO(), io.StringIO()
    corpus = load(manifest(*rows), changed=changed)
    assert corpus.summary().splitlines()[-2:] == [
        "  texts changed 2, case: a.wav ('Hello (noise)' -> 'hello')",
        "  texts changed 1, brackets: a.wav ('Hello (noise)' -> 'hello')",
    ]
    lines = [json.loads(line) for line in changed.getvalue().splitlines()]
    assert lines[0] == {
        "id": "a.wav",
        "written": "Hello (noise)",
        "text": "hello",
        "changed": ["brackets", "case"],
    }
    assert [line["id"] for line in lines] == ["a.wav", "b.wav"]
    corpus.write_left_out(left_out)
    (line,) = map(json.loads, left_out.getvalue().splitlines())
    assert line == {"id": "gone.wav", "reason": corpus.rejected[0].reason}


def test_rules_of_texts_are_a_setting(manifest, tmp_path, record):
    record(tmp_path / "a.wav")
    spec = manifest({"audio_filepath": "a.wav", "text": "J'ai 3 chats", "split": "dev"})
    french = TextRules(numbers="words", language="fr")
    assert [u.text for u in load(spec, rules=french).split("dev")] == ["j'ai trois chats"]
    corpus = load(spec, rules=TextRules(numbers="reject"))
    assert reasons(corpus)["a.wav"].startswith("number in digits: ")
    with pytest.raises(CorpusError, match="'xx' has no words"):
        load(spec, rules=TextRules(numbers="words", language="xx"))


def test_silent_rows_are_kept_on_demand(manifest, tmp_path, record):
    for name in ("a.wav", "b.wav"):
        record(tmp_path / name)
    rows = [
        {"audio_filepath": "a.wav", "text": "[beep]", "split": "dev"},
        {"audio_filepath": "b.wav", "text": ""},
    ]
    assert {row.kind for row in load(manifest(*rows)).rejected} == {"no words"}
    corpus = load(manifest(*rows), silent=True)
    assert [(u.id, u.text) for u in corpus.split("dev")] == [("a.wav", "")]
    assert reasons(corpus)["b.wav"].endswith("or give it a split")


def test_a_spec_is_made_to_hold_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("manifest:a/b.jsonl") == f"manifest:{tmp_path}/a/b.jsonl"
    assert absolute("asterisk:sounds@fr") == f"asterisk:{tmp_path}/sounds@fr"
    for spec in (
        "synthetic",
        "asterisk",
        "asterisk@fr",
        "librispeech:/data",
        "manifest:",
        "what:x",
    ):
        assert absolute(spec) == spec


@pytest.mark.parametrize(
    "spec, missing", [("asterisk:{}@fr", "fr_CA_f_June"), ("asterisk:{}", "en_US_f_Allison")]
)
def test_asterisk_spec_gives_place_and_language(tmp_path, spec, missing):
    with pytest.raises(CorpusError, match=f"{tmp_path}/{missing}"):
        load(spec.format(tmp_path))


def test_librispeech_tree(tmp_path, record):
    for subset in ("train-clean-5", "dev-clean"):
        chapter = tmp_path / subset / "1" / "2"
        record(chapter / f"{subset}-0.flac")
        (chapter / "1-2.trans.txt").write_text(f"{subset}-0 IT'S HERE\n{subset}-1 NOT HERE\n")
    corpus = load(f"librispeech:{tmp_path}")
    assert {u.id: (u.split, u.text) for u in corpus.utterances} == {
        "dev-clean-0": ("dev", "it's here"),
        "train-clean-5-0": ("train", "it's here"),
    }
    assert reasons(corpus).keys() == {"dev-clean-1", "train-clean-5-1"}


def test_yesno_tree(tmp_path, record):
    for number in range(60):
        record(tmp_path / ("_".join(f"{number:08b}") + ".wav"), 0.2, rate=8_000)
    corpus = load(f"yesno:{tmp_path}")
    assert [len(corpus.split(name)) for name in SPLITS] == [48, 6, 6]
    assert {word for u in corpus.utterances for word in u.text.split()} == {"yes", "no"}


def test_synthetic_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SIZES", {"train": 8, "dev": 2, "test": 2})
    corpus = load("synthetic", max_output_length=stride_4, cache_dir=tmp_path, seed=3)
    assert corpus.rejected == []
    assert Counter(u.split for u in corpus.utterances) == {"train": 8, "dev": 2, "test": 2}
    assert all(tmp_path in utterance.audio.parents for utterance in corpus.utterances)


# --- what is decoded, and what is taken on trust -------------------------------------------------


@pytest.fixture
def trusting(manifest, tmp_path, record):
    """A manifest of which only a decoder sees what is wrong."""
    record(tmp_path / "fine.wav", 1.5)
    soundfile.write(tmp_path / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "torn.wav").write_bytes(b"RIFF torn off")
    rows = [
        {"audio_filepath": "fine.wav", "duration": 2.5},
        {"audio_filepath": "gone.wav", "duration": 1.5},
        {"audio_filepath": "nan.wav"},
        {"audio_filepath": "torn.wav"},
        {"audio_filepath": "long.wav", "duration": 20.5},
    ]
    return manifest(*({"text": "hello", "split": "dev"} | row for row in rows))


def test_headers_and_the_manifest_are_believed_on_demand(trusting):
    corpus = load(trusting, check="header")
    durations = {u.id: u.duration for u in corpus.utterances}
    assert durations == {"good.wav": 1.0, "fine.wav": 2.5, "gone.wav": 1.5, "nan.wav": 1.0}
    kinds = {row.id: row.kind for row in corpus.rejected}
    assert kinds == {"torn.wav": "unreadable audio", "long.wav": "too long"}
    assert "  not decoded: durations are from the manifest" in corpus.summary()


def test_recordings_are_decoded_on_demand(trusting):
    corpus = load(trusting, check="decode")
    assert {u.id: u.duration for u in corpus.utterances} == {"good.wav": 1.0, "fine.wav": 1.5}
    assert "not decoded" not in corpus.summary()


@pytest.mark.parametrize("limit, decoded", [(6, True), (5, False)])
def test_by_itself_a_corpus_is_decoded_up_to_a_size(trusting, monkeypatch, limit, decoded):
    monkeypatch.setattr(corpora, "DECODED_ROWS", limit)
    corpus = load(trusting)
    assert corpus.decoded == decoded
    assert ("nan.wav" in {u.id for u in corpus.utterances}) != decoded


def test_infeasible_texts_are_judged_by_the_tokens_in_use(manifest, tmp_path, record):
    record(tmp_path / "a.wav")
    spec = manifest({"audio_filepath": "a.wav", "text": "hello there", "split": "train"})
    words = {"all": 1, "is": 2, "well": 3, "hello": 4}
    corpus = load(spec, max_output_length=None)
    assert len(corpus.utterances) == 2
    fits = corpus.drop_infeasible(str.split, lambda seconds: 3)
    assert [len(c.utterances) for c in (corpus, fits)] == [2, 2]
    assert len(corpus.drop_infeasible(str, lambda seconds: 13).utterances) == 2

    def encode(text):
        if unknown := set(text.split()) - words.keys():
            raise ValueError(f"no symbol for {unknown}")
        return [words[word] for word in text.split()]

    left = corpus.drop_infeasible(encode, lambda seconds: 3)
    assert [u.id for u in left.utterances] == ["good.wav"]
    assert left.rejected[0].reason == "no tokens: no symbol for {'there'}"
    with pytest.raises(CorpusError, match="no usable row in the split train"):
        corpus.drop_infeasible(encode, lambda seconds: 2)
