"""Broken and hostile recordings and manifests: named and left out, in bounded time and memory."""

import gzip
import json
import os
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.data.audio import AudioError, header_duration
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.corpora import CorpusError, load_corpus
from fastguard.speech.data.features import LogMel, load_audio
from fastguard.speech.data.readers import LONGEST_LINE, read_librispeech
from fastguard.speech.data.sampler import Draw
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.data.utterances import Utterance

RATE = 16_000


@pytest.fixture
def left_out(tmp_path, record):
    """left_out(line, ...): what load_corpus says of these lines (bytes, or rows for json) beside a
    good one; the good one is left, and the summary has no more lines than it should."""
    record(tmp_path / "good.wav")

    def load(*lines, start=b"", **options):
        good = {"audio_filepath": "good.wav", "text": "all is well", "split": "train"}
        path = tmp_path / "corpus.jsonl"
        path.write_bytes(
            start
            + b"".join(
                (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                for line in (good, *lines)
            )
        )
        corpus = load_corpus(f"manifest:{path}", **options)
        assert [u.id for u in corpus.utterances] == ["good.wav"]
        lines = 4 + (not corpus.decoded) + len({row.kind for row in corpus.rejected})
        assert len(corpus.summary().splitlines()) == lines + len(corpus.changes)
        return {row.id: row.reason for row in corpus.rejected}

    return load


def wav(frames, rate=RATE, channels=1, bits=16, data=b""):
    """A wav file whose header claims ``frames``, whatever ``data`` holds."""
    align = channels * bits // 8
    size = min(frames * align, 0xFFFFFFFF - 36)
    header = struct.pack("<HHIIHH", 1, channels, rate, min(rate * align, 0xFFFFFFFF), align, bits)
    return (
        b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<I", len(header))
        + header + b"data" + struct.pack("<I", size) + data
    )  # fmt: skip


def limited(code, megabytes):
    """Output of a Python program whose address space may grow by so much after its imports."""
    program = (
        "import re, resource, sys\n"
        "from fastguard.speech.data.corpora import load_corpus\n"
        "from fastguard.speech.data.features import load_audio\n"
        "size = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size + ({megabytes} << 20),) * 2)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program + code], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# --- recordings ----------------------------------------------------------------------------------

RECORDINGS = {
    "empty": (b"", "unreadable audio"),
    "header": (wav(RATE)[:30], "unreadable audio"),
    "no-samples": (wav(0), "too short"),
    "claims-a-second": (wav(RATE), "cut off"),
    "one-sample": (wav(1, data=b"\1\2"), "too short"),
    "one-hertz": (wav(10, rate=1, data=bytes(20)), "unusual rate"),
    "megahertz": (wav(10**6, rate=10**6, data=bytes(2 * 10**6)), "unusual rate"),
    "gigahertz": (wav(10, rate=4 * 10**9, data=bytes(20)), "unusual rate|unreadable audio"),
    "no-rate": (wav(10, rate=0, data=bytes(20)), "unusual rate|unreadable audio"),
    "no-channels": (wav(10, channels=0, data=bytes(20)), "unreadable audio"),
    "text": (b"this is not audio\n" * 100, "unreadable audio"),
    "zip": (b"PK\3\4" + bytes(1000), "unreadable audio"),
}


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("name", RECORDINGS)
def test_a_broken_recording_is_named(left_out, tmp_path, name, check):
    content, kind = RECORDINGS[name]
    (tmp_path / f"{name}.wav").write_bytes(content)
    row = {"audio_filepath": f"{name}.wav", "text": "hello", "split": "dev"}
    reasons = left_out(row, check=check)
    assert list(reasons) == [f"{name}.wav"]
    assert reasons[f"{name}.wav"].partition(":")[0] in kind.split("|")
    assert f"{name}.wav'" in reasons[f"{name}.wav"]


@pytest.mark.parametrize(
    "name", [name for name, (_, kind) in RECORDINGS.items() if "sho" not in kind]
)
def test_load_audio_names_the_file(tmp_path, name):
    (tmp_path / f"{name}.wav").write_bytes(RECORDINGS[name][0])
    with pytest.raises(AudioError, match=rf"'.*{name}\.wav'"):
        load_audio(tmp_path / f"{name}.wav", RATE)


def test_a_flac_torn_in_the_middle_is_named(left_out, tmp_path):
    noise = np.random.default_rng(0).standard_normal(5 * RATE) * 0.1
    soundfile.write(tmp_path / "torn.flac", noise, RATE)
    whole = (tmp_path / "torn.flac").read_bytes()
    (tmp_path / "torn.flac").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    row = {"audio_filepath": "torn.flac", "text": "hello", "split": "dev"}
    (reason,) = left_out(row, max_output_length=lambda seconds: 20).values()
    assert "torn.flac'" in reason


@pytest.mark.parametrize("channels", [24, 1024])
def test_many_channels_are_averaged(tmp_path, channels):
    samples = np.full((RATE, channels), 0.5, np.float32)
    samples[:, ::2] = 0
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert torch.equal(load_audio(tmp_path / "a.wav", RATE), torch.full((RATE,), 0.25))


def test_nan_samples_are_counted(left_out, tmp_path):
    samples = np.zeros(RATE)
    samples[7:10] = np.nan, np.inf, -np.inf
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    reasons = left_out({"audio_filepath": "nan.wav", "text": "hello", "split": "dev"})
    assert reasons["nan.wav"].startswith("samples not finite: 3 of 16000")


def test_ten_hours_are_judged_by_their_header(tmp_path):
    """Of 1.1 GB of sparse file nothing is decoded, which would take 2.3 GB."""
    path = tmp_path / "long.wav"
    frames = 10 * 3600 * RATE
    path.write_bytes(wav(frames))
    os.truncate(path, 44 + 2 * frames)
    assert header_duration(path) == 36_000
    output = limited(
        f"try: load_audio({str(path)!r}, 16000)\nexcept Exception as error: print(error)\n", 256
    )
    assert output.startswith("too long: 36000.00 s, over 3600 s; cut '")


def test_a_bound_holds_for_many_channels_too(tmp_path):
    """20 s of 1024 channels are 1.3 GB of samples, from a sparse file."""
    path = tmp_path / "wide.wav"
    frames = 20 * RATE
    path.write_bytes(wav(frames, channels=1024, bits=8))
    os.truncate(path, 44 + 1024 * frames)
    assert limited(f"print(len(load_audio({str(path)!r}, 16000)))", 256) == f"{frames}\n"


@pytest.mark.parametrize("rate", [127_997, 383_999])
def test_a_rate_that_is_prime_to_16000_takes_little_memory(tmp_path, rate):
    """The exact filter of 383,999 Hz would have 6e9 coefficients."""
    path = tmp_path / "prime.wav"
    path.write_bytes(wav(rate, rate=rate, data=bytes(2 * rate)))
    output = limited(f"print(len(load_audio({str(path)!r}, 16000)))", 512)
    assert abs(int(output) - RATE) <= 1


def special_files(folder):
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "fifo.wav")
    (folder / "zero.wav").symlink_to("/dev/zero")
    (folder / "loop.wav").symlink_to("loop.wav")
    return ["folder.wav", "fifo.wav", "zero.wav", "loop.wav", "nul\0.wav", "", "x" * 300]


@pytest.mark.parametrize("check", ["decode", "header"])
def test_only_regular_files_are_opened(left_out, tmp_path, check):
    names = special_files(tmp_path)
    rows = [{"audio_filepath": name, "text": "hello", "split": "dev"} for name in names]
    reasons = left_out(*rows, check=check)
    assert len(reasons) == len(names)
    kinds = {name: reason.partition(":")[0] for name, reason in reasons.items()}
    assert kinds == {
        "folder.wav": "no recording",
        "fifo.wav": "no recording",
        "zero.wav": "no recording",
        "": "no recording",
        "loop.wav": "unreadable audio",
        "x" * 300: "unreadable audio",
        r"'nul\x00.wav'": "control characters",
    }
    for name in names:
        with pytest.raises(AudioError, match=r"no recording|unreadable audio"):
            load_audio(tmp_path / name, RATE)


def test_what_turns_bad_after_the_manifest_was_believed_is_rejected(tmp_path):
    names = special_files(tmp_path)
    for name, (content, _) in RECORDINGS.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
        names.append(f"{name}.wav")
    rows = [Utterance(name, tmp_path / name, "hello", "train", 1.0) for name in names]
    dataset = SpeechDataset(rows, CharTokenizer.from_texts([]), LogMel())
    kinds = {dataset[Draw(i, 0)].kind for i in range(len(rows))}
    assert kinds == {"no recording", "unreadable audio", "unusual rate", "too short", "cut off"}


# --- manifests -----------------------------------------------------------------------------------

HELLO = b'"audio_filepath": "good.wav", "text": "hello"'
LINES = {
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
    "deep-objects": (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "RecursionError"),
    "huge integer": (
        b"{" + HELLO + b', "duration": ' + b"9" * 100_000 + b"}",
        "a number of 100000 digits",
    ),
    "large integer": (b"{" + HELLO + b', "duration": ' + b"9" * 400 + b"}", "duration is 9999"),
    "infinite": (b"{" + HELLO + b', "duration": 1e999}', "duration is inf"),
    "infinite string": (b"{" + HELLO + b', "duration": "inf"}', "duration is 'inf'"),
    "NaN": (b"{" + HELLO + b', "duration": NaN}', "NaN is not JSON"),
    "negative": (b"{" + HELLO + b', "duration": -1}', "duration is -1"),
    "boolean": (b"{" + HELLO + b', "duration": true}', "duration is True"),
    "string": (b"{" + HELLO + b', "duration": "1 s"}', "duration is '1 s'"),
    "duplicate key": (b"{" + HELLO + b', "text": "bye"}', "the key 'text' occurs twice"),
    "list": (b"[1, 2]", "TypeError"),
    "number": (b"7", "TypeError"),
    "null": (b"null", "TypeError"),
    "word": (b'"hello"', "TypeError"),
    "two rows": (b"{" + HELLO + b"}{" + HELLO + b"}", "Extra data"),
    "latin-1": (b'{"audio_filepath": "good.wav", "text": "\xe9t\xe9"}', "not UTF-8"),
    "NUL": (b"\0" * 1000, "JSONDecodeError"),
    "long values": (b'{"audio_filepath": 1, "text": [' + b"1," * 10_000 + b"1]}", "TypeError"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_malformed_line_is_named(left_out, name):
    line, reason = LINES[name]
    reasons = left_out(line)
    assert list(reasons) == ["line 2"]
    assert reasons["line 2"].startswith("malformed line: ")
    assert reason in reasons["line 2"]
    assert len(reasons["line 2"]) < 400


def test_a_line_of_a_gigabyte_is_skipped(tmp_path, record):
    """The file is sparse, and of its second line a gigabyte is NUL."""
    record(tmp_path / "good.wav")
    path = tmp_path / "corpus.jsonl"
    row = b'{"audio_filepath": "good.wav", "text": "hello", "split": "train"}\n'
    with path.open("wb") as file:
        file.write(b'{"audio_filepath": "a.wav"}\n')
        file.seek(1 << 30, os.SEEK_CUR)
        file.write(b"\n" + row)
    output = limited(
        f"corpus = load_corpus('manifest:{path}')\n"
        "print(len(corpus.utterances), *(f'{r.id} {r.kind}' for r in corpus.rejected), sep='; ')",
        128,
    )
    assert output == "1; line 1 malformed line; line 2 line too long\n"


@pytest.mark.parametrize(
    "length, kind", [(LONGEST_LINE, "no words"), (LONGEST_LINE + 1, "line too")]
)
def test_a_line_may_have_a_certain_length(left_out, length, kind):
    row = b'{"audio_filepath": "a.wav", "text": "", "note": "'
    line = row + b"x" * (length - len(row) - 3) + b'"}'
    (reason,) = left_out(line).values()
    assert reason.startswith(kind)


def test_a_last_line_needs_no_end(tmp_path, record):
    record(tmp_path / "good.wav")
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"{" + HELLO + b', "split": "train"}')
    assert len(load_corpus(f"manifest:{path}").utterances) == 1


def test_a_byte_order_mark_is_ignored(left_out):
    assert left_out(start=b"\xef\xbb\xbf") == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"audio_filepath": "a.wav", "text": "hello"}\n', encoding=encoding)
    with pytest.raises(CorpusError, match=rf"corpus\.jsonl is {encoding[:6]}: .*iconv -f"):
        load_corpus(f"manifest:{path}")


@pytest.mark.parametrize(
    "text", ["(" * 400_000, "(" * 9_000 + ")" * 9_000, "e\u0301\u0323" * 9_000]
)
def test_a_text_that_is_slow_to_normalise_is_left_out(left_out, text):
    row = {"audio_filepath": "a.wav", "text": text, "split": "dev"}
    assert left_out(row)["a.wav"].startswith(f"text too long: {len(text)} characters, over 10000")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a.wav\n  left out 0: nothing", r"'a.wav\n  left out 0: nothing'"),
        ("a\x1b[2J.wav", r"'a\x1b[2J.wav'"),
        ("a\u2028b.wav", r"'a\u2028b.wav'"),
        ("a\ud800.wav", r"'a\ud800.wav'"),
    ],
)
def test_a_path_can_not_forge_a_line_of_the_log(left_out, name, shown):
    rows = [{"audio_filepath": name, "text": "hello", "split": "dev"}, {"start": 1}]
    rows[1] |= rows[0]
    reasons = left_out(*rows)
    assert list(reasons) == [shown]


def test_a_path_beyond_what_a_system_opens_is_cut(left_out):
    reasons = left_out({"audio_filepath": "x" * 5_000, "text": "hello", "split": "dev"})
    assert reasons == {
        "x" * 60 + "...": "id too long: 5000 characters, over 4096; shorten the path"
    }


def test_transcripts_of_other_corpora_are_read_with_the_same_care(tmp_path, record):
    record(tmp_path / "train-x" / "1" / "2" / "a.flac")
    transcript = tmp_path / "train-x" / "1" / "2" / "1-2.trans.txt"
    transcript.write_bytes(b"a ALL IS WELL\nb \xe9T\xe9\n" + b"c " + b"x" * LONGEST_LINE + b"\n")
    rows = list(read_librispeech(tmp_path))
    assert [row.id for row in rows] == ["a", "1-2.trans.txt, line 2", "1-2.trans.txt, line 3"]


def test_a_torn_archive_is_named(tmp_path):
    (tmp_path / "en_US_f_Allison").mkdir()
    path = tmp_path / "core-sounds-en.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(1000))[:-200])
    with pytest.raises(CorpusError, match=r"core-sounds-en\.txt\.gz"):
        load_corpus(f"asterisk:{tmp_path}")


def test_a_limit_is_a_limit():
    """The tests of memory above can fail."""
    with pytest.raises(AssertionError, match="MemoryError"):
        limited("bytearray(300 << 20)", 256)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
