"""Manifests as people have them: of NeMo, Common Voice, DeepSpeech and Hugging Face."""

import gzip
import json

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.cli.train import main
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.corpora import load_corpus
from fastguard.speech.data.features import LogMel
from fastguard.speech.data.manifests import read_manifest
from fastguard.speech.data.part import Part
from fastguard.speech.data.readers import CorpusError, Rejected, Row
from fastguard.speech.data.sampler import Draw
from fastguard.speech.data.specs import absolute

RATE = 16_000
HI = {"audio_filepath": "a.wav", "text": "hi"}


def manifest(folder, *lines):
    path = folder / "corpus.jsonl"
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return list(read_manifest(path))


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- lines of JSON --------------------------------------------------------------------------------


def test_manifest_paths_are_relative_to_its_folder(tmp_path):
    rows = manifest(
        tmp_path,
        {"audio_filepath": "a/b.wav", "text": "Hi", "duration": 1.5, "speaker": 7},
        b"",
        {"audio_filepath": "/data/c.flac", "text": "There", "split": "dev"},
    )
    assert rows == [
        Row("a/b.wav", tmp_path / "a" / "b.wav", "Hi", None, 1.5),
        Row("/data/c.flac", tmp_path.root / rows[1].audio, "There", "dev"),
    ]
    assert rows[1].audio.as_posix() == "/data/c.flac"


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{not json", "malformed line: JSONDecodeError"),
        (b'"\xff"', "malformed line: not UTF-8"),
        (b'["a.wav", "hello"]', "malformed line: TypeError"),
        (
            b'{"audio_filepath": "a.wav"}',
            "malformed line: ValueError: no key 'text' among 'audio_filepath': add 'text'",
        ),
        (
            b'{"path": "a.wav", "label": "hi"}',
            "malformed line: ValueError: no key 'text' among 'path', 'label': rename 'label' to "
            "'text'",
        ),
        (
            b'{"audio_filepath": 3, "text": "hello"}',
            "malformed line: TypeError: audio_filepath is 3",
        ),
        (
            b'{"audio": {"path": null, "bytes": "AAAA"}, "text": "hello"}',
            "malformed line: TypeError: audio_filepath is None",
        ),
    ],
)
def test_manifest_names_the_line_it_can_not_read(tmp_path, line, reason):
    rows = manifest(tmp_path, HI, line)
    assert rows[0].id == "a.wav"
    assert rows[1].id == "line 2"
    assert rows[1].reason.startswith(reason)
    cure = 'write {"audio_filepath": "a.wav", "text": "hello"}'
    assert rows[1].reason.endswith(("iconv -t utf-8", cure))


@pytest.mark.parametrize(
    "extra, split, duration, part",
    [
        ({"offset": 0, "duration": "2.99"}, None, 2.99, Part(0.0, 2.99)),
        ({"offset": 0.0, "split": "validation"}, "dev", None, Part()),
        ({"offset": None, "duration": None, "split": None, "channel": None}, None, None, Part()),
        ({"offset": "0", "split": "Valid", "duration": 3}, "dev", 3.0, Part(0.0, 3.0)),
        ({"split": "training", "channel": "right"}, "train", None, Part(channel=1)),
        ({"split": "eval", "channel": "0"}, "dev", None, Part(channel=0)),
        ({"split": "", "channel": 7, "duration": 2}, None, 2.0, Part(channel=7)),
    ],
)
def test_a_manifest_of_other_toolkits_is_understood(tmp_path, extra, split, duration, part):
    (row,) = manifest(tmp_path, HI | extra)
    assert row == Row("a.wav", tmp_path / "a.wav", "hi", split, duration, part)


@pytest.mark.parametrize(
    "keys",
    [
        {"audio": "a.wav", "sentence": "hi"},
        {"audio": {"path": "a.wav", "bytes": None}, "transcription": "hi"},
        {"file_name": "a.wav", "transcript": "hi"},
        {"path": "a.wav", "text": "hi", "label": "no text"},
        {"file": "a.wav", "audio_filepath": None, "normalized_text": "hi", "text": None},
    ],
)
def test_keys_of_other_toolkits(tmp_path, keys):
    assert manifest(tmp_path, keys) == [Row("a.wav", tmp_path / "a.wav", "hi")]


@pytest.mark.parametrize("offset", ["late", -1, 1e300, True, [1]])
def test_an_offset_that_is_none(tmp_path, offset):
    (row,) = manifest(tmp_path, HI | {"offset": offset})
    assert f"offset is {offset!r:.60}, which is not a number of seconds" in row.reason


@pytest.mark.parametrize("channel", ["both", -1, 1.5, [0, 1], True, "99999"])
def test_a_channel_that_is_none(tmp_path, channel):
    (row,) = manifest(tmp_path, HI | {"channel": channel})
    assert f"channel is {channel!r}: give left, right, or a number from 0" in row.reason


def test_segments_have_ids_of_their_own(tmp_path):
    rows = manifest(
        tmp_path,
        HI | {"offset": 0, "duration": 2},
        HI | {"offset": 2.5, "duration": "1.25"},
        HI | {"offset": 4},
        HI | {"offset": 5, "duration": 0},
        HI | {"start": 1.5, "end": 2.5},
        HI | {"start": 0, "begin": "word", "start_time": None},
    )
    assert [row.id for row in rows[:3]] == ["a.wav", "a.wav#2.500-3.750", "a.wav#4.000-"]
    assert [row.part for row in rows[:3]] == [Part(0.0, 2.0), Part(2.5, 1.25), Part(4.0)]
    assert [row.duration for row in rows[:3]] == [2.0, 1.25, None]
    assert rows[3] == Rejected("a.wav", "segment: offset is 5 and duration 0; correct the duration")
    assert rows[4] == Rejected("a.wav", "segment: start is 1.5; rename it to offset, in seconds")
    assert rows[5].part == Part()


@pytest.mark.parametrize("check", ["decode", "header"])
def test_a_segment_has_its_own_features(tmp_path, check):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (4 * RATE, 2))
    soundfile.write(tmp_path / "a.wav", noise, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", noise[RATE : 3 * RATE, 1], RATE, subtype="FLOAT")
    segment = {"offset": 1.0, "duration": 2.0, "channel": 1, "split": "train"}
    beyond = HI | {"offset": 3.5, "duration": 2, "split": "train"}
    lines = [HI | segment, HI | {"audio_filepath": "b.wav", "split": "train"}, beyond]
    written(tmp_path / "m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    corpus = load_corpus(f"manifest:{tmp_path / 'm.jsonl'}", check=check)
    dataset = SpeechDataset(corpus.utterances, None, LogMel(RATE))
    first, second, *third = (dataset[Draw(i, 1)] for i in range(len(dataset)))
    assert corpus.utterances.durations[:2].tolist() == [2.0, 2.0]
    assert torch.equal(first.features, second.features)
    found = [*corpus.rejected, *third]  # found at once, or when it is loaded
    assert [row.kind for row in found] == ["segment beyond the end"]


@pytest.mark.parametrize(
    "name, line, cure",
    [
        ("a.jsonl", "a.wav|hello there|Hello there.", "rename it, and give it a header"),
        ("a.txt", "path\tsentence", "rename it, and give it a header"),
        ("a.json", "[", r"jq -c '\.\[\]' "),
        ("a.csv", "a.wav,hello there", r"has no column 'audio_filepath', nor audio, "),
        ("a.csv", "path,label", "has no column 'text', nor sentence, .*: rename 'label' to 'text'"),
        ("a.tsv", "path\ttext\ttext", "has a column twice"),
        ("a.csv", "path,\rtext", r"line 1: 'path,\\rtext' is no header of a table"),
        ("a.tsv", "\x00\x00", "utf-16"),
    ],
)
def test_a_manifest_that_is_of_another_kind(tmp_path, name, line, cure):
    written(tmp_path / name, f"{line}\nmore\n")
    with pytest.raises(CorpusError, match=rf"{name}.*{cure}"):
        list(read_manifest(tmp_path / name))


# --- tables ---------------------------------------------------------------------------------------


def test_common_voice(tmp_path):
    header = "client_id\tpath\tsentence\tup_votes\tage"
    written(
        tmp_path / "train.tsv", f'{header}\nx\t1.mp3\t"Hi," he said.\t2\t\ny\t2.mp3\tYou\t2\t9\n'
    )
    written(tmp_path / "dev.tsv", f"{header}\nx\t3.mp3\tThere\t2\t\nx\t4.mp3\n")
    written(tmp_path / "validated.tsv", f"{header}\nx\t5.mp3\tMore\t2\t\n")
    (tmp_path / "clips").mkdir()
    clips = tmp_path / "clips"
    rows = sorted(read_manifest(tmp_path), key=lambda row: row.id)
    assert rows == [
        Row("1.mp3", clips / "1.mp3", '"Hi," he said.', "train"),
        Row("2.mp3", clips / "2.mp3", "You", "train"),
        Row("3.mp3", clips / "3.mp3", "There", "dev"),
        Rejected(
            "dev.tsv, line 3",
            "malformed line: ValueError: 2 columns, and the header has 5; write a recording per "
            "line, with the header's columns",
        ),
    ]


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_a_csv(tmp_path, separator):
    lines = [
        ["wav_filename", "Transcript", "split", "offset", "duration"],
        ["a.wav", f'"one{separator} ""two"""', "valid", "1.5", "2"],
        ["sub/b.wav", "three", "", "", ""],
        ["c.wav", '"open', "", "", ""],
        ["d.wav", "four", "", "late", ""],
    ]
    path = written(tmp_path / "m.csv", "".join(separator.join(line) + "\r\n" for line in lines))
    first, second, third, fourth = read_manifest(path)
    assert first == Row(
        "a.wav#1.500-3.500", tmp_path / "a.wav", f'one{separator} "two"', "dev", 2.0, Part(1.5, 2.0)
    )
    assert second == Row("sub/b.wav", tmp_path / "sub" / "b.wav", "three")
    assert third.id == "line 4"
    assert "unexpected end of data" in third.reason
    assert "offset is 'late', which is not a number of seconds" in fourth.reason


def test_a_compressed_table_with_a_byte_order_mark(tmp_path):
    with gzip.open(tmp_path / "m.CSV.gz", "wt", encoding="utf-8-sig") as file:
        file.write("file_name,transcription\na.wav,hi\n")
    assert list(read_manifest(tmp_path / "m.CSV.gz")) == [Row("a.wav", tmp_path / "a.wav", "hi")]


# --- a manifest for each split --------------------------------------------------------------------


def line(name, text="hi", **more):
    return json.dumps({"audio_filepath": name, "text": text} | more) + "\n"


def test_a_manifest_for_each_split(tmp_path):
    written(tmp_path / "a" / "some.jsonl", line("x.wav") + line("y.wav", split="test"))
    written(tmp_path / "b" / "more.jsonl", line("x.wav") + line("/z.wav", split="eval") + "{")
    place = f"train={tmp_path}/a/some.jsonl,validation={tmp_path}/b/more.jsonl"
    rows = list(read_manifest(place))
    assert rows[0] == Row("a/x.wav", tmp_path / "a" / "x.wav", "hi", "train")
    assert rows[1] == Rejected(
        "a/y.wav", "two splits: 'test' in the train of the corpus; correct one of them"
    )
    assert rows[2] == Row("b/x.wav", tmp_path / "b" / "x.wav", "hi", "dev")
    assert (rows[3].id, rows[3].split) == ("/z.wav", "dev")
    assert rows[4].id == "b/more.jsonl, line 3"


def test_a_recording_in_two_splits_is_noticed(tmp_path, record):
    record(tmp_path / "x.wav")
    written(tmp_path / "train.jsonl", line("x.wav"))
    written(tmp_path / "test.jsonl", line("x.wav"))
    corpus = load_corpus(f"manifest:{tmp_path}", needed=("train", "test"))
    assert [row.kind for row in corpus.rejected] == ["duplicate id"]


def test_the_folder_of_a_data_set_of_hugging_face(tmp_path):
    for split in ("train", "validation"):
        written(tmp_path / split / "metadata.csv", f"file_name,transcription\n{split}.wav,hi\n")
    assert list(read_manifest(tmp_path)) == [
        Row("train/train.wav", tmp_path / "train" / "train.wav", "hi", "train"),
        Row("validation/validation.wav", tmp_path / "validation/validation.wav", "hi", "dev"),
    ]
    written(tmp_path / "one" / "metadata.jsonl", '{"file_name": "a.wav", "text": "hi"}')
    assert list(read_manifest(tmp_path / "one")) == [Row("a.wav", tmp_path / "one/a.wav", "hi")]


@pytest.mark.parametrize(
    "names, place, cure",
    [
        ([], "", "has no manifest: name its files train, dev and test"),
        (["train.csv", "train.jsonl"], "", "more than one manifest of a split: train.csv, train.j"),
        (["dev.csv", "valid.csv"], "", "more than one manifest of a split: dev.csv, valid.csv"),
        ([], "train={},dev=x", "is a folder: give train=FILE"),
        ([], "{}/x.jsonl", r"x\.jsonl does not exist: give manifest:FILE, a folder, or "),
        ([], "dev={}/x.jsonl", r"x\.jsonl does not exist"),
    ],
)
def test_no_manifest(tmp_path, names, place, cure):
    for name in names:
        written(tmp_path / name, "path,text\n")
    with pytest.raises(CorpusError, match=cure):
        list(read_manifest(place.format(tmp_path) or tmp_path))


def test_a_spec_means_the_same_in_every_folder(tmp_path, monkeypatch, record):
    monkeypatch.chdir(tmp_path)
    specs = [absolute(f"manifest:{place}") for place in ("a.jsonl", "train=a.jsonl,dev=b/c=d.tsv")]
    assert specs == [
        f"manifest:{tmp_path}/a.jsonl",
        f"manifest:train={tmp_path}/a.jsonl,dev={tmp_path}/b/c=d.tsv",
    ]
    record(tmp_path / "x.wav")
    written(tmp_path / "a.jsonl", line("x.wav"))
    written(tmp_path / "b" / "c=d.tsv", "path\ttext\n../x.wav\tho\n")
    monkeypatch.chdir("/")
    corpus = load_corpus(specs[1], needed=("train", "dev"))
    assert [len(corpus.split(split)) for split in ("train", "dev")] == [1, 1], corpus.summary()


def test_a_run_with_separate_manifests(tmp_path, monkeypatch, capsys):
    """Segments of one long recording, with relative paths, from another folder."""
    moments = np.arange(8 * RATE) / RATE
    soundfile.write(tmp_path / "long.wav", 0.1 * np.sin(2 * np.pi * 300 * moments), RATE)
    texts = ["ab", "ba", "abba", "bab", "aab", "bba", "abab", "baba"]
    lines = [line("../long.wav", t, offset=i, duration=1) for i, t in enumerate(texts)]
    written(tmp_path / "lists" / "train.jsonl", "".join(lines[:6]))
    written(tmp_path / "lists" / "dev.jsonl", "".join(lines[6:]))
    monkeypatch.chdir(tmp_path / "lists")
    command = "--model baseline --max-steps 2 --batch-size 2 --run-dir ../run --data"
    assert main([*command.split(), "manifest:train=train.jsonl,dev=dev.jsonl"]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"train={tmp_path}/lists/train.jsonl,dev={tmp_path}/lists/dev.jsonl" in config
    epochs = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(x["kind"] == "epoch" for x in epochs)
    assert (tmp_path / "run" / "left_out.jsonl").read_text() == ""
