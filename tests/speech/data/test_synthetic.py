import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from fastguard.speech.data import espeak, synthetic
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.synthetic import GRAMMAR, SIZES, VOICES, WORDS, build_synthetic

SMALL = {"train": 6, "dev": 2, "test": 2}


def contents(folder):
    """Name and digest of every file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def rows(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The corpus that users get."""
    return build_synthetic(tmp_path_factory.mktemp("cache"), seed=0)


@pytest.fixture
def small(tmp_path):
    return build_synthetic(tmp_path / "cache", seed=1, sizes=SMALL)


def test_sizes_and_sentences(whole):
    corpus = rows(whole)
    assert {split: [row["split"] for row in corpus].count(split) for split in SIZES} == SIZES
    assert len({row["text"] for row in corpus}) == len(corpus)
    assert all(len(row["text"].split()) in WORDS for row in corpus)
    vocabulary = {word for row in corpus for word in row["text"].split()}
    assert 60 <= len(vocabulary) <= 120
    trained = {word for row in corpus if row["split"] == "train" for word in row["text"].split()}
    assert vocabulary == trained
    assert re.fullmatch("[a-z]+", "".join(vocabulary))


def test_no_voice_is_heard_in_two_splits(whole):
    heard = {split: {r["voice"] for r in rows(whole) if r["split"] == split} for split in SIZES}
    assert sum(map(len, heard.values())) == len(set().union(*heard.values()))
    assert {split: len(voices) for split, voices in heard.items()} == {
        split: len(voices) for split, voices in VOICES.items()
    }


def test_recordings_are_speech_of_plausible_length(whole):
    durations = []
    for row in rows(whole):
        info = soundfile.info(whole.parent / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.frames / 16_000 == row["duration"]
        assert 3 < len(row["text"]) / row["duration"] < 25  # characters a second
        durations.append(row["duration"])
    assert 1.5 < sum(durations) / len(durations) < 3
    samples, _ = soundfile.read(whole.parent / "train-000.wav")
    assert 0.1 < abs(samples).max() < 1


def test_voice_and_rate_are_heard(tmp_path):
    request = {"split": "train", "text": "the boat is here", "voice": "en-us+m1", "pitch": 50}
    requests = [request | {"rate": 110}, request | {"rate": 170}, request | {"rate": 110}]
    requests[2] |= {"voice": "en-us+f2"}
    library, data, _ = synthetic._find_espeak()
    slow, fast, other = synthetic._speak(requests, tmp_path / "requests.jsonl", library, data)
    assert len(slow) > 1.2 * len(fast)
    assert slow[:8_000].tolist() != other[:8_000].tolist()


def test_every_rule_of_the_grammar_exists():
    used = {name for rule in GRAMMAR.values() for name in re.findall("<(.*?)>", rule)}
    assert used == GRAMMAR.keys() - {"sentence"}


def test_the_same_seed_gives_the_same_bytes_in_another_process(small, tmp_path):
    build = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from fastguard.speech.data.synthetic import build_synthetic\n"
        f"print(build_synthetic(Path(sys.argv[1]), 1, sizes={SMALL}))"
    )
    command = [sys.executable, "-c", build, str(tmp_path / "elsewhere")]
    environment = {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    folder = tmp_path / "elsewhere" / small.parent.name
    assert run.stdout.strip() == str(folder / "manifest.jsonl")
    assert contents(folder) == contents(small.parent)


def test_another_build_in_this_process_gives_the_same_bytes(small, tmp_path):
    again = build_synthetic(tmp_path / "elsewhere", seed=1, sizes=SMALL)
    assert contents(again.parent) == contents(small.parent)


def test_another_seed_is_another_corpus(small, tmp_path):
    other = build_synthetic(tmp_path / "cache", seed=2, sizes=SMALL)
    assert other.parent != small.parent
    assert {row["text"] for row in rows(other)} != {row["text"] for row in rows(small)}


def test_an_intact_corpus_is_not_built_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_write", None)
    assert build_synthetic(tmp_path / "cache", seed=1, sizes=SMALL) == small
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [small.parent.name]


def change_a_sample(folder):
    data = bytearray((folder / "train-003.wav").read_bytes())
    data[-1] ^= 1
    (folder / "train-003.wav").write_bytes(data)


@pytest.mark.parametrize(
    "harm, what",
    [
        (change_a_sample, "train-003.wav differs"),
        (lambda folder: (folder / "dev-006.wav").unlink(), "dev-006.wav differs"),
        (lambda folder: (folder / "manifest.jsonl").write_text(""), "manifest.jsonl differs"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda folder: (folder / "SHA256SUMS").write_text(""), "dev-006.wav differs"),
        (shutil.rmtree, None),
    ],
)
def test_a_damaged_corpus_is_built_again(small, tmp_path, caplog, harm, what):
    before = contents(small.parent)
    harm(small.parent)
    with caplog.at_level(logging.WARNING):
        assert build_synthetic(tmp_path / "cache", seed=1, sizes=SMALL) == small
    assert contents(small.parent) == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [small.parent.name]
    assert (what or "") in caplog.text
    assert bool(caplog.records) == bool(what)


def test_the_first_of_two_builders_serves_both(tmp_path, monkeypatch):
    write = synthetic._write

    def write_late(folder, *rest):
        monkeypatch.setattr(synthetic, "_write", write)
        firsts.append(build_synthetic(tmp_path, seed=1, sizes=SMALL).stat().st_ino)
        write(folder, *rest)

    firsts = []
    monkeypatch.setattr(synthetic, "_write", write_late)
    manifest = build_synthetic(tmp_path, seed=1, sizes=SMALL)
    assert [manifest.stat().st_ino] == firsts
    assert [path.name for path in tmp_path.iterdir()] == [manifest.parent.name]


def test_checksums_are_those_of_sha256sum(small):
    lines = (small.parent / "SHA256SUMS").read_text().splitlines()
    names = contents(small.parent)
    assert len(lines) == len(names) - 1 == sum(SMALL.values()) + 1
    for line in lines:
        digest, name = line.split("  ")
        assert names[name] == digest


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_default_cache(tmp_path, monkeypatch, variable):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / ".cache"
    manifest = build_synthetic(None, seed=1, sizes={"train": 1})
    assert manifest.parents[1] == cache / "fastguard"


def test_a_missing_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CorpusError, match=r"pip install espeakng-loader, or give another --data"):
        build_synthetic(tmp_path, seed=0)


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_find_espeak", lambda: ("/nowhere.so", "/nowhere", "0"))
    with pytest.raises(CorpusError, match=r"stopped at .*/nowhere\.so.*--data"):
        build_synthetic(tmp_path, seed=0, sizes=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_voice(tmp_path):
    library, data, _ = synthetic._find_espeak()
    request = {"text": "hello", "voice": "nobody", "rate": 150, "pitch": 50}
    with pytest.raises(CorpusError, match=r"stopped at .*no voice 'nobody'"):
        list(synthetic._speak([request], tmp_path / "requests.jsonl", library, data))


def test_the_wheel_has_every_voice():
    """eSpeak NG falls back on its plain voice, without an error, where a variant is missing."""
    _, data, _ = synthetic._find_espeak()
    variants = {path.name for path in Path(data, "voices", "!v").iterdir()}
    assert {voice for voices in VOICES.values() for voice in voices} <= variants


def test_the_program_needs_nothing_but_the_standard_library():
    code = f"import sys, runpy; runpy.run_path({espeak.__file__!r}); print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
