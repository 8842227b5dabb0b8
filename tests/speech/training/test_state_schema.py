"""A state is judged whole before a run goes on from it, and what is wrong with it is named."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from fastguard._random import random_state
from fastguard.optim import AdamW
from fastguard.speech.cli.train import main
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.metrics import EpochMetrics, EpochTotals
from fastguard.speech.training.state_schema import check_state
from tests.recordings import tones


@pytest.fixture(scope="module")
def run():
    """A model, its optimizer after a step, and the state of a run in its second epoch."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    place = {"epoch": 2, "position": 1, "seed": 0, "batch_duration": None, "shuffle": True}
    epoch = EpochMetrics(1, 2, math.nan, 0.5, 0.2, math.inf, 0, 2, 1.0)
    state = {
        "model": model.state_dict(),
        "ema": {"module": torch.ones(3)},
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "loader": [place],
        "random": [random_state(torch.device("cpu"))],
        "step": 3,
        "epoch": 1,
        "batches": 1,
        "totals": dataclasses.asdict(EpochTotals(1.5, 1, [2.0], 0.1)),
        "epochs": [dataclasses.asdict(epoch)],
    }
    return state, model, optimizer


def judge(run, change=lambda state: None, ranks=1):
    state, model, optimizer = run
    state = copy.deepcopy(state)
    change(state)
    average, scaler = {"module": torch.ones(3)}, torch.amp.GradScaler("cpu")
    check_state(state, model.state_dict(), average, optimizer, scaler, 2, ranks)


def put(*path_and_value):
    """A change of a state: the last is the value at the place that the others name."""
    *path, key, value = path_and_value

    def change(state):
        for step in path:
            state = state[step]
        state[key] = value

    return change


def test_a_state_of_a_run_is_one(run):
    judge(run)
    judge(run, put("batches", 90), ranks=2)  # of another number of processes: the epoch begins anew


def test_names_serve_as_numbers(run):
    """As FSDP's states have them."""

    def rename(state):
        moments = state["optimizer"]
        moments["state"] = {f"p{n}": entry for n, entry in moments["state"].items()}
        moments["param_groups"][0]["params"] = [f"p{n}" for n in range(4)]

    judge(run, rename)


NAN = torch.tensor([math.nan, 1.0])


@pytest.mark.parametrize(
    "change, reason",
    [
        (put("model", "0.bias", NAN), "model: 0.bias has NaN or Inf"),
        (put("model", "0.bias", torch.ones(3)), "0.bias must be torch.float32 of shape (2,)"),
        (put("model", "0.bias", torch.ones(1).expand(2).double()), "got torch.float64"),
        (put("model", "0.bias", [1.0, 2.0]), "0.bias is a list, not a tensor"),
        (put("model", "extra", NAN), "'extra'"),
        (put("model", None), "model: the weights are None, not a dict"),
        (put("ema", {}), "ema: 1 weights are missing"),
        (put("optimizer", []), "optimizer is a list, not a dict"),
        (put("optimizer", "param_groups", []), "or has another length"),
        (put("optimizer", "param_groups", 0, "params", [0]), "has other parameters"),
        (put("optimizer", "param_groups", 0, "params", [[], 1, 2, 3]), "neither numbers nor names"),
        (put("optimizer", "param_groups", 0, "maximize", True), "'maximize' is True"),
        (put("optimizer", "param_groups", 0, "amsgrad", True), "'amsgrad' is True"),
        (put("optimizer", "param_groups", 0, "unknown", 1), "'unknown' is 1"),
        (put("optimizer", "state", 9, {}), "state of 9, which is not a parameter"),
        (put("optimizer", "state", 1, {}), "does not have the entries of AdamW"),
        (put("optimizer", "state", 1, None), "state of parameter 1 is None"),
        (put("optimizer", "state", 1, "exp_avg", torch.ones(3)), "exp_avg of parameter 1 must be"),
        (put("optimizer", "state", 1, "exp_avg", NAN), "exp_avg of parameter 1 has NaN"),
        (put("optimizer", "state", 1, "exp_avg_sq", -torch.ones(2)), "parameter 1 is below 0"),
        (put("optimizer", "state", 1, "step", torch.tensor(-1.0)), "parameter 1 is below 0"),
        (put("optimizer", "state", 1, "step", 1), "step of parameter 1 must be a float32 tensor"),
        (put("scaler", None), "scaler is None"),
        (put("scaler", "scale", math.inf), "scale must be finite and above 0"),
        (put("scaler", "growth_factor", 0.5), "below 1 and growth_factor above 1"),
        (put("scaler", "_growth_tracker", -1), "_growth_tracker must be an integer from 0"),
        (put("loader", {}), "loader is a dict"),
        (put("loader", [1]), "loader is 1, not a dict"),
        (put("loader", 0, "position", -1), "loader: position must be"),
        (put("loader", 0, "position", 0), "position 0 is not batch 1 of epoch 2"),
        (put("loader", 0, "epoch", 7), "epoch 7, position 1 is not batch 1 of epoch 2"),
        (put("loader", 0, "seed", [1]), "loader: 'seed' is a list"),
        (put("random", []), "random is a list"),
        (put("random", 0, "python", (3, (1, 2), None)), "random: it is not a state of a generator"),
        (put("random", 0, "python", []), "not a state of a generator: python's is a list"),
        (put("random", 0, "python", {}), "not a state of a generator: python's is a dict"),
        (put("random", 0, "numpy", {}), "not a state of a generator: numpy's is a dict"),
        (put("random", 0, "numpy", ("MT19937", torch.ones(2), 1, 0, 0.0)), "numpy's must have 624"),
        (put("random", 0, "numpy", ("MT19937", [1] * 624, 1, 0, 0.0)), "numpy's must have 624"),
        (put("random", 0, "numpy", None), "not a state of a generator: numpy's is None"),
        (put("random", 0, "numpy", ("MT19937", torch.ones(624), 10**6, 0, 0.0)), "0 and 624"),
        (put("random", 0, "torch", torch.ones(5)), "random: it is not a state of a generator"),
        (put("step", -1), "step must be an integer from 0"),
        (put("step", True), "step must be an integer from 0"),
        (put("step", 10**100_000), "an integer of 332193 bits"),
        (put("batches", -3), "batches must be an integer from 0"),
        (put("batches", 3), "batches must be an integer from 0 to 2"),
        (put("totals", "accepted", 2), "totals.accepted is 2 of 1 steps"),
        (put("totals", "norms", ["a"]), "totals.norms[0] must be of type float"),
        (put("totals", "extra", 1), "unknown field totals.extra"),
        (put("totals", "seconds", math.nan), "totals.seconds must be finite"),
        (put("epochs", []), "epochs is a list, or its length"),
        (put("epochs", 0, "epoch", 2), "epochs[0] is of epoch 2"),
        (put("epochs", 0, "wer", "low"), "epochs[0].wer must be of type float, got 'low'"),
        (put("epochs", 0, {}), "epochs[0].epoch is missing"),
        (put("epochs", 0, "step", 9), "epochs[0].step must be an integer from 0 to 3"),
        (lambda state: state.pop("totals"), "it lacks 'totals'"),
        (lambda state: state["scaler"].pop("scale"), "it lacks 'scale'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_state_is_named(run, change, reason):
    with pytest.raises((TypeError, ValueError)) as caught:
        judge(run, change)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "change, reason",
    [
        (put("epochs", [None]), "epochs[0] must be a dict, got None"),
        (put("guard", "steps", -1), "negative"),
        (put("guard", []), "no state of a GradGuard"),
        (put("tokenizer", {}), "no tokenizer: 'symbols'"),
        (put("tokenizer", "symbols", [["a"]]), "not a list of strings"),
        (
            put("tokenizer", {"kind": "sentencepiece", "model": torch.ones(3)}),
            "not a tensor of bytes",
        ),
    ],
)
def test_a_run_names_it_before_it_trains(a_run, tmp_path, capsys, change, reason):
    options, state = a_run
    state = copy.copy(state)
    state |= {key: copy.deepcopy(state[key]) for key in ("guard", "tokenizer")}
    change(state)
    checkpoint.save(tmp_path / "bad.pt", state)
    new = ["--run-dir", str(tmp_path / "new"), "--resume", str(tmp_path / "bad.pt"),
           "--max-steps", "2"]  # fmt: skip
    assert main([*options, *new]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ERROR - the state ")
    assert reason in last
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ["--model", "baseline", "--stable", "--precision", "fp32", "--max-steps", "1",
               "--data", tones(folder)]  # fmt: skip
    assert main([*options, "--run-dir", str(folder / "run")]) == 0
    return options, checkpoint.load(folder / "run" / "last.pt")
