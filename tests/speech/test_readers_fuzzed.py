"""Mutated files: each reader gives what is right, or one line; no traceback, hang or huge memory.

The readers run in this process: what they call in native code (torch's reader of archives,
safetensors, sentencepiece) sees a file only after its checksum was compared.
"""

import dataclasses
import io
import json
import resource
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastguard._random import random_state
from fastguard.optim import AdamW
from fastguard.speech.data.tokenizer import CharTokenizer, tokenizer_from_dict
from fastguard.speech.reporting.html_report import render
from fastguard.speech.reporting.run_history import read
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.config import Config
from fastguard.speech.training.metrics import EpochMetrics, EpochTotals, MetricsFile
from fastguard.speech.training.run_folder import RunError, RunFolder
from fastguard.speech.training.state_schema import check_state

pytestmark = pytest.mark.slow
FUZZED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

#: What JSON, YAML and a checkpoint can hold in the place of anything else.
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([-1, 10**30, "nan", "\ud800", "../../x", 2**63, [[]], {}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
TENSORS = st.sampled_from(
    [torch.ones(2), torch.full((2,), torch.nan), torch.ones(2, dtype=torch.int64), torch.ones(()),
     -torch.ones(2, 3), torch.ones(0)]
)  # fmt: skip


@pytest.fixture(autouse=True)
def _little_memory():
    """Of all examples of a test: not more than 300 MB above what there was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def one_line(error):
    assert 0 < len(str(error)) < 2_000, error
    assert len(str(error).splitlines()) == 1, error


def mutated(draw, value, odd):
    """A copy of nested dicts and lists with one place changed, dropped or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(list(value)))
        return {**value, key: mutated(draw, value[key], odd)}
    if isinstance(value, list | tuple) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        changed = [*value[:place], mutated(draw, value[place], odd), *value[place + 1 :]]
        return type(value)(changed)
    if isinstance(value, dict) and draw(st.booleans()):
        return {**value, draw(st.text(max_size=3)): draw(odd)}
    return draw(odd)


def damaged(draw, content):
    """A copy of bytes with a few overwritten, a piece cut out, or the end missing."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "end", "insert"]))
        if how == "flip" and content:
            content[place] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del content[place : place + draw(st.integers(1, 50))]
        elif how == "end":
            del content[place:]
        else:
            content[place:place] = draw(st.binary(max_size=20))
    return bytes(content)


@pytest.fixture(scope="module")
def run():
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    epoch = EpochMetrics(1, 2, 1.0, 0.5, 0.2, 1.0, 0, 2, 1.0)
    state = {
        "model": dict(model.state_dict()),
        "config": Config().to_dict(),
        "tokenizer": CharTokenizer.from_texts(["abc"]).to_dict(),
        "optimizer": optimizer.state_dict(),
        "guard": {},
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "loader": [{"epoch": 2, "position": 1, "seed": 0}],
        "random": [random_state(torch.device("cpu"))],
        "step": 3,
        "epoch": 1,
        "batches": 1,
        "totals": dataclasses.asdict(EpochTotals(1.5, 1, [2.0], 0.1)),
        "epochs": [dataclasses.asdict(epoch)],
    }
    return state, model, optimizer


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@FUZZED
@given(data=st.data())
def test_damaged_checkpoints_are_named(tmp_path, run, data):
    path = tmp_path / "a.pt"
    whole = saved(run[0])
    path.write_bytes(damaged(data.draw, whole))
    try:
        found = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        one_line(error)
    else:  # what was changed is padding
        assert torch.equal(found["model"]["weight"], run[0]["model"]["weight"])


@FUZZED
@given(data=st.data())
def test_changed_pickles_with_right_checksums_are_named(tmp_path, run, data):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(saved(run[0]))) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = damaged(data.draw, content)
            new.writestr(name, content)
    try:
        checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        one_line(error)


@FUZZED
@given(data=st.data())
def test_changed_states_are_judged(run, data):
    state, model, optimizer = run
    state = mutated(data.draw, state, ODD | TENSORS)
    try:
        if isinstance(state, dict):
            checkpoint.check(state)
            Config.from_dict(state["config"])
            tokenizer_from_dict(state["tokenizer"])
            weights, scaler = model.state_dict(), torch.amp.GradScaler("cpu")
            check_state(state, weights, None, optimizer, scaler, 2, 1)
    except (KeyError, TypeError, ValueError) as error:
        one_line(error)


@FUZZED
@given(data=st.data())
def test_changed_settings_are_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    begun = RunFolder(folder, Config())
    begun.begin()
    begun.close()
    (folder / "metrics.jsonl").touch()
    whole = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").write_bytes(damaged(data.draw, whole))
    again = RunFolder(folder, Config())
    try:
        again.begin()
    except RunError as error:
        assert len(str(error)) < 5_000
        assert len(str(error).splitlines()) == 1
    finally:
        again.close()


@FUZZED
@given(data=st.data())
def test_changed_metrics_make_a_page_and_go_on(tmp_path, data):
    step = {"kind": "step", "step": 1, "epoch": 1, "batch": 0, "loss": 1.0, "grad_norm": 2.0,
            "verdict": "skip_nonfinite", "lr": 0.1, "seconds": 0.5,
            "skipped_utterances": ["a"]}  # fmt: skip
    ended = EpochMetrics(1, 1, 1.0, 0.5, 0.2, 1.0, 0, 2, 1.0)
    epoch = {"kind": "epoch", **dataclasses.asdict(ended)}
    row = {"id": "a", "reference": "a b", "hypothesis": "a", "wer": 0.5, "cer": 0.5}
    bad = {"step": 0, "norms": {"w": 1.0}, "offenders": [{"name": "w", "nans": 1}], "bracket": []}
    lines = [mutated(data.draw, line, ODD) for line in (step, epoch)] + [{**step, "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "hypotheses.jsonl").write_text(json.dumps(mutated(data.draw, row, ODD)) + "\n")
    (tmp_path / "bad_step_000000.json").write_text(json.dumps(mutated(data.draw, bad, ODD)))
    (tmp_path / "config.yaml").write_bytes(damaged(data.draw, Config().to_yaml().encode()))
    (tmp_path / "train.log").write_bytes(data.draw(st.binary(max_size=200)))
    assert "<html" in render([read(tmp_path)])
    MetricsFile(tmp_path / "metrics.jsonl", 5, 5).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()
