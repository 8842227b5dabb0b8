"""Training with torchrun: two processes and one run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint
from tests.recordings import tones, write_manifest

from .test_resume import story
from .test_train import metrics

REPOSITORY = Path(__file__).resolve().parents[3]
OPTIONS = [
    "--model", "baseline", "--guarded", "--precision", "fp32", "--batch-duration", "2",
    "--epochs", "2", "--optim.warmup", "2", "--checkpoint.steps", "1",
]  # fmt: skip


def torchrun(folder, data, *options, processes=2):
    """The finished process of a training on this many CPU processes."""
    program = ["-m", "fastguard.train", *OPTIONS, *options, "--data", data]
    return launch(*program, "--run-dir", str(folder), cwd=folder.parent, processes=processes)


def launch(*program, cwd, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, f"--nproc-per-node={processes}", *program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tones(tmp_path_factory.mktemp("tones"), 8)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def whole(request, tmp_path_factory, data):
    """A run that nothing disturbed: its kind, folder and log."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, folder, finish(torchrun(folder, data, "--parallel", request.param))


def test_two_processes_make_one_run(whole, data):
    _, folder, log = whole
    steps, epochs = metrics(folder, "step"), metrics(folder, "epoch")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]  # 6 utterances, 2 a batch, 2 processes
    assert [(e["epoch"], e["dev_utterances"]) for e in epochs] == [(1, 2), (2, 2)]
    assert log.count("Finished at step 4") == 1
    assert log.count("best.pt is chosen by the CER of 2 dev utterances") == 1
    assert all(float(s["loss"]) < 10 for s in steps)
    state = checkpoint.load(folder / "last.pt")
    assert len(state["random"]) == len(state["loader"]) == 2
    whole_sizes = sorted(p.numel() for p in Recognizer.load(folder / "last.pt").model.parameters())
    moments = state["optimizer"]["state"].values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert sorted(each[name].numel() for each in moments) == whole_sizes
    recognizer = Recognizer.load(folder / "best.pt")
    assert recognizer(torch.zeros(1, 8, 80), torch.tensor([8]))[0].isfinite().all()


def test_killed_and_started_again(whole, data, tmp_path):
    kind, folder, _ = whole
    process = torchrun(tmp_path / "run", data, "--parallel", kind, "--log-every", "1")
    for line in process.stderr:
        if line.startswith("Batch 1:"):
            break
    processes = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, processes)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    finish(torchrun(tmp_path / "run", data, "--parallel", kind))
    assert story(tmp_path / "run") == story(folder)


def test_a_state_of_one_kind_goes_on_as_the_other(whole, data, tmp_path):
    kind, folder, _ = whole
    other = {"ddp": "fsdp", "fsdp": "ddp"}[kind]
    middle = sorted((folder / "checkpoints").glob("step_*.pt"))[-2]
    finish(torchrun(tmp_path / "run", data, "--resume", str(middle), "--parallel", other))
    ours, theirs = metrics(tmp_path / "run", "step")[-1], metrics(folder, "step")[-1]
    assert (ours["step"], ours["lr"]) == (4, theirs["lr"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_another_number_of_processes_begins_the_epoch_anew(whole, data, tmp_path):
    kind, folder, _ = whole
    new = tmp_path / "run"
    middle = sorted((folder / "checkpoints").glob("step_*.pt"))[-2]
    assert checkpoint.load(middle)["batches"] == 1
    log = finish(torchrun(new, data, "--resume", str(middle), "--parallel", kind, processes=1))
    assert "The state is of 2 processes and there are 1: the epoch starts again" in log
    steps = metrics(new, "step")
    assert [s["epoch"] for s in steps] == [2, 2, 2]
    assert json.loads((new / "rates.json").read_text())["utterances"] == 2


LEAVING = """
import sys, time
import torch
from fastguard.speech.training.parallel import Parallel, leave

class Slow:
    def __del__(self):
        time.sleep(1)  # lets the threads that wait go on

with Parallel.start("fsdp") as parallel:
    sys.group = parallel.group  # it outlives destroy_process_group, as in FSDP's mesh
    parallel.wait()
    if parallel.main:
        time.sleep(0.5)
    sys.setswitchinterval(1000)
    torch.distributed.all_reduce(torch.ones(1), async_op=True)
end = time.monotonic() + 3
while time.monotonic() < end:  # gloo's thread is done, and waits for the interpreter
    pass
sys.slow = Slow()
print("finished", file=sys.stderr)
leave(0)
"""


def test_a_process_leaves_while_gloo_holds_a_tensor(tmp_path):
    """With sys.exit in place of leave: terminate called without an active exception."""
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    log = finish(launch(str(script), cwd=tmp_path))
    assert log.count("finished\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_without_a_usable_recording_takes_part(kind, tmp_path):
    """In a step, and in the evaluation, whose longest batch is of one torn recording."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = []
    for i in range(13):
        samples = np.sin(np.arange(16_000) * (0.1 + i / 100)).astype("float32") / 10
        if i in (0, 12):
            samples = np.full(24_000, np.nan, "float32")
        soundfile.write(corpus / f"{i}.wav", samples, 16_000, subtype="FLOAT")
        row = {"audio_filepath": f"{i}.wav", "text": "ab", "split": "train" if i < 4 else "dev"}
        rows.append(row)
    data = write_manifest(corpus / "rows.jsonl", rows)
    options = [
        "--check",
        "header",
        "--batch-size",
        "1",
        "--batch-duration",
        "null",
        "--epochs",
        "1",
    ]
    log = finish(torchrun(tmp_path / "run", data, *options, "--parallel", kind))
    assert "Left out 0.wav" in log
    assert "Left out of the evaluation: 12.wav" in log
    assert metrics(tmp_path / "run", "epoch")[0]["dev_utterances"] == 8


@pytest.mark.slow
def test_an_encoder_that_is_frozen_at_first(whole, data, tmp_path):
    """The state inside the frozen epoch has moments of the head alone."""
    kind, folder, _ = whole
    source = folder / "best.pt"
    options = ["--init-from", str(source), "--freeze-encoder", "1", "--parallel", kind,
               "--optim.schedule", "constant", "--optim.warmup", "0"]  # fmt: skip
    finish(torchrun(tmp_path / "straight", data, *options))
    for steps in ("1", "4"):
        finish(torchrun(tmp_path / "parts", data, *options, "--max-steps", steps))
        if steps == "1":
            state = checkpoint.load(tmp_path / "parts" / "last.pt")
            assert len(state["optimizer"]["state"]) == 2
            theirs = checkpoint.load(source)["model"]
            same = {n for n, value in state["model"].items() if torch.equal(value, theirs[n])}
            assert theirs.keys() - same == {"head.weight", "head.bias"}
    parts, straight = (metrics(tmp_path / name, "step") for name in ("parts", "straight"))
    assert [step["loss"] for step in parts] == [step["loss"] for step in straight]
    assert len(straight) == 4
