"""Segments of a recording agree with the recording, whatever its rate."""

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.data.audio import open_recording
from fastguard.speech.data.features import load_audio
from fastguard.speech.recognition.segments import Segments

HOP = 640


def write(path, seconds, rate, channels=1):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def segments_of(path, block=10_000, **options):
    with open_recording(path) as file:
        segments = Segments(file.samplerate, 16_000, HOP, **options)
        found = []
        while len(samples := file.read(block)):
            found += segments.push(torch.from_numpy(samples))
        last = segments.rest()
        return [*found, *([] if last is None else [last])], segments.seconds_read


@pytest.mark.parametrize(
    "rate, channels",
    [(16_000, 1), (8_000, 1), (44_100, 2), (48_000, 3), (11_025, 1), (12_345, 1), (96_000, 1)],
)
def test_segments_go_on_where_the_last_ended_and_hold_the_resampled_recording(
    tmp_path, rate, channels
):
    path = write(tmp_path / "a.wav", 9.73, rate, channels)
    whole = load_audio(path, 16_000)
    segments, seconds = segments_of(path, seconds=3.0, context_seconds=0.5)
    assert len(segments) >= 4
    frame = 0
    for segment in segments:
        begin = (frame - segment.skip) * HOP
        torch.testing.assert_close(
            segment.samples, whole[begin : begin + len(segment.samples)], rtol=0, atol=1e-5
        )
        after = len(segment.samples) // HOP - segment.skip - (segment.keep or 0)
        assert frame == 0 or segment.skip * HOP >= 0.5 * 16_000
        assert segment.keep is None or after * HOP >= 0.5 * 16_000
        frame += segment.keep or 0
    assert begin + len(segments[-1].samples) == len(whole)
    assert [segment.keep is None for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert seconds == pytest.approx(9.73, abs=1e-3)


def test_blocks_of_any_size_make_the_same_segments(tmp_path):
    path = write(tmp_path / "a.wav", 5.0, 11_025)
    options = {"seconds": 1.0, "context_seconds": 0.1}
    expected, _ = segments_of(path, **options)
    assert len(expected) > 5
    for block in (441, 1_000_000):
        found, _ = segments_of(path, block, **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.skip, ours.keep) == (theirs.skip, theirs.keep)
            assert torch.equal(ours.samples, theirs.samples)


def test_what_fits_is_one_segment(tmp_path):
    path = write(tmp_path / "a.wav", 2.9, 8_000)
    (segment,), _ = segments_of(path, seconds=4.0, context_seconds=0.5)
    assert (segment.skip, segment.keep) == (0, None)
    assert torch.equal(segment.samples, load_audio(path, 16_000))


def test_no_samples_no_segments(tmp_path):
    assert segments_of(write(tmp_path / "a.wav", 0, 8_000)) == ([], 0.0)


def test_segments_shorter_than_their_context_still_advance(tmp_path):
    path = write(tmp_path / "a.wav", 3.0, 16_000)
    segments, _ = segments_of(path, seconds=0.1, context_seconds=0.5)
    assert all(segment.keep == 1 for segment in segments[:-1])
    frames = sum(segment.keep or 0 for segment in segments[:-1])
    assert frames - segments[-1].skip + len(segments[-1].samples) // HOP == 3 * 16_000 // HOP
