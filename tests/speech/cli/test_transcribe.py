"""``python -m fastguard.transcribe`` on recorded speech, as its user meets it."""

import io
import json
import os
import shutil
import subprocess

import jiwer
import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.cli.transcribe import main
from fastguard.speech.data.features import LogMel, load_audio
from fastguard.speech.data.tokenizer import BLANK, CharTokenizer
from fastguard.speech.models import build_model
from fastguard.speech.recognition.decoding import greedy_decode
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.recognition.transcription import (
    Transcriber,
    TranscriptionError,
    WordCutter,
    transcribe,
)
from fastguard.speech.training.config import Config
from tests.recordings import concatenated, without_xing
from tests.speech.programs import needs_ffmpeg


def errors(texts, references):
    return sum(a != b for a, b in zip(texts, references, strict=True))


def test_text_of_one_and_of_several_files(trained_run, prompts, capsys):
    run, path = ["--checkpoint", str(trained_run)], prompts[0][0]
    assert main([*run, path]) == 0
    alone = capsys.readouterr().out
    assert main([*run, *(path for path, _ in prompts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}\t{alone}" == f"{lines[0]}\n"
    assert [line.split("\t")[0] for line in lines] == [path for path, _ in prompts]
    assert errors([line.split("\t")[1] for line in lines], [text for _, text in prompts]) <= 2


def test_json_with_words_in_time(trained_run, prompts, capsys):
    path, _ = prompts[0]
    assert main(["--checkpoint", str(trained_run), "--json", path]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == path
    assert found["duration"] == pytest.approx(soundfile.info(path).duration)
    assert [word["word"] for word in found["words"]] == found["text"].split()
    times = [time for word in found["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= found["duration"] + 0.04
    assert all(0 < word["confidence"] <= 1 for word in found["words"])


@pytest.mark.parametrize("rate, channels, suffix", [(44_100, 2, "flac"), (48_000, 1, "ogg")])
def test_any_rate_and_number_of_channels(recognizer, prompts, tmp_path, rate, channels, suffix):
    path, _ = prompts[0]
    samples = load_audio(path, rate).numpy()
    other = tmp_path / f"other.{suffix}"
    soundfile.write(other, np.stack([samples] * channels, axis=1), rate)
    assert transcribe(recognizer, other).text == transcribe(recognizer, path).text


class Unnormalised(LogMel):
    """So that a segment has the features of the whole."""

    def forward(self, waveform):
        return (self.mel(waveform).T + 1e-4).log() + 4


def test_segments_leave_no_seam(prompts, tmp_path):
    """A model that hears less than the context on either side says the same, at the same times."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer([BLANK, " ", "a", "b", "c"])
    model = build_model("baseline", vocab_size=5, channels=16, kernel_size=13, num_layers=1).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    recognizer = Recognizer(model, tokenizer, Unnormalised(), Config())
    long = tmp_path / "long.wav"
    seconds = concatenated(prompts, long, 3)
    assert seconds > 40
    whole = transcribe(recognizer, long, segment_seconds=1e6, vad=False)
    assert len(whole.words) > 40
    for segment_seconds in (5.0, 7.3, 20.0):
        found = transcribe(recognizer, long, segment_seconds=segment_seconds, vad=False)
        assert found.duration == whole.duration == pytest.approx(seconds)
        assert [w.word for w in found.words] == [w.word for w in whole.words]
        for ours, theirs in zip(found.words, whole.words, strict=True):
            assert vars(ours) == pytest.approx(vars(theirs), abs=1e-4)


def test_a_long_recording_of_what_it_learnt(recognizer, prompts, tmp_path):
    """Each segment has its own mean and variance, so that some letters differ."""
    seconds = concatenated(prompts, tmp_path / "long.wav", 3)
    found = transcribe(recognizer, tmp_path / "long.wav")
    whole = transcribe(recognizer, tmp_path / "long.wav", segment_seconds=1e6)
    assert jiwer.cer(whole.text, found.text) < 0.1
    assert jiwer.cer(" ".join(text for _, text in 3 * prompts), found.text) < 0.5
    times = [time for word in found.words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert seconds - 5 < times[-1] <= seconds


def pieces_of(parts, tokenizer):
    cutter = WordCutter(tokenizer, 100)
    found = [piece for part in parts[:-1] for piece in cutter.push(part)]
    return found + list(cutter.rest(parts[-1]))


def test_segments_are_cut_before_words_and_lose_nothing():
    tokenizer = CharTokenizer.from_texts([])
    torch.manual_seed(0)
    text = " ".join("".join(map(chr, torch.randint(97, 123, (5,)).tolist())) for _ in range(40))
    path = [t for token in tokenizer.encode(text) for t in (token, token, 0)]
    log_probs = (9.0 * torch.nn.functional.one_hot(torch.tensor(path))).log_softmax(-1)
    found = pieces_of(log_probs.split(37), tokenizer)
    assert torch.equal(torch.cat([part for _, part in found]), log_probs)
    assert [start for start, _ in found] == np.cumsum([0, *(len(p) for _, p in found)])[
        :-1
    ].tolist()
    assert all(len(part) <= 100 for _, part in found)
    pieces = [
        tokenizer.decode(greedy_decode(part[None], torch.tensor([len(part)]))[0])
        for _, part in found
    ]
    assert len(pieces) > 5
    assert " ".join(piece.strip() for piece in pieces) == text


@pytest.mark.parametrize(
    "path", [[0] * 250, [3] * 250, [0] * 90 + [3, 4] + [0] * 158, [5, 0] * 125]
)
def test_segments_without_a_space_are_cut_all_the_same(path):
    tokenizer = CharTokenizer.from_texts([])
    log_probs = (9.0 * torch.nn.functional.one_hot(torch.tensor(path), 28)).log_softmax(-1)
    found = pieces_of(log_probs.split(60), tokenizer)
    assert torch.equal(torch.cat([part for _, part in found]), log_probs)
    assert all(0 < len(part) <= 100 for _, part in found)


def test_broken_files_are_named_and_the_others_go_on(trained_run, prompts, tmp_path, capsys):
    (tmp_path / "broken.wav").write_bytes(b"RIFFnothing")
    (tmp_path / "noise.raw").write_bytes(bytes(100))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8_000)
    soundfile.write(tmp_path / "nan.wav", np.full(8_000, np.nan), 8_000, subtype="FLOAT")
    os.mkfifo(tmp_path / "fifo.wav")
    bad = ["absent.wav", *(str(p) for p in sorted(tmp_path.iterdir()))]
    good = prompts[0][0]
    assert main(["--checkpoint", str(trained_run), *bad, good]) == 1
    out, error = capsys.readouterr()
    assert out.startswith(f"{good}\t")
    assert len(out.splitlines()) == 1
    for path in bad:
        assert f"error: {path}: " in error
    assert "'absent.wav' does not exist" in error
    assert "fifo.wav' is not a regular file" in error
    assert "holds no samples" in error
    assert "NaN" in error
    assert "Traceback" not in error


def test_one_sample_and_silence(recognizer, tmp_path):
    for name, samples in (("short", np.zeros(1)), ("silence", np.zeros(30 * 8_000))):
        soundfile.write(tmp_path / f"{name}.wav", samples, 8_000)
        found = transcribe(recognizer, tmp_path / f"{name}.wav")
        assert found.duration == len(samples) / 8_000


def test_folders_hold_recordings_and_other_files(
    trained_run, prompts, tmp_path, monkeypatch, capsys
):
    """A folder may be named as a recording is; what is ignored is named. ffmpeg is absent."""
    monkeypatch.setenv("PATH", "")
    (tmp_path / "below.wav").mkdir()
    samples, rate = soundfile.read(prompts[0][0])
    for name in ("b.WAV", "below.wav/a.flac"):
        soundfile.write(tmp_path / name, samples, rate)
    for name in (
        "1.m4a",
        "2.m4a",
        "3.M4A",
        "below.wav/4.m4a",
        "5.webm",
        "notes",
        "6.txt",
        "a\x1b[2J.vox",
    ):
        (tmp_path / name).write_text("not speech")
    assert main(["--checkpoint", str(trained_run), str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        str(tmp_path / "b.WAV"),
        str(tmp_path / "below.wav/a.flac"),
    ]
    lines = error.splitlines()
    names = ", ".join(str(tmp_path / name) for name in ("1.m4a", "2.m4a", "3.M4A"))
    cure = "install it (apt-get install ffmpeg, "
    assert lines[0].startswith(
        f"ignored: 4 .m4a ({names}, ...), which need the program ffmpeg: {cure}"
    )
    assert [line.split()[1:3] for line in lines[1:3]] == [["1", ".vox"], ["1", ".webm"]]
    assert lines[1].endswith("which cannot be read: convert them, ffmpeg -i FILE.vox FILE.wav")
    assert lines[3].startswith("ignored: 2 other files, by extension 1 without an extension, ")
    assert len(lines) == 4
    assert "\x1b" not in error
    assert main(["--checkpoint", str(trained_run), str(tmp_path / "below.wav")]) == 0
    (tmp_path / "nothing").mkdir()
    assert main(["--checkpoint", str(trained_run), str(tmp_path / "nothing")]) == 1
    assert "no recordings" in capsys.readouterr().err


@needs_ffmpeg
def test_a_folder_of_phone_recordings(trained_run, prompts, tmp_path, capsys):
    for name in ("a.m4a", "b.MP4", "c.webm"):
        encoder = ("opus", "-strict", "-2", "-ar", "48000") if name == "c.webm" else ("aac",)
        command = ["ffmpeg", "-v", "error", "-i", prompts[0][0], "-c:a", *encoder, tmp_path / name]
        subprocess.run(command, check=True)
    (tmp_path / "d.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:5_000])
    assert main(["--checkpoint", str(trained_run), str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    names, texts = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    assert names == tuple(str(tmp_path / name) for name in ("a.m4a", "b.MP4", "c.webm"))
    assert [jiwer.cer(prompts[0][1], text) < 0.3 for text in texts] == [True] * 3
    (line,) = error.splitlines()
    assert line.startswith(f"error: {tmp_path / 'd.m4a'}: ")
    assert "ffmpeg: moov atom not found" in line


@pytest.fixture
def two_voices(prompts, tmp_path):
    """A stereo file with a prompt on each channel, and their texts."""
    first, second = (soundfile.read(path)[0] for path, _ in prompts[:2])
    samples = np.zeros((max(len(first), len(second)), 2))
    samples[: len(first), 0], samples[: len(second), 1] = first, second
    soundfile.write(tmp_path / "call.wav", samples, 8_000)
    return tmp_path / "call.wav", [text for _, text in prompts[:2]]


def test_each_channel_is_transcribed_alone(trained_run, two_voices, capsys):
    path, (left, right) = two_voices
    run = ["--checkpoint", str(trained_run)]
    texts = {}
    for channel in ("left", "right", "mix"):
        assert main([*run, "--channel", channel, str(path)]) == 0
        texts[channel] = capsys.readouterr().out.strip()
    assert jiwer.cer([left, right], [texts["left"], texts["right"]]) < 0.3
    assert texts["mix"] not in (texts["left"], texts["right"])
    assert main([*run, "--channel", "each", str(path)]) == 0
    assert capsys.readouterr().out == f"0\t{texts['left']}\n1\t{texts['right']}\n"
    assert main([*run, "--channel", "each", "--json", str(path), str(path)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["channel"], row["text"]) for row in found] == 2 * [
        (0, texts["left"]),
        (1, texts["right"]),
    ]


def test_a_channel_that_is_not_there(trained_run, prompts, capsys):
    assert main(["--checkpoint", str(trained_run), "--channel", "right", prompts[0][0]]) == 1
    error = capsys.readouterr().err
    assert "has 1, and channel 1, counted from 0, is asked for; use --channel mix" in error


def test_standard_input_is_a_recording(trained_run, prompts, tmp_path, capsys, monkeypatch):
    run, path = ["--checkpoint", str(trained_run)], prompts[0][0]
    assert main([*run, path]) == 0
    alone = capsys.readouterr().out
    with open(path, "rb") as stream:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
        assert main([*run, "-"]) == 0
    assert capsys.readouterr().out == alone
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no sound")))
    assert main([*run, "-", path]) == 1
    out, error = capsys.readouterr()
    assert out == f"{path}\t{alone}"
    assert error.startswith("error: -: unreadable audio: it: Format not recognised")
    with pytest.raises(SystemExit):
        main([*run, "-", "-"])
    assert "- is given 2 times: standard input is read once" in capsys.readouterr().err


def test_an_mp3_without_its_length_is_transcribed_to_its_end(recognizer, prompts, tmp_path):
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 8_000)
    samples = np.concatenate([loud, *(soundfile.read(path)[0] for path, _ in prompts[:4])])
    soundfile.write(tmp_path / "a.mp3", samples, 8_000, bitrate_mode="VARIABLE")
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(without_xing(whole))
    found = transcribe(recognizer, tmp_path / "b.mp3")
    assert found.duration == pytest.approx(len(samples) / 8_000, abs=0.2)
    (tmp_path / "c.mp3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TranscriptionError, match="cut off"):
        transcribe(recognizer, tmp_path / "c.mp3")


def test_the_newest_run_is_taken_and_named(trained_run, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([prompts[0][0]]) == 1
    assert "runs/ has no run: give --checkpoint" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained_run)
    assert main([prompts[0][0]]) == 0
    assert "checkpoint: runs/mine/best.pt" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="names that Windows has not")
def test_names_that_are_no_text(trained_run, prompts, tmp_path, capsys):
    """A name with an end of line is no line of its own, and one that is no UTF-8 is read."""
    names = [b"a\tb\nc.wav", b"caf\xe9.wav"]
    for name in names:
        shutil.copy(prompts[0][0], os.fsencode(tmp_path) + b"/" + name)
    assert main(["--checkpoint", str(trained_run), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    paths = [os.path.join(str(tmp_path), os.fsdecode(name)) for name in names]
    assert [line.split("\t")[0] for line in lines] == [ascii(path) for path in paths]
    assert main(["--checkpoint", str(trained_run), "--json", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.encode().splitlines()
    assert [json.loads(line)["file"] for line in lines] == paths


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m fastguard.transcribe --checkpoint" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("noise, most", [(0.0, 0.1), (1e-3, 0.3)])
def test_learnt_sentences_between_half_minutes_of_silence(recognizer, prompts, noise, most):
    """Faint noise, 60 dB below the peak, changes more than digital silence does: in training there
    was none before the first word."""
    found, draw = [], torch.Generator().manual_seed(0)
    for path, _ in prompts[:4]:
        speech = load_audio(path, 16_000)
        silence = torch.zeros(30 * 16_000)
        samples = torch.cat([silence, speech, silence])
        samples += noise * speech.abs().max() * torch.randn(len(samples), generator=draw)
        transcriber = Transcriber(recognizer, 16_000)
        words = transcriber.feed(samples) + transcriber.finish()
        assert all(29.9 < word.start < word.end < 30.1 + len(speech) / 16_000 for word in words)
        found.append(" ".join(word.word for word in words))
    assert jiwer.wer([text for _, text in prompts[:4]], found) < most


def test_sounds_without_speech_give_no_words(recognizer, tmp_path):
    time = np.arange(30 * 8_000) / 8_000
    noise = np.random.default_rng(0).standard_normal(len(time))
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    sounds = {"silence": 0 * time, "tone": tone, "noise": 0.1 * noise}
    for name, samples in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 8_000)
        assert transcribe(recognizer, tmp_path / f"{name}.wav").words == []
    assert transcribe(recognizer, tmp_path / "noise.wav", vad=False).words


def test_a_pause_separates_words(recognizer, prompts):
    """Each sentence is recognised by itself, and the model puts no space at its ends."""
    sentences = [load_audio(path, 16_000) for path, _ in prompts[:2]]
    pause = torch.zeros(3 * 16_000)
    transcriber = Transcriber(recognizer, 16_000)
    words = transcriber.feed(torch.cat([sentences[0], pause, sentences[1]]))
    words += transcriber.finish()
    expected = " ".join(text for _, text in prompts[:2])
    assert len(words) == len(expected.split())
    assert jiwer.wer(expected, " ".join(word.word for word in words)) < 0.35
