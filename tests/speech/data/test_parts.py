"""Segments and channels of recordings."""

import math

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.data.audio import (
    AudioError,
    decoded_duration,
    header_duration,
    open_recording,
    read_mono,
)
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.corpora import load_corpus
from fastguard.speech.data.features import LogMel, load_audio
from fastguard.speech.data.part import WHOLE, Part
from fastguard.speech.data.sampler import Draw
from fastguard.speech.data.utterances import Utterance, Utterances
from tests.recordings import write_manifest

RATE = 16_000


@pytest.fixture
def stereo(tmp_path):
    """stereo(name): 4 s of noise, other noise on each channel, in the format of the suffix."""

    def write(name, **options):
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (4 * RATE, 2))
        soundfile.write(tmp_path / name, noise, RATE, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize("channel", [None, 0, 1])
@pytest.mark.parametrize("start, seconds", [(0.0, 1.0), (1.23456, 0.5), (2.5, None), (3.0, 1.0)])
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.wav", {}),
        ("b.wav", {"subtype": "FLOAT"}),
        ("c.wav", {"subtype": "IMA_ADPCM"}),
        ("a.flac", {}),
        ("a.aiff", {}),
        ("a.au", {}),
        ("a.caf", {}),
        ("a.w64", {}),
        ("a.ogg", {}),
        ("a.mp3", {}),
    ],
)
def test_a_part_is_the_slice_of_the_whole(stereo, name, options, start, seconds, channel):
    path = stereo(name, **options)
    whole, rate = read_mono(path, 60.0, part=Part(channel=channel))
    first = round(start * rate)
    end = None if seconds is None else first + round(seconds * rate)
    part = Part(start, seconds, channel)
    samples, _ = read_mono(path, 60.0, part=part)
    assert np.array_equal(samples, whole[first:end])
    assert decoded_duration(path, 60.0, part) == len(samples) / rate
    assert header_duration(path, part) == pytest.approx(len(samples) / rate, abs=0.08)


def test_channels_are_those_of_the_file(stereo):
    path = stereo("a.wav")
    samples, _ = soundfile.read(path, dtype="float32")
    found = [read_mono(path, 60.0, part=Part(channel=c))[0] for c in (0, 1, None)]
    assert np.array_equal(found[0], samples[:, 0])
    assert np.array_equal(found[1], samples[:, 1])
    assert np.allclose(found[2], samples.mean(axis=1))


def test_a_chosen_channel_is_not_compared_with_the_other(tmp_path, caplog):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], axis=1), RATE)
    samples, _ = read_mono(tmp_path / "a.wav", 60.0, part=Part(channel=1))
    assert np.abs(samples + wave).max() < 1e-4
    assert not caplog.records


def test_segments_of_a_wav_and_flac_are_found_without_decoding_what_is_before(stereo, monkeypatch):
    for name, skipped in (("a.wav", 0), ("a.flac", 0), ("a.mp3", 3 * RATE)):
        with open_recording(stereo(name), Part(3.0, 0.5)) as file:
            read, decoded = file._file.read, []
            monkeypatch.setattr(
                file._file, "read", lambda n, r=read, d=decoded, **o: d.append(n) or r(n, **o)
            )
            assert len(file.read(10 * RATE)) == RATE // 2
            assert sum(decoded) == skipped + RATE // 2


@pytest.mark.parametrize("start, seconds", [(4.0, None), (5.0, 1.0), (3.5, 1.0), (0.0, 4.2)])
@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_a_segment_beyond_the_end_is_named(stereo, name, start, seconds):
    path = stereo(name)
    with pytest.raises(AudioError, match=rf"segment beyond the end: offset {start:g} s.*{name}"):
        read_mono(path, 60.0, part=Part(start, seconds))


def test_a_segment_beyond_the_end_of_a_file_from_a_pipe_is_named(stereo):
    path = stereo("a.au")
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"  # the size is unknown
    path.write_bytes(content)
    assert len(read_mono(path, 60.0, part=Part(1.0, 2.0))[0]) == 2 * RATE
    with pytest.raises(AudioError, match=r"segment beyond the end: .* which has 4\.00 s"):
        read_mono(path, 60.0, part=Part(3.0, 2.0))


def test_a_length_that_was_rounded_up_is_no_error(stereo):
    assert len(read_mono(stereo("a.wav"), 60.0, part=Part(3.0, 1.1))[0]) == RATE


def test_utterances_keep_their_parts():
    parts = [WHOLE, Part(1.5), Part(0.25, 2.125), Part(channel=1), Part(1e6, 0.5, 7)]
    rows = [Utterance(str(i), "a.wav", "x", "train", math.nan, p) for i, p in enumerate(parts)]
    stored = Utterances(rows)
    assert [u.part for u in stored] == parts
    assert stored.select(np.array([4, 2]))[0].part == parts[4]


@pytest.mark.parametrize("check", ["decode", "header"])
def test_the_channel_of_a_corpus(stereo, tmp_path, record, check):
    path = stereo("two.wav")
    record(tmp_path / "one.wav")
    rows = [{"audio_filepath": n, "text": "hi", "split": "train"} for n in ("two.wav", "one.wav")]
    spec = write_manifest(tmp_path / "m.jsonl", rows)
    corpus = load_corpus(spec, channel="right", check=check)
    assert [row.id for row in corpus.utterances] == ["two.wav"]
    (left_out,) = corpus.rejected
    assert left_out.kind == "no such channel"
    log_mel = LogMel(RATE)
    item = SpeechDataset(corpus.utterances, None, log_mel)[Draw(0, 1)]
    assert torch.equal(item.features, log_mel(load_audio(path, RATE, part=Part(channel=1))))
    assert not torch.equal(item.features, log_mel(load_audio(path, RATE)))
