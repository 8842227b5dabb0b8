"""Corpora that webdataset and lhotse packed, packed here by these libraries."""

import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.cli.train import main
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.corpora import load_corpus
from fastguard.speech.data.features import LogMel
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.sampler import Draw
from fastguard.speech.data.specs import absolute

RATE = 16_000


def noise(seed, seconds=1.0, channels=1):
    """(N, channels) float64"""
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * RATE), channels))
    return np.round(wave * 2**15) / 2**15  # what 16 bits hold


def flac(seed):
    file = io.BytesIO()
    soundfile.write(file, noise(seed), RATE, format="FLAC")
    return file.getvalue()


def features(corpus, number):
    return SpeechDataset(corpus.utterances, None, LogMel(RATE))[Draw(number, 1)].features


def features_of(samples):
    return LogMel(RATE)(torch.from_numpy(samples.mean(axis=1).astype(np.float32)))


# --- webdataset -----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder with two shards of train and one of dev."""
    import webdataset

    folder = tmp_path / "shards"
    folder.mkdir()
    samples = {
        "train-000": [
            {"__key__": "s0", "flac": flac(0), "txt": "zero"},
            {"__key__": "a/s1", "flac": flac(1), "json": {"sentence": "one", "split": "training"}},
            {"__key__": "mute", "txt": "no sound"},
            {"__key__": "two", "flac": flac(2), "wav": flac(2), "txt": "both"},
            {"__key__": "wordless", "flac": flac(3), "json": {"label": "x"}},
            {"__key__": "latin", "flac": flac(4), "txt": "café".encode("latin-1")},
            {"__key__": "other", "flac": flac(5), "json": {"text": "five", "split": "test"}},
        ],
        "train-001": [{"__key__": "s0", "flac": flac(6), "transcript": b"six"}],
        "dev_000": [{"__key__": "../../evil", "flac": flac(7), "txt": "seven"}],
    }
    for name, rows in samples.items():
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for row in rows:
                writer.write(row)
    return folder


def test_samples_of_webdataset(shards, tmp_path):
    cache = tmp_path / "cache"
    corpus = load_corpus(f"webdataset:{shards}", cache_dir=cache, needed=("train", "dev"))
    assert {(row.id, row.text, row.split) for row in corpus.utterances} == {
        ("train-000/s0", "zero", "train"),
        ("train-000/a/s1", "one", "train"),
        ("train-001/s0", "six", "train"),
        ("dev_000/../../evil", "seven", "dev"),
    }
    order = [row.id for row in corpus.utterances]
    for id, seed in (("train-000/s0", 0), ("dev_000/../../evil", 7)):
        assert torch.equal(features(corpus, order.index(id)), features_of(noise(seed)))
    assert all(cache / "unpacked" in row.audio.parents for row in corpus.utterances)
    assert not list(tmp_path.rglob("*evil*"))
    reasons = {row.id.removeprefix("train-000/"): row.reason for row in corpus.rejected}
    assert reasons.keys() == {"mute", "two", "wordless", "latin", "other"}
    assert "0 recordings among txt" in reasons["mute"]
    assert "2 recordings among flac, " in reasons["two"]
    assert "no key 'text' among 'label': rename 'label' to 'text'" in reasons["wordless"]
    assert "utf-8" in reasons["latin"]
    assert reasons["other"].startswith("two splits: 'test' in the train of the corpus")


def test_shards_are_unpacked_once_and_again_when_they_change(shards, tmp_path):
    cache, spec = tmp_path / "cache", f"webdataset:{shards}/train-*.tar"

    def unpacked():
        load_corpus(spec, cache_dir=cache)
        return {path.name: path.stat().st_ino for path in (cache / "unpacked").iterdir()}

    first = unpacked()
    assert (len(first), unpacked()) == (2, first)
    os.utime(shards / "train-001.tar", (1, 1))
    assert len(unpacked().keys() - first.keys()) == 1
    assert not [path for path in (cache / "unpacked").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "place, ids",
    [
        ("{}/train-{{000..001}}.tar", ["train-000/s0", "train-000/a/s1", "train-001/s0"]),
        ("dev={0}/train-001.tar,train={0}/dev_*.tar", ["train-001/s0", "dev_000/../../evil"]),
    ],
)
def test_patterns_of_shards(shards, tmp_path, place, ids):
    spec = f"webdataset:{place.format(shards)}"
    corpus = load_corpus(absolute(spec), cache_dir=tmp_path, needed=("train", "dev"))
    assert [row.id for row in corpus.utterances] == ids
    if "dev=" in place:
        assert [row.split for row in corpus.utterances] == ["dev", "train"]


def test_shards_that_are_not_there(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (shards / "torn.tar").write_bytes((shards / "train-000.tar").read_bytes()[:3_000])
    for place, message in {
        "gone-{000..009}.tar": r"gone-000\.tar does not exist: give webdataset:FILE\.tar",
        "pipe:touch harm": "does not exist: give",
        str(tmp_path / "bin"): "does not exist: give",
        str(shards / "torn.tar"): r"torn\.tar cannot be read by webdataset: .*; copy it again",
    }.items():
        with pytest.raises(CorpusError, match=message):
            load_corpus(f"webdataset:{place}", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "harm").exists()


def test_a_cache_that_cannot_be_written(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"\.tar cannot be unpacked to .*set XDG_CACHE_HOME"):
        load_corpus(f"webdataset:{shards}", cache_dir=tmp_path / "file")


@pytest.mark.parametrize("name", ["webdataset", "lhotse"])
def test_without_the_package_the_cure_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CorpusError, match=rf"pip install 'torch-fastguard\[{name}\]'"):
        load_corpus(f"{name}:anything")


# --- lhotse ---------------------------------------------------------------------------------------


@pytest.fixture
def cuts(tmp_path):
    """Four recordings of 3 s with two supervisions each; the last has two channels."""
    from lhotse import CutSet, Recording, SupervisionSegment

    found = []
    for i in range(4):
        soundfile.write(tmp_path / f"r{i}.wav", noise(i, 3.0, 1 + (i == 3)), RATE)
        recording = Recording.from_file(tmp_path / f"r{i}.wav")
        cut = recording.to_cut()
        cut.supervisions = [
            SupervisionSegment(f"{i}a", recording.id, 0.5, 1.0, channel=0, text="hello there"),
            SupervisionSegment(f"{i}b", recording.id, 1.5, 1.25, channel=int(i == 3), text="bye"),
        ]
        found.append(cut)
    return CutSet.from_cuts(found)


def check_rows(corpus):
    """The rows of ``cuts``, whatever they were read from."""
    order = [row.id for row in corpus.utterances]
    assert sorted(order) == [f"{i}{side}" for i in range(4) for side in "ab"]
    for id, text, samples in (
        ("0a", "hello there", noise(0, 3.0)[RATE // 2 : 3 * RATE // 2]),
        ("2b", "bye", noise(2, 3.0)[3 * RATE // 2 : 11 * RATE // 4]),
        ("3a", "hello there", noise(3, 3.0, 2)[RATE // 2 : 3 * RATE // 2, :1]),
        ("3b", "bye", noise(3, 3.0, 2)[3 * RATE // 2 : 11 * RATE // 4, 1:]),
    ):
        number = order.index(id)
        assert corpus.utterances[number].text == text
        assert corpus.utterances[number].duration == len(samples) / RATE
        assert torch.equal(features(corpus, number), features_of(samples)), id


def test_cuts_that_refer_to_files(cuts, tmp_path):
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    corpus = load_corpus(f"lhotse:{tmp_path / 'cuts.jsonl.gz'}", cache_dir=tmp_path / "cache")
    check_rows(corpus)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("trimmed", [False, True])
def test_cuts_in_shards(cuts, tmp_path, trimmed):
    for split, part in (("train", cuts.subset(first=2)), ("dev", cuts.subset(last=2))):
        (tmp_path / "shar" / split).mkdir(parents=True)
        part = part.trim_to_supervisions(keep_overlapping=False) if trimmed else part
        part.to_shar(tmp_path / "shar" / split, fields={"recording": "flac"}, shard_size=1)
    for path in tmp_path.glob("*.wav"):
        path.unlink()
    spec = absolute(f"lhotse:{tmp_path / 'shar'}")
    corpus = load_corpus(spec, cache_dir=tmp_path / "cache", needed=("train", "dev"))
    check_rows(corpus)
    assert {row.id for row in corpus.split("dev")} == {"2a", "2b", "3a", "3b"}
    train = tmp_path / "shar" / "train"
    assert len(load_corpus(f"lhotse:test={train}", needed=("test",)).split("test")) == 4


def test_cuts_that_are_not_plain_recordings(cuts, tmp_path):
    plain, *others = cuts
    rows = [plain.to_dict() for _ in range(5)]
    for number, row in enumerate(rows):
        row["id"] = f"cut{number}"
        for supervision in row["supervisions"]:
            supervision["id"] = f"{number}{supervision['id'][1:]}"
    rows[1]["recording"]["sources"][0] |= {"type": "command", "source": f"touch {tmp_path}/harm"}
    rows[2]["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
    rows[3]["supervisions"] = []
    del rows[4]["supervisions"][0]["text"]
    mixed = others[0].mix(others[1]).to_dict()
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, mixed])
    (tmp_path / "cuts.jsonl").write_text(lines)
    corpus = load_corpus(f"lhotse:{tmp_path / 'cuts.jsonl'}")
    assert [row.id for row in corpus.utterances] == ["0a", "0b", "4b"]
    assert [row.kind for row in corpus.rejected] == [
        "recording elsewhere",
        "recording elsewhere",
        "no plain recording",
        "no supervision",
        "unusable supervision",
        "no plain recording",
    ]
    assert not (tmp_path / "harm").exists()


def test_cuts_that_are_not_there(cuts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=4)
    tar = tmp_path / "shar" / "recording.000000.tar"
    (tmp_path / "bad.jsonl").write_text('{"type": "MonoCut"}\n')
    (tmp_path / "worse.jsonl").write_text("{\n")
    places = {
        "gone.jsonl.gz": r"gone\.jsonl\.gz does not exist: give lhotse:cuts",
        "empty": r"has no cuts\.\*\.jsonl\.gz",
        "bad.jsonl": r"bad\.jsonl cannot be read by lhotse: ",
        "worse.jsonl": r"worse\.jsonl cannot be read by lhotse: ",
    }
    for place, message in places.items():
        with pytest.raises(CorpusError, match=message):
            load_corpus(f"lhotse:{tmp_path / place}", cache_dir=tmp_path / "cache")
    with tarfile.open(tar) as whole:
        assert len(whole.getnames()) == 8
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorpusError, match=r"recording\.000000\.tar cannot be read by lhotse"):
        load_corpus(f"lhotse:{tmp_path / 'shar'}", cache_dir=tmp_path / "cache")
    tar.unlink()
    with pytest.raises(CorpusError, match=r"needs one recording\.000000\.tar, and has 0"):
        load_corpus(f"lhotse:{tmp_path / 'shar'}", cache_dir=tmp_path / "cache")


def test_a_run_trains_on_shards(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = "--model baseline --max-steps 1 --batch-size 2 --run-dir"
    assert main([*command.split(), str(tmp_path / "run"), "--data", f"webdataset:{shards}"]) == 0
    left_out = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert len(left_out) == 5
    assert (tmp_path / "cache" / "fastguard" / "unpacked").is_dir()
