"""What a terminal, a pipe and a log are shown of hostile text, whatever their encoding."""

import ast
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from fastguard.__main__ import COMMANDS, main
from fastguard._io import terminal
from fastguard.speech.cli import evaluate, train
from fastguard.speech.training.metrics import log_to

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "a\x1b[2J\x07b\u202ec\x9b31md\u2066e\x7ff\u2028g\rh"
SHOWN = "a\\u001b[2J\\u0007b\\u202ec\\u009b31md\\u2066e\\u007ff\\u2028g\\u000dh"
CYRILLIC = "привет, мир"


def nothing_hidden(text):
    return all(c in "\n\t" or unicodedata.category(c)[0] not in "C" for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("two\n\tlines", "two\n\tlines"),
        (f"naïve {CYRILLIC} 日本語 한국어 \u00a0é", f"naïve {CYRILLIC} 日本語 한국어 \u00a0é"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),  # spelled with joiners
        ("\udcff \U000e0041", "\\udcff \\udb40\\udc41"),  # no name of a file; a tag
    ],
)
def test_visible(text, shown):
    assert terminal.visible(text) == shown


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_lines_of_json_stay_json_in_every_encoding(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    values = {"text": f"é {CYRILLIC} 👩 {HOSTILE}"}
    assert terminal.command(lambda: print(json.dumps(values, ensure_ascii=False)))() is None
    assert sys.stdout is stream
    stream.flush()
    assert json.loads(stream.buffer.getvalue().decode(encoding)) == values


def test_a_progress_bar_is_drawn(capfd, monkeypatch):
    """In what tqdm writes are carriage returns, alone and at both ends."""
    shown = terminal._Visible(sys.stderr)
    for text in ("\rreading: 5%|", "\r   \r", "\r", "\x1b[A", f"x{HOSTILE}"):
        shown.write(text)
    said = capfd.readouterr().err
    assert said.startswith("\rreading: 5%|\r   \r\r")
    assert said.endswith(f"x{SHOWN}")


MAINS = {
    "train": ["--data", HOSTILE, "--max-steps", "1"],
    "evaluate": [HOSTILE],
    "transcribe": ["--checkpoint", HOSTILE, "x.wav"],
    "report": [HOSTILE],
    "diagnose": [HOSTILE],
    "export": [HOSTILE],
    "gpucheck": ["--device", HOSTILE],
    "env": None,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_what_is_hidden(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = (ROOT / "fastguard" / name).is_dir()
    place = f"fastguard.{name}.__main__" if package else f"fastguard.{name}"
    command = importlib.import_module(place).main
    assert hasattr(command, "__wrapped__"), "decorate it with fastguard._io.terminal.command"
    if MAINS[name] is None:
        return
    try:
        status = command(MAINS[name])
    except SystemExit as end:
        status = end.code
    finally:
        log_to(None)
    said = "".join(capsys.readouterr())
    assert status in (1, 2)
    assert "[2J" in said and nothing_hidden(said)
    assert all(
        nothing_hidden(log.read_text(encoding="utf-8")) for log in tmp_path.rglob("train.log")
    )


def test_a_traceback_hides_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    @terminal.command
    def fails():
        raise ZeroDivisionError(HOSTILE)

    with pytest.raises(ZeroDivisionError) as error:
        fails()
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert SHOWN in said and nothing_hidden(said)


def test_the_log_hides_nothing(tmp_path, capsys):
    log_to(tmp_path / "train.log")
    try:
        logging.getLogger("fastguard.x").warning("skipped %s, %s", HOSTILE, CYRILLIC)
    finally:
        log_to(None)
    logged = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert logged == f"WARNING - skipped {SHOWN}, {CYRILLIC}\n"


FORGED = "run\nERROR - all is lost\x1b[2J"


def test_a_file_name_forges_no_line_of_a_log(tmp_path):
    log_to(tmp_path / "train.log")
    try:
        logging.getLogger("fastguard.x").warning("%s holds %d", Path(FORGED), 3)
        logging.getLogger("fastguard.x").info("a table\n%s", "of two lines")
    finally:
        log_to(None)
    logged = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert logged == [
        "WARNING - run\\u000aERROR - all is lost\\u001b[2J holds 3",
        "a table",
        "of two lines",
    ]


def test_a_file_name_forges_no_error(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / FORGED)]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {tmp_path}/run\\u000aERROR - all is lost\\u001b[2J")


def test_the_log_tells_of_a_run_folder_in_one_line(tmp_path, capsys):
    folder = tmp_path / FORGED
    assert train.main(["--data", "manifest:absent", "--run-dir", str(folder)]) == 1
    logged = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    told = capsys.readouterr().err.splitlines()
    assert not [line for line in (*logged, *told) if line.startswith("ERROR - all is lost")]
    assert any("run folder: " in line for line in logged)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, C_LOCALE])
def test_a_stream_that_lacks_the_letters(environment, tmp_path):
    name = os.fsencode(tmp_path) + b"/" + CYRILLIC.encode()
    done = subprocess.run(
        [sys.executable, "-m", "fastguard.report", name], cwd=ROOT, capture_output=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    escaped = CYRILLIC.encode("ascii", "backslashreplace")
    as_bytes = CYRILLIC.encode().decode("ascii", "surrogateescape")
    assert escaped in done.stderr or terminal.visible(as_bytes).encode() in done.stderr


def opens(tree):
    """Calls of open, read_text and write_text of what may be text, without an encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        of = function.value if isinstance(function, ast.Attribute) else None
        if getattr(of, "id", "") in ("os", "files", "zipfile", "archive", "soundfile", "tarfile"):
            continue  # of bytes, or with an encoding of their own
        keywords = {keyword.arg for keyword in node.keywords}
        strings = [a.value for a in node.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(s, str) and "b" in s and len(s) < 4 for s in strings)
        texts = {"read_text": 0, "write_text": 1}
        short = name in texts and of is not None and len(node.args) <= texts[name]
        if "encoding" not in keywords and (short or (name == "open" and not binary)):
            yield node


def test_text_files_are_opened_with_their_encoding():
    """Else it is the locale's: cp1252 on Windows, ASCII under LC_ALL=C."""
    found = []
    tools = [p for p in ROOT.glob("tests/**/*.py") if not p.name.startswith("test_")]
    for path in [*ROOT.glob("fastguard/**/*.py"), *ROOT.glob("bench/**/*.py"), *tools]:
        for node in opens(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:70]}")
    assert found == []


# --- python -m fastguard ------------------------------------------------------------------------


def test_the_commands_are_listed(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    modules = [*ROOT.glob("fastguard/*.py"), *ROOT.glob("fastguard/*/__main__.py")]
    runnable = {
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in modules
        if "\nif __name__ == " in path.read_text(encoding="utf-8")
    }
    assert set(COMMANDS) == runnable - {"fastguard"}
    for name in COMMANDS:
        assert f"\n  {name} " in said


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian", "--help"]) == 2
    assert capsys.readouterr().err == "error: unknown command trian; did you mean train?\n"
    assert main([HOSTILE]) == 2
    said = capsys.readouterr().err
    assert SHOWN in said and "there are train, evaluate, " in said and nothing_hidden(said)


def test_a_command_is_passed_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m fastguard"])
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--help"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith("usage: python -m fastguard.evaluate")
