"""The states and the best weights that a run keeps in its folder."""

import json
import math
import os

import pytest
import torch

from fastguard.speech.recognition.evaluation import Evaluation, score
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.config import CheckpointConfig
from fastguard.speech.training.ranking import NAME_OF_BEST, Rank, comparable
from fastguard.speech.training.run_folder import RunError

from .folders import begun, names, of_wer, state


def test_the_last_states_are_kept_and_the_newest_is_found(tmp_path):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_last=2))
    for step in (1, 2, 10):
        folder.save(state(step))
    assert names(folder) == ["last.pt", "step_000000002.pt", "step_000000010.pt"]
    assert folder.find_state()["step"] == 10
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 10


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(tmp_path, damage, caplog):
    folder = begun(tmp_path)
    for step in (1, 2):
        folder.save(state(step))
    newest = tmp_path / "checkpoints" / "step_000000002.pt"
    whole = newest.read_bytes()
    newest.unlink()  # last.pt is another name of the same file
    if damage == "foreign":
        torch.save({"weights": torch.ones(2)}, newest)
    else:
        newest.write_bytes(whole[:300] if damage == "truncated" else b"")
    assert folder.find_state()["step"] == 1
    assert str(newest) in caplog.text
    assert "using the state before it" in caplog.text


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_state_does_not_count_among_those_to_keep(tmp_path, keep_last):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_last=keep_last))
    folder.save(state(1))
    (tmp_path / "checkpoints" / "step_000000100.pt").write_bytes(b"torn")
    for step in (2, 3):
        folder.save(state(step))
        assert folder.find_state()["step"] == step
    kept = [f"step_{step:09d}.pt" for step in (2, 3)]
    assert names(folder) == ["last.pt", *kept[-keep_last:]]


def test_what_a_crash_left_half_written_is_removed(tmp_path):
    begun(tmp_path)
    (tmp_path / "checkpoints" / "step_000000005.pt.tmp").write_bytes(b"half")
    assert begun(tmp_path).find_state() is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_weights_that_are_not_finite_replace_nothing(tmp_path, caplog):
    folder = begun(tmp_path)
    folder.save(state(1))
    folder.save(state(2, math.nan))
    folder.save_best({**state(2), "model": {"w": torch.tensor(math.inf)}}, of_wer(0.1))
    assert folder.find_state()["step"] == 1
    assert folder.best() == []
    assert "No checkpoint at step 2, training continues" in caplog.text


def test_a_full_disk_is_said_and_keeps_the_last_good_state(tmp_path, caplog, monkeypatch):
    folder = begun(tmp_path)
    folder.save(state(1))
    before = names(folder)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    folder.save(state(2))
    folder.save_best(state(2), of_wer(0.5))
    folder.save_averaged(state(2), of_wer(0.1))
    assert caplog.text.count("No space left on device") == 3
    assert not (tmp_path / "rates.json").exists()
    assert names(folder) == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert folder.find_state()["step"] == 1


def test_the_best_are_kept_by_wer_then_by_loss_then_by_age(tmp_path):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_best=3))
    for step, loss in enumerate((0.5, math.nan, 0.2, 0.3, 0.2, 0.1), start=1):
        folder.save_best(state(step, loss=loss), of_wer(0.4 if step == 6 else 0.3))
    assert [checkpoint.load(path)["step"] for path in folder.best()] == [3, 5, 4]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 3


@pytest.mark.parametrize(("utterances", "best"), [(19, 2), (20, 1)])
def test_few_utterances_are_compared_by_cer(tmp_path, utterances, best):
    """Step 1 has one word right, step 2 all letters except one in each word."""
    folder = begun(tmp_path)
    for step, recognised in (1, "abcd"), (2, "abcx efgx"):
        rows = [score(f"utt{i}", "abcd efgh", recognised) for i in range(utterances)]
        found = Evaluation(rows)
        rates = {"wer": found.rates.wer, "cer": found.rates.cer}
        folder.save_best({**state(step), **rates}, found)
    assert checkpoint.load(tmp_path / "best.pt")["step"] == best


@pytest.mark.parametrize("words", [1, 8, 100])
def test_a_cer_of_few_words_is_compared_in_steps_of_its_standard_error(words):
    step = 0.5 / math.sqrt(words)
    rates = [comparable(1.0, cer, 19, words) for cer in (0.0, 0.4 * step, 0.6 * step, 1.4 * step)]
    assert rates == pytest.approx([0.0, 0.0, step, step])
    assert comparable(0.3, 0.1, 20, words) == 0.3
    assert comparable(math.nan, math.inf, 2, 0) == math.inf
    assert math.isnan(comparable(math.nan, math.nan, 2, 0))


def test_a_better_mean_of_few_utterances_is_not_replaced(tmp_path):
    folder = begun(tmp_path)
    for step, mean, rate in (1, False, 0.5), (1, True, 0.2), (2, False, 0.4):
        found = of_wer(rate, utterances=2)
        save = folder.save_averaged if mean else folder.save_best
        save({**state(step, float(mean)), "wer": 0.0, "cer": found.rates.cer}, found)
    assert checkpoint.load(tmp_path / "best.pt")["model"]["w"].tolist() == [1.0] * 4


def test_the_best_are_kept_in_the_order_of_wer(tmp_path):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_best=2))
    for step, wer in enumerate((0.5, 0.9, 0.5, 0.3, 0.4), start=1):
        folder.save_best(state(step), of_wer(wer))
    assert [checkpoint.load(path)["step"] for path in folder.best()] == [4, 5]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 4


def test_the_best_are_ordered_as_numbers_and_nan_comes_last(tmp_path):
    folder = begun(tmp_path)
    for name in ("nan_loss_1.000000_000000001", "10.000000_loss_1.000000_000000002",
                 "2.500000_loss_inf_000000003"):  # fmt: skip
        (tmp_path / "checkpoints" / f"best_{name}.pt").touch()
    assert [path.name.split("_")[1] for path in folder.best()] == ["2.500000", "10.000000", "nan"]


def test_a_run_killed_before_best_is_written_writes_it_when_it_repeats_the_epoch(tmp_path):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_best=1))
    folder.save_best(state(1), of_wer(0.5))
    (tmp_path / "best.pt").unlink()
    folder.save_best(state(1), of_wer(0.5))
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 1
    folder.save_best(state(1), of_wer(0.3))  # on a GPU it need not come out the same
    assert [path.name for path in folder.best()] == ["best_0.300000_loss_1.000000_000000001.pt"]


def test_files_of_older_versions_are_ranked_after_others_of_their_wer(tmp_path):
    folder = begun(tmp_path)
    for name in ("0.500000_000000001", "0.400000_000000002", "0.500000_loss_9.000000_000000003"):
        (tmp_path / "checkpoints" / f"best_{name}.pt").touch()
    assert [int(path.stem[-1]) for path in folder.best()] == [2, 3, 1]
    folder.save_best(state(4), of_wer(0.6))
    assert len(folder.best()) == 4


@pytest.mark.parametrize("rate", [0.0, 1 / 3, 1.0, 1e9, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("loss", [-1e-9, 0.0, 2 / 3, 1e12, math.inf, math.nan])
def test_a_rank_is_read_from_the_name_that_it_gives(rate, loss):
    rank = Rank(rate, loss, 7)
    assert NAME_OF_BEST.fullmatch(rank.name)
    again = Rank.from_name(rank.name)
    assert again.name == rank.name
    assert not again < rank
    assert not rank < again


def test_more_epochs_do_not_replace_a_better_mean(tmp_path):
    folder = begun(tmp_path)
    folder.save_best({**state(1), "wer": 0.5}, of_wer(0.5))
    folder.save_averaged({**state(1, 2.0), "wer": 0.2}, of_wer(0.2))
    folder.save_best({**state(2, 3.0), "wer": 0.4}, of_wer(0.4))
    assert checkpoint.load(tmp_path / "best.pt")["wer"] == 0.2
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates["wer"] == pytest.approx(0.2)
    assert rates["long"] == {"utterances": 20, "words": 200, "wer": rates["wer"]}
    folder.save_best({**state(3, 4.0), "wer": 0.1}, of_wer(0.1))
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 3


def test_a_damaged_one_of_the_best_is_left_out_of_their_mean(tmp_path, caplog):
    folder = begun(tmp_path)
    for step in (1, 2, 3):
        folder.save_best(state(step), of_wer(step / 10))
    damaged = folder.best()[1]
    damaged.write_bytes(damaged.read_bytes()[:300])
    found = folder.best_weights(state(1)["model"])
    assert [weights["step"] for weights in found] == [1, 3]
    assert f"{damaged} cannot be read" in caplog.text


def test_the_mean_of_the_best(tmp_path):
    folder = begun(tmp_path)
    for step, value in ((1, 1.0), (2, 4.0)):
        weights = {"w": torch.full((2,), value), "n": torch.tensor(step)}
        folder.save_best({**state(step), "model": weights}, of_wer(step / 10))
    mean = checkpoint.average(folder.best_weights(weights))
    assert mean["model"]["w"].tolist() == [2.5, 2.5]
    assert mean["model"]["n"] == 1
    folder.save_averaged(mean, of_wer(0.1))
    assert checkpoint.load(tmp_path / "best.pt")["model"]["w"].tolist() == [1.0, 1.0]
    folder.save_averaged(mean, of_wer(0.0))
    assert checkpoint.load(tmp_path / "best.pt")["model"]["w"].tolist() == [2.5, 2.5]


@pytest.mark.parametrize("step", [-1, "1", 1.0, True, None, 10**18])
def test_a_state_of_a_step_that_is_none_is_refused(tmp_path, step):
    checkpoint.save(tmp_path / "a.pt", {**state(1), "step": step})
    with pytest.raises(RunError, match="not a number of steps"):
        begun(tmp_path / "new", resume=str(tmp_path / "a.pt"))


def test_weights_of_another_model_are_left_out_of_the_mean(tmp_path, caplog):
    folder = begun(tmp_path)
    folder.save_best(state(1), of_wer(0.5))
    for step, model in ((2, {"v": torch.ones(4)}), (3, {"w": torch.ones(5)}),
                        (4, {"w": torch.ones(4, dtype=torch.float64)})):  # fmt: skip
        folder.save_best({**state(step), "model": model}, of_wer(0.5))
    assert [weights["step"] for weights in folder.best_weights(state(1)["model"])] == [1]
    assert caplog.text.count("does not fit the model") == 3
