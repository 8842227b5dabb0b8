"""``python -m fastguard.transcribe --streaming``: the words of a file, while it is read."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.cli.transcribe import main
from fastguard.speech.data.features import load_audio
from fastguard.speech.recognition.transcription import Transcriber, transcribe
from tests.recordings import concatenated

ROOT = Path(__file__).resolve().parents[3]


def raw(path, rate):
    return (32768 * load_audio(path, rate).numpy()).clip(-32768, 32767).astype("<i2").tobytes()


def feed_stdin(monkeypatch, data):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("chunk", ["0.1", "0.37", "1", "60"])
def test_a_file_has_the_text_that_it_has_offline(trained_run, prompts, capsys, chunk):
    run, path = ["--checkpoint", str(trained_run)], prompts[1][0]
    assert main([*run, path]) == 0
    offline = capsys.readouterr().out
    assert offline.strip()
    assert main([*run, "--streaming", "--chunk", chunk, path]) == 0
    assert capsys.readouterr().out == offline


def test_a_longer_recording_too_and_words_come_before_its_end(recognizer, prompts, tmp_path):
    """Every word is final within two windows after it ends, at the same time as in the file."""
    concatenated(prompts, tmp_path / "long.wav", 1)
    window = 6.0
    whole = transcribe(recognizer, tmp_path / "long.wav", segment_seconds=window)
    samples = torch.from_numpy(soundfile.read(tmp_path / "long.wav", dtype="float32")[0])
    transcriber, found, latest = Transcriber(recognizer, 8_000, window_seconds=window), [], 0.0
    for block in samples.split(4_000):
        words = transcriber.feed(block)
        latest = max([latest, *(transcriber.seconds_read - word.end for word in words)])
        found += words
    assert len(found) > 0.8 * len(whole.words)
    assert 0.5 < latest <= 2 * window
    found += transcriber.finish()
    assert [word.word for word in found] == [word.word for word in whole.words]
    assert [word.start for word in found] == [word.start for word in whole.words]


def test_partial_words_follow_the_speech_and_end_as_the_final_ones(recognizer, prompts):
    path, _ = prompts[1]
    samples = load_audio(path, 16_000)
    transcriber = Transcriber(recognizer, 16_000)
    seen = []
    for block in samples.split(4_000):
        assert transcriber.feed(block) == []
        seen.append(len(transcriber.partial()))
    assert seen[-1] > seen[0]
    assert any(0 < number < seen[-1] for number in seen)
    assert transcriber.partial() == transcriber.finish()


def test_json_says_which_words_are_final(trained_run, prompts, capsys):
    run, path = ["--checkpoint", str(trained_run), "--streaming", "--json"], prompts[1][0]
    assert main([*run, "--chunk", "0.25", path]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["final"] for line in lines[-2:]] == [False, True]
    assert lines[-2]["words"] == lines[-1]["words"]
    assert len(lines) > 3


@pytest.mark.parametrize("kind", ["raw", "PCM_16", "PCM_24", "PCM_32", "PCM_U8"])
def test_standard_input(trained_run, prompts, tmp_path, monkeypatch, capsys, kind):
    run, path = ["--checkpoint", str(trained_run)], prompts[1][0]
    samples, rate = soundfile.read(path)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="PCM_16" if kind == "raw" else kind)
    assert main([*run, str(tmp_path / "a.wav")]) == 0
    offline = capsys.readouterr().out
    options = ["--raw-rate", str(rate)] if kind == "raw" else []
    data = raw(path, rate) if kind == "raw" else (tmp_path / "a.wav").read_bytes()
    feed_stdin(monkeypatch, data)
    assert main([*run, "--streaming", *options, "-"]) == 0
    assert capsys.readouterr().out == offline


def test_final_words_are_printed_before_the_stream_ends(trained_run, recognizer, prompts):
    """A pipe that stays open, as of a microphone: the sentence comes before the end."""
    command = [sys.executable, "-m", "fastguard.transcribe", "--checkpoint", str(trained_run)]
    command += ["--streaming", "--window", "5", "--raw-rate", "16000", "-"]
    speech = raw(prompts[1][0], 16_000)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, env=environment) as process:
        written = threading.Thread(target=process.stdin.write, args=(speech + bytes(20 * 32_000),))
        written.start()
        line = process.stdout.readline()  # the stream is still open
        written.join()
        process.stdin.close()
        rest = process.stdout.read()
    assert process.returncode == 0
    transcriber = Transcriber(recognizer, 16_000, window_seconds=5.0)
    samples = torch.from_numpy(np.frombuffer(speech + bytes(640_000), "<i2") / np.float32(32768))
    words = transcriber.feed(samples) + transcriber.finish()
    assert (line + rest).decode().split() == [word.word for word in words]
    assert line.split()


def test_a_terminal_shows_words_that_may_change(trained_run, prompts, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    run = ["--checkpoint", str(trained_run), "--streaming", "--chunk", "0.25"]
    assert main([*run, prompts[1][0]]) == 0
    text = capsys.readouterr().out.strip()
    lines = [line.strip() for line in shown.getvalue().split("\r")]
    assert text in lines
    assert any(line and line != text for line in lines)
    assert lines[-1] == ""


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "cannot be read as a WAV stream: it ends in its header; give raw PCM"),
        (b"no sound, and more than a header", "cannot be read as a WAV stream: file does not"),
    ],
)
def test_streams_that_cannot_be_read(trained_run, monkeypatch, capsys, data, message):
    feed_stdin(monkeypatch, data)
    assert main(["--checkpoint", str(trained_run), "--streaming", "-"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: -: {message}")


def test_a_stream_that_is_cut_off(trained_run, prompts, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", np.zeros(32_000), 16_000)
    feed_stdin(monkeypatch, (tmp_path / "a.wav").read_bytes()[:40_000])
    assert main(["--checkpoint", str(trained_run), "--streaming", "-"]) == 1
    assert "cut off: 1.25 s of the 2.00 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--chunk", "1", "a.wav"], "--chunk needs --streaming"),
        (["--raw-rate", "8000", "-"], "--raw-rate needs --streaming"),
        (["--streaming", "a.wav", "b.wav"], "--streaming takes one recording"),
        (["--streaming", "--raw-rate", "8000", "a.wav"], "give - as the file"),
        (["--streaming", "--format", "srt", "a.wav"], "prints text or json"),
        (["--streaming", "--chunk", "0", "a.wav"], "between 0.1 and 60 seconds, got 0"),
        (["--streaming", "--channel", "each", "a.wav"], "--channel each does not work"),
    ],
)
def test_options_that_contradict_each_other(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
