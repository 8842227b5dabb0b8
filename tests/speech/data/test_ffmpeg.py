"""Formats that the program ffmpeg decodes, and what is said of the damaged ones."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from fastguard.speech.data import ffmpeg
from fastguard.speech.data.audio import (
    AudioError,
    decoded_duration,
    header_duration,
    open_recording,
    read_mono,
)
from fastguard.speech.data.corpora import load_corpus
from fastguard.speech.data.part import Part
from tests.recordings import write_manifest
from tests.speech.programs import needs_ffmpeg

SECONDS = 6.0
# Arguments that make the sound of a file with this suffix; the encoders are ffmpeg's own.
FORMATS = {
    "m4a": ["-c:a", "aac"],
    "aac": ["-c:a", "aac"],
    "webm": ["-c:a", "opus", "-strict", "-2", "-ar", "48000"],
    "mkv": ["-c:a", "flac"],
    "wma": ["-c:a", "wmav2"],
    "mp4": ["-f", "lavfi", "-i", "testsrc=duration=6:size=64x64:rate=5", "-c:a", "aac"],
    "avi": ["-c:a", "mp2"],
    "wv": ["-c:a", "wavpack"],
}
LOSSLESS = ("mkv", "wv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the same recording as "a.SUFFIX" for each of FORMATS, and as a.wav."""
    folder = tmp_path_factory.mktemp("made")
    moments = np.arange(int(SECONDS * 16_000)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 440 * moments) * np.sin(2 * np.pi * 1.5 * moments) ** 2
    soundfile.write(folder / "a.wav", np.stack([wave, 0.5 * wave], axis=1), 16_000)
    for suffix, arguments in FORMATS.items():
        _ffmpeg("-i", folder / "a.wav", *arguments, folder / f"a.{suffix}")
    _ffmpeg("-i", folder / "a.m4a", "-c", "copy", "-movflags", "+faststart", folder / "fast.m4a")
    return folder


def _ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *map(str, arguments)], check=True)


def amr(frames):
    """An AMR file (RFC 4867): frames of 20 ms at 12.2 kbit/s with random parameters."""
    noise = np.random.default_rng(0)
    return b"#!AMR\n" + b"".join(b"\x3c" + noise.bytes(31) for _ in range(frames))


@needs_ffmpeg
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_format_is_read_to_its_end(made, suffix):
    path = made / f"a.{suffix}"
    samples, rate = read_mono(path, 60.0)
    assert len(samples) / rate == pytest.approx(SECONDS, abs=0.15)  # encoders pad the ends
    assert decoded_duration(path, 60.0) == len(samples) / rate
    assert header_duration(path) == pytest.approx(SECONDS, abs=0.5)  # of aac it is an estimate
    wave, _ = read_mono(made / "a.wav", 60.0)
    if suffix in LOSSLESS:
        assert np.array_equal(samples, wave)
    elif rate == 16_000:
        shift = np.argmax(np.correlate(samples[:40_000], wave[10_000:20_000]))
        found = samples[shift : shift + 10_000]
        assert np.corrcoef(found, wave[10_000:20_000])[0, 1] > 0.95


@needs_ffmpeg
def test_amr_is_read(tmp_path):
    (tmp_path / "a.amr").write_bytes(amr(100))
    samples, rate = read_mono(tmp_path / "a.amr", 60.0)
    assert (len(samples), rate) == (100 * 160, 8_000)


@needs_ffmpeg
def test_a_wrong_name_is_read_all_the_same(made, tmp_path):
    shutil.copy(made / "a.m4a", tmp_path / "phone.wav")
    shutil.copy(made / "a.wav", tmp_path / "studio.m4a")
    assert decoded_duration(tmp_path / "phone.wav", 60.0) == pytest.approx(SECONDS, abs=0.15)
    assert decoded_duration(tmp_path / "studio.m4a", 60.0) == SECONDS


@needs_ffmpeg
@pytest.mark.parametrize("share", [0.31, 0.7, 0.95])
@pytest.mark.parametrize("name", [*(f"a.{suffix}" for suffix in FORMATS), "fast.m4a"])
def test_a_cut_file_is_refused_by_name(made, tmp_path, name, share):
    content = (made / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AudioError) as error:
        read_mono(path, 60.0)
    assert str(error.value).partition(": ")[0] in ("unreadable audio", "incomplete audio")
    assert f"'{path}': ffmpeg: " in str(error.value)
    assert f"ffmpeg -i '{name}'" in str(error.value)
    assert "\n" not in str(error.value)


@needs_ffmpeg
@pytest.mark.parametrize("part", [Part(1.25, 0.5), Part(5.0), Part(0.0, 2.0, 1), Part(channel=0)])
@pytest.mark.parametrize("suffix", ["mkv", "m4a"])
def test_a_part_is_cut_from_the_whole(made, suffix, part):
    with open_recording(made / f"a.{suffix}", Part(channel=part.channel)) as file:
        whole = file.read(10_000_000)
    samples, rate = read_mono(made / f"a.{suffix}", 60.0, part=part)
    end = None if part.seconds is None else round((part.start + part.seconds) * rate)
    assert np.array_equal(samples, whole[round(part.start * rate) : end])


@needs_ffmpeg
def test_a_video_without_sound_is_named(tmp_path):
    path = tmp_path / "mute.mp4"
    _ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1:size=64x64:rate=5", path)
    with pytest.raises(AudioError, match=r"mute\.mp4': ffmpeg: .*matches no streams"):
        read_mono(path, 60.0)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi", "mpg", "wma", "rm", "gsm"])
def test_a_playlist_opens_no_other_file(made, tmp_path, suffix):
    """ffmpeg knows playlists by their content, whatever the name, and would read what they list."""
    for number, text in enumerate(
        (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6,\n{made / 'a.aac'}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{made / 'a.wav'}'\n",
        )
    ):
        (tmp_path / f"{number}.{suffix}").write_text(text)
        with pytest.raises(AudioError, match=rf"{number}\.{suffix}"):
            read_mono(tmp_path / f"{number}.{suffix}", 60.0)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["-y.m4a", "a b'c.m4a", "a:b.m4a", "café.m4a", "%03d.m4a"])
def test_a_name_is_no_option_and_no_address(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "a.m4a", f"./{name}")
    assert decoded_duration(name, 60.0) == pytest.approx(SECONDS, abs=0.15)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@needs_ffmpeg
def test_what_is_too_long_is_not_decoded_to_its_end(made):
    with pytest.raises(AudioError, match="too long"):
        read_mono(made / "a.mkv", 2.0)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(code): a Python program is called instead of ffmpeg; returns the path of its file."""

    def put(code):
        path = tmp_path / "bin" / "ffmpeg"
        path.parent.mkdir()
        path.write_text(f"#!{sys.executable}\nimport sys, time\n{code}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))
        return path

    return put


HEADER = (
    "sys.stdout.buffer.write(b'.snd' + "
    "bytes.fromhex('00000018 ffffffff 00000006 0000%s 00000001')); sys.stdout.flush()\n"
)


@pytest.mark.parametrize("code", ["", HEADER % "3e80"], ids=["silent", "header"])
def test_a_file_that_hangs_ffmpeg_does_not_hang_the_run(program, tmp_path, monkeypatch, code):
    program(code + "time.sleep(1000)")
    monkeypatch.setattr(ffmpeg, "_LIMIT", 0.5)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    with pytest.raises(AudioError, match=r"a\.m4a': ffmpeg: no samples for 0\.5 s"):
        read_mono(tmp_path / "a.m4a", 60.0)


def test_ffmpeg_ends_with_the_recording(program, tmp_path):
    """Also where it says more than a pipe holds, and where its samples have no end."""
    program(
        HEADER % "3e80" + "sys.stderr.write('[info] x\\n' * 20_000)\n"
        "while True: sys.stdout.buffer.write(bytes(65536))"
    )
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    with pytest.raises(AudioError, match="too long"):
        read_mono(tmp_path / "a.m4a", 60.0)
    with open_recording(tmp_path / "a.m4a") as file:
        process = file._file._process
        assert len(file.read(1000)) == 1000
        assert process.poll() is None
    assert process.poll() is not None


def test_an_absurd_rate_is_refused(program, tmp_path):
    program(HEADER % "0001")
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    with pytest.raises(AudioError, match=r"unusual rate: .*has 1 Hz"):
        read_mono(tmp_path / "a.m4a", 60.0)


def test_without_ffmpeg_the_cure_is_named(tmp_path, monkeypatch, record):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    record(tmp_path / "b.wav")
    rows = [{"audio_filepath": name, "text": "hi", "split": "train"} for name in ("a.m4a", "b.wav")]
    corpus = load_corpus(write_manifest(tmp_path / "m.jsonl", rows))
    (left_out,) = corpus.rejected
    assert left_out.kind == "needs ffmpeg"
    assert (
        "a.m4a': the program ffmpeg, which reads it, is not on the PATH: install it (apt-get "
        in (left_out.reason)
    )
    assert [row.id for row in corpus.utterances] == ["b.wav"]


@needs_ffmpeg
def test_a_corpus_of_videos_and_phone_recordings(made, tmp_path):
    rows = [
        {"audio_filepath": str(made / f"a.{suffix}"), "text": "hello", "split": "train"}
        for suffix in FORMATS
    ]
    for check in ("decode", "header"):
        corpus = load_corpus(write_manifest(tmp_path / "m.jsonl", rows), check=check)
        assert len(corpus.utterances) == len(FORMATS), corpus.summary()
