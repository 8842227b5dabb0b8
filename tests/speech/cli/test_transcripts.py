"""The formats of ``python -m fastguard.transcribe``, and how far it has come."""

import io
import shutil
import sys
from pathlib import Path

import pysubs2
import pytest

from fastguard.speech.cli.transcribe import main
from tests.recordings import concatenated


def test_subtitles_and_ctm(trained_run, prompts, tmp_path, capsys):
    """pysubs2 reads the subtitles; each format has the words of the text."""
    run, path = ["--checkpoint", str(trained_run)], prompts[0][0]
    assert main([*run, path]) == 0
    text = capsys.readouterr().out.split()
    for kind in ("srt", "vtt"):
        assert main([*run, "--format", kind, path]) == 0
        read = pysubs2.SSAFile.from_string(capsys.readouterr().out, format_=kind)
        assert " ".join(line.plaintext for line in read).split() == text
    assert main([*run, "--format", "ctm", *(path for path, _ in prompts[:2])]) == 0
    fields = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [field[4] for field in fields[: len(text)]] == text
    assert {field[0] for field in fields} == {Path(path).stem for path, _ in prompts[:2]}


def test_a_file_for_each_recording(trained_run, prompts, tmp_path, capsys):
    run, (a, b) = ["--checkpoint", str(trained_run), "--format", "srt"], [p for p, _ in prompts[:2]]
    assert main([*run, a, b]) == 2
    assert "srt of several recordings needs files: add --output-dir" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main([*run, "--output-dir", str(out), a, b]) == 0
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{Path(path).stem}.srt" for path in (a, b)
    )
    (tmp_path / "twin").mkdir()
    shutil.copy(a, tmp_path / "twin")
    twin = tmp_path / "twin" / Path(a).name
    assert main([*run, "--output-dir", str(out), a, str(twin)]) == 1
    assert "would both be written to" in capsys.readouterr().err


def test_one_long_recording_shows_its_progress(trained_run, prompts, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seconds = concatenated(prompts, tmp_path / "long.wav", 2)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert main(["--checkpoint", str(trained_run), str(tmp_path / "long.wav")]) == 0
    assert f"/{seconds:.0f} s [" in shown.getvalue()


@pytest.mark.parametrize("seconds", ["4", "nan", "1e9"])
def test_odd_windows_are_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["--window", seconds, "a.wav"])
    assert f"between 5 and 600 seconds, got {seconds}" in capsys.readouterr().err
