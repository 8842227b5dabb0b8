"""Checkpoints are whole or absent, and reading one runs nothing."""

import math
import pickle
import re

import pytest
import torch

from fastguard._io import files
from fastguard.speech.storage import checkpoint


def state(value=1.0):
    return {
        "model": {"w": torch.full((1000,), value), "n": torch.tensor(3)},
        "config": {},
        "tokenizer": {},
    }


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "a.pt", state())
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["w"], torch.ones(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, bad):
    checkpoint.save(tmp_path / "a.pt", state())
    with pytest.raises(
        checkpoint.CheckpointError, match="1 tensors of the model are not finite, first w"
    ):
        checkpoint.save(tmp_path / "a.pt", state(bad))
    assert checkpoint.load(tmp_path / "a.pt")["model"]["w"].isfinite().all()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", state())

    def full(obj, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "a.pt", state(2.0))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "a.pt")["model"]["w"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_copy_keeps_its_content_when_the_original_is_replaced(tmp_path):
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    for value in (1.0, 2.0):
        checkpoint.save(last, state(value))
        files.link(last, best)
    checkpoint.save(last, state(3.0))
    assert checkpoint.load(best)["model"]["w"][0] == 2
    assert checkpoint.load(last)["model"]["w"][0] == 3


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_unreadable_files_are_named(tmp_path, capsys):
    checkpoint.save(tmp_path / "whole.pt", state())
    whole = (tmp_path / "whole.pt").read_bytes()
    files = {
        "truncated.pt": whole[: len(whole) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
        "evil.pt": pickle.dumps(Evil()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=re.escape(name)):
            checkpoint.load(tmp_path / name)
    with pytest.raises(checkpoint.CheckpointError, match=r"absent\.pt"):
        checkpoint.load(tmp_path / "absent.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"lacks \['config', 'tokenizer'\]"):
        checkpoint.load(tmp_path / "foreign.pt")
    assert "code from a checkpoint ran" not in capsys.readouterr().out


def test_the_best_checkpoint_of_a_folder(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="has no checkpoint"):
        checkpoint.best_of(tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).touch()
        assert checkpoint.best_of(tmp_path) == tmp_path / name
    assert checkpoint.best_of(tmp_path / "last.pt") == tmp_path / "last.pt"
