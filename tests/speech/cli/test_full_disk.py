"""Results that find no room, or a link in their place: one line, status 1, nothing is harmed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.diagnose import __main__ as diagnose
from fastguard.speech.cli import evaluate, export, report
from tests.recordings import tones
from tests.soak import small_disk
from tests.speech.cli.test_diagnose import save

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run: a model that was never trained, and its corpus."""
    folder = tmp_path_factory.mktemp("run")
    save(folder / "last.pt", tones(folder), "--model", "baseline", "--precision", "fp32")
    step = {"kind": "step", "step": 1, "epoch": 1, "batch": 0, "loss": 1.0, "grad_norm": 2.0,
            "verdict": "apply", "lr": 0.1, "seconds": 0.5}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    return folder


@pytest.fixture
def full(tmp_path):
    """A folder on a disk without room; or, where none can be mounted, no file gets any longer."""
    with small_disk(tmp_path / "disk", 1) as mounted:
        folder = tmp_path / "disk" / "out"
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_text("old")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if mounted:
            with pytest.raises(OSError, match="Errno 28"), open(folder / "filler", "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NAMES = ("rates.json", "hypotheses.jsonl", "changed_labels.jsonl", "model.pt2", "model.onnx",
         "model.int8.onnx", "model.safetensors", "model.json", "page.html",
         "found.json")  # fmt: skip
COMMANDS = {
    "evaluate": (evaluate.main, "--split", "train", "--output", "{}"),
    "report": (report.main, "--output", "{}/page.html"),
    "diagnose": (diagnose.main, "--json", "{}/found.json"),
    "export torch": (export.main, "--format", "torch", "--output", "{}"),
    "export onnx": (export.main, "--format", "onnx", "--output", "{}"),
    "export int8": (export.main, "--format", "int8", "--output", "{}"),
    "export safetensors": (export.main, "--format", "safetensors", "--output", "{}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(run, full, name, capsys):
    main, *options = COMMANDS[name]
    if name.startswith("export"):
        for package in export.PACKAGES[name.split()[1]]:
            pytest.importorskip(package)
    assert main([str(run), *(option.format(full) for option in options)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert told[0].startswith("error: ")
    left = {path.name: path.read_text() for path in full.iterdir() if path.name != "filler"}
    assert left == dict.fromkeys(NAMES, "old")


@pytest.mark.slow
def test_a_transcript_that_finds_no_room(run, full):
    command = ["-m", "fastguard.transcribe", "--checkpoint", str(run), str(run / "tone0.wav")]
    with open(full / "filler", "ab") as output:
        done = subprocess.run(
            [sys.executable, *command, "--json"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 2")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "main, options, name",
    [
        (evaluate.main, ["--split", "train"], "evaluation-train-greedy"),
        (export.main, ["--format", "torch"], "exported"),
    ],
)
def test_results_do_not_leave_the_run_by_a_link(run, tmp_path, main, options, name, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.pt2").write_text("precious")
    (run / name).symlink_to(tmp_path / "mine")
    assert main([str(run), *options]) == 1
    assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["precious"]
