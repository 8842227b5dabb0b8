"""How the processes of torchrun end when one of them cannot go on: all, soon, and with a cause."""

import pytest

from fastguard.speech.storage import checkpoint
from tests.recordings import tones

from .test_train import metrics
from .test_train_parallel import OPTIONS, REPOSITORY, launch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tones(tmp_path_factory.mktemp("tones"), 8)


def faulty(folder, data, fault, *options):
    """Status and messages of a run with this fault; it must end by itself."""
    program = ["-m", "tests.faults", fault, *OPTIONS, *options, "--data", data]
    process = launch(*program, "--run-dir", str(folder), cwd=REPOSITORY)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


FAULTS = [
    ("memory:step:1", "ddp", "process 1: out of memory: make batches smaller"),
    ("killed:step:1", "ddp", "another process of this run is gone without a message"),
    ("error:evaluation:1", "fsdp", "process 1: ZeroDivisionError: a fault of the program"),
    ("memory:save:0", "ddp", "out of memory: make batches smaller"),
    ("killed:step:0", "fsdp", "another process of this run is gone without a message"),
    ("killed:load:1", "fsdp", "DataLoader worker (pid"),
    ("memory:load:1", "ddp", "tone2.wav could not be loaded: out of memory"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault, kind, cause", FAULTS)
def test_one_process_fails_and_all_end(tmp_path, data, fault, kind, cause):
    options = ("--parallel", kind, "--num-workers", "1")
    status, errors = faulty(tmp_path, data, fault, *options)
    told = [line for line in errors.splitlines() if line.startswith("ERROR - ")]
    assert status == 1, errors
    assert any(cause in line for line in told), errors
    assert len(told) <= 2, errors
    if "load" in fault:  # all were there to write one
        assert checkpoint.load(tmp_path / "last.pt")["batches"] == len(metrics(tmp_path, "step"))
    before, *_ = errors.partition("torch/distributed/elastic")  # torchrun tells of each process
    assert "Traceback" not in before


@pytest.mark.slow
def test_the_survivors_name_the_state_of_the_process_that_is_gone(tmp_path, data):
    status, errors = faulty(tmp_path, data, "killed:step:0", "--checkpoint.steps", "1")
    assert status == 1, errors
    (told,) = [line for line in errors.splitlines() if line.startswith("ERROR - ")]
    assert "another process of this run is gone without a message" in told
    assert told.endswith(f"--run-dir {tmp_path} continues from the state of step 2")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


@pytest.mark.slow
def test_the_log_has_the_traceback_of_any_process(tmp_path, data):
    status, errors = faulty(tmp_path, data, "error:step:1")
    assert status == 1, errors
    log = (tmp_path / "train.log").read_text()
    _, _, after = log.partition("ERROR - process 1: ZeroDivisionError: a fault of the program")
    assert "\nTraceback (most recent call last):\n" in after
    assert 'raise MemoryError if what == "memory" else ZeroDivisionError' in after
