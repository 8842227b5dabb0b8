"""No part of a recording is lost unnoticed: it is read in full, or a line says what is missing."""

import contextlib
import io
import logging
import struct

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.data import containers
from fastguard.speech.data.audio import AudioError, header_duration, open_recording, read_mono
from fastguard.speech.data.containers import Extent, examine
from tests.recordings import without_xing
from tests.speech.conftest import tones

RATE = 16_000
SECONDS = 6
# libsndfile's name of the format, and the suffix.
FORMATS = {
    "wav": "WAV", "wavex": "WAVEX", "rf64": "RF64", "w64": "W64", "aiff": "AIFF", "au": "AU",
    "caf": "CAF", "flac": "FLAC", "ogg": "OGG", "opus": "OGG", "mp3": "MP3", "sph": "NIST",
}  # fmt: skip
LOSSY = ("ogg", "opus", "mp3")


@pytest.fixture(scope="module")
def whole():
    """The bytes of one recording in every format; quiet from its second half on, so that the bytes
    of a second differ."""
    samples = tones(SECONDS, RATE)[:, 0]
    samples[: RATE * 3] += 0.05 * np.random.default_rng(1).standard_normal(RATE * 3)
    samples[RATE * 3 :] *= 0.01
    content = {}
    for suffix, form in FORMATS.items():
        file = io.BytesIO()
        subtype = {"opus": "OPUS"}.get(suffix)
        mode = {"bitrate_mode": "VARIABLE"} if suffix == "mp3" else {}
        soundfile.write(file, samples, RATE, format=form, subtype=subtype, **mode)
        content[suffix] = file.getvalue()
    return content


@pytest.fixture
def read(tmp_path):
    """read(content, suffix): the seconds that the bytes decode to, and what their header claims."""

    def seconds(content, suffix):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content)
        samples, rate = read_mono(path, 3600.0)
        return len(samples) / rate, header_duration(path)

    return seconds


def patched(content, at, form, *values):
    new = struct.pack(form, *values)
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_whole_is_read_in_full(whole, read, suffix):
    assert read(whole[suffix], suffix) == pytest.approx((SECONDS, SECONDS), abs=0.05)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.97])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_torn_is_named(whole, read, suffix, part):
    torn = whole[suffix][: int(part * len(whole[suffix]))]
    reason = r"(cut off|damaged|unreadable audio): '.*a\.\w+': .*ffmpeg"
    with pytest.raises(AudioError, match=reason):
        read(torn, suffix)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_ends_in_its_header_raises_nothing_else(whole, suffix):
    for size in range(700):
        with contextlib.suppress(containers.Incomplete):
            containers._examine(io.BytesIO(whole[suffix][:size]))


def test_an_mp3_that_ends_in_the_tag_of_its_first_frame_has_no_tag():
    """The rest of what test_reader_fuzz.py once found: a frame of 17 bytes with a Xing tag."""
    frame = bytes.fromhex("ffe310c4") + bytes(9) + b"Xing"
    for size in range(len(frame) + 1):
        with contextlib.suppress(containers.Incomplete):
            containers._examine(io.BytesIO(frame[:size]))


def test_a_header_that_is_too_short_for_a_parser_makes_the_file_damaged(whole, monkeypatch):
    monkeypatch.setattr(containers, "flac_extent", lambda *_: struct.unpack("<I", b"ab"))
    with pytest.raises(containers.Incomplete, match="damaged: its header cannot be read"):
        examine(io.BytesIO(whole["flac"]))


@pytest.mark.parametrize("suffix", [*LOSSY, "flac"])
def test_a_hole_in_what_is_compressed_is_named(whole, read, suffix):
    content = whole[suffix]
    middle = len(content) // 2
    noise = np.random.default_rng(2).bytes(400)
    with pytest.raises(AudioError, match=r"(cut off|damaged|unreadable audio): '.*a\.\w+': "):
        read(content[:middle] + noise + content[middle + 400 :], suffix)


@pytest.mark.parametrize("tag", [b"", b"TAG" + bytes(125)])
def test_an_mp3_without_a_xing_header_is_read_in_full(whole, read, tag):
    """Its first frames are large, and libsndfile believes that all are."""
    bare = without_xing(whole["mp3"])
    with soundfile.SoundFile(io.BytesIO(bare)) as file:
        assert len(file.read()) < 0.8 * SECONDS * RATE
    assert read(bare + tag, "mp3") == pytest.approx((SECONDS, SECONDS), abs=0.15)


def test_a_torn_mp3_without_a_xing_header_ends_in_a_part_of_a_frame(whole, read):
    bare = without_xing(whole["mp3"])
    for missing in (1, 20, 50):
        with pytest.raises(AudioError, match=r"cut off: .* bytes in its last frame"):
            read(bare[:-missing], "mp3")


def test_an_mp3_without_a_xing_header_sounds_as_with_one(whole, tmp_path):
    (tmp_path / "a.mp3").write_bytes(whole["mp3"])
    (tmp_path / "b.mp3").write_bytes(without_xing(whole["mp3"]))
    (tagged, _), (bare, _) = (read_mono(tmp_path / name, 60.0) for name in ("a.mp3", "b.mp3"))
    # The tag also says how many samples the encoder put before the first.
    shift = int(np.correlate(bare[40_000:70_000], tagged[42_000:62_000]).argmax()) - 2_000
    assert 0 <= shift < 3_000
    ours, theirs = bare[20_000 + shift : 80_000 + shift], tagged[20_000:80_000]
    assert np.abs(ours - theirs).max() < 1e-3


def test_mp3s_one_after_the_other_are_both_read(whole, read, capfd):
    assert read(2 * whole["mp3"], "mp3")[0] == pytest.approx(2 * SECONDS, abs=0.2)
    assert read(2 * without_xing(whole["mp3"]), "mp3")[0] == pytest.approx(2 * SECONDS, abs=0.2)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["ogg", "opus", "flac"])
def test_a_second_recording_in_a_file_is_named(whole, read, suffix):
    with pytest.raises(AudioError, match="two recordings: '"):
        read(2 * whole[suffix], suffix)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36])
def test_a_wav_from_a_pipe_is_read_to_its_end(whole, read, size):
    at = whole["wav"].index(b"data") + 4
    content = patched(whole["wav"], at, "<I", size)
    assert read(content, "wav") == (SECONDS, SECONDS)
    assert read(patched(content, 4, "<I", size), "wav") == (SECONDS, SECONDS)


def test_an_rf64_without_a_length_is_read_to_its_end(whole, read):
    at = whole["rf64"].index(b"ds64") + 16
    assert read(patched(whole["rf64"], at, "<QQ", 0, 0), "rf64") == (SECONDS, SECONDS)


def test_a_wav_may_go_on_with_other_chunks(whole, read):
    text = b"LIST" + struct.pack("<I", 40_000) + bytes(40_000)
    assert read(whole["wav"] + text, "wav") == (SECONDS, SECONDS)
    at = whole["wav"].index(b"data") + 4
    empty = patched(whole["wav"], at, "<I", 0)[: at + 4] + text
    assert read(empty, "wav") == (0, 0)


@pytest.mark.parametrize("suffix, tag, order", [("wav", b"data", "<"), ("aiff", b"SSND", ">")])
def test_samples_beyond_the_length_are_named(whole, read, suffix, tag, order):
    at = whole[suffix].index(tag) + 4
    content = patched(whole[suffix], at, order + "I", SECONDS * RATE)  # of twice as many bytes
    with pytest.raises(AudioError, match=r"wrong length: '.*claims 96000 bytes"):
        read(content, suffix)


@pytest.mark.parametrize("claimed", [0, SECONDS * RATE])
def test_au_and_w64_are_held_against_their_files(whole, read, claimed):
    with pytest.raises(AudioError, match=f"wrong length: '.*claims {claimed} bytes"):
        read(patched(whole["au"], 8, ">I", claimed), "au")
    with pytest.raises(AudioError, match=f"wrong length: '.*claims {claimed} bytes"):
        read(patched(whole["w64"], 16, "<Q", claimed), "w64")
    assert read(patched(whole["au"], 8, ">I", 0xFFFFFFFF), "au") == (SECONDS, SECONDS)


def flac_of(content, samples):
    return patched(content, 21, ">BI", content[21] & 0xF0 | samples >> 32, samples & 0xFFFFFFFF)


def test_a_flac_is_held_against_its_last_frame(whole, read):
    assert read(flac_of(whole["flac"], 0), "flac") == (SECONDS, SECONDS)  # from a pipe
    with pytest.raises(AudioError, match=r"wrong length: .*claims 48000 samples .* has 96000"):
        read(flac_of(whole["flac"], 48_000), "flac")
    with pytest.raises(AudioError, match=r"cut off: .*decodes to 6\.00 s of the 12\.00 s"):
        read(flac_of(whole["flac"], 192_000), "flac")
    torn = flac_of(whole["flac"], 0)[: len(whole["flac"]) // 2]
    with pytest.raises(AudioError, match=r"(cut off|unreadable audio): "):
        read(torn, "flac")


def test_another_format_is_told_the_way_to_a_readable_one(tmp_path):
    (tmp_path / "a.vox").write_bytes(b"\xd2" + bytes(3300))
    with pytest.raises(AudioError) as error:
        read_mono(tmp_path / "a.vox", 60.0)
    assert "readable are wav, flac, ogg" in str(error.value)
    assert "ffmpeg -i 'a.vox' 'a-converted.wav'" in str(error.value)


def test_a_view_inserts_and_replaces():
    extent = Extent(patches={2: b"XY"}, inserted=(4, b"new"))
    view = extent.view(io.BytesIO(b"abcdefgh"))
    assert view.read() == b"abXYnewefgh"
    for start in range(12):
        for length in range(12):
            view.seek(start)
            assert view.read(length) == b"abXYnewefgh"[start : start + length]
    assert examine(io.BytesIO(b"no audio")) is None


# --- channels that cancel -------------------------------------------------------------------------


def test_channels_that_cancel_are_noticed_and_one_is_taken(tmp_path, caplog):
    voice = tones(2.0, RATE)[:, 0].astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([0.5 * voice, -0.6 * voice], 1), RATE, "FLOAT")
    with caplog.at_level(logging.WARNING, "fastguard"):
        samples, _ = read_mono(tmp_path / "a.wav", 60.0)
        read_mono(tmp_path / "a.wav", 60.0)
    np.testing.assert_array_equal(samples, np.float32(-0.6 * voice))
    (record,) = caplog.records
    assert "a.wav cancel each other" in record.getMessage()
    assert "only channel 1 of 2, counted from 0, is used" in record.getMessage()


def test_unrelated_channels_and_a_silent_one_are_averaged(tmp_path, caplog):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 8)).astype(np.float32)
    for name, samples in (
        ("noise", noise),
        ("one", np.stack([noise[:, 0], np.zeros(RATE, np.float32)], 1)),
        ("silence", np.zeros((RATE, 2), np.float32)),
    ):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, samples, RATE, "FLOAT")
        with open_recording(path) as file:
            mono = torch.from_numpy(file.read(RATE))
        torch.testing.assert_close(mono, torch.from_numpy(samples).mean(1))
    assert caplog.text == ""
