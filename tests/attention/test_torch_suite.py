"""The command that runs torch's own tests of attention tells ours from torch's."""

from __future__ import annotations

import sys

import pytest

from tests.attention import torch_suite

TESTS = """
import unittest
import torch
from torch import nn
from torch.nn.modules.transformer import MultiheadAttention as OfLayers

class Test(unittest.TestCase):
    def test_same(self):
        module, x = nn.MultiheadAttention(4, 2), torch.ones(3, 1, 4)
        assert isinstance(module, OfLayers) and module(x, x, x)[0].shape == x.shape
        assert getattr(module, "clamp", None) is None

    def test_fails_with_both(self):
        raise RuntimeError

    def test_ours_alone(self):
        layer = nn.TransformerEncoderLayer(4, 2, 4)
        assert type(layer.self_attn).__module__.startswith("torch."), "new"

    def test_text(self):
        with self.assertRaisesRegex(AssertionError, "divisible by"):
            nn.MultiheadAttention(4, 3)

    def test_more_than_text(self):
        with self.assertRaisesRegex(AssertionError, "divisible by"):
            nn.MultiheadAttention(4, 3)
        assert not hasattr(nn.MultiheadAttention, "stats")

    @unittest.skip("as torch's for CUDA")
    def test_skipped(self):
        pass
"""


def test_it_names_what_is_not_documented(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_some.py").write_text(TESTS)
    fails = torch_suite.Difference("is new", "new")
    of_file = {
        "Test::test_ours_alone": fails,
        "Test::test_text": torch_suite.TEXT,
        "Test::test_more_than_text": torch_suite.TEXT,
        "Test::test_same": fails,
    }
    monkeypatch.setattr(torch_suite, "FILES", {"test_some.py": ""})
    monkeypatch.setattr(torch_suite, "DIFFERENCES", {"test_some.py": of_file})
    monkeypatch.setattr(sys, "argv", ["torch_suite", "--tests", str(tmp_path)])
    assert torch_suite.main() == 1
    printed = capsys.readouterr().out
    assert "all: 1 passed with both, 1 failed with both, 3 failed with ours alone" in printed
    assert "1 skipped with both; 4 made an attention of ours" in printed
    assert "test_more_than_text\n    FAILS WITH ANY TEXT TOO" in printed
    assert "test_text\n    FAILS" not in printed
    assert "test_same\n    DOCUMENTED, and does not fail" in printed
    assert "NOT DOCUMENTED" not in printed

    del of_file["Test::test_more_than_text"], of_file["Test::test_same"]
    of_file["Test::test_ours_alone"] = torch_suite.Difference("is new", "another message")
    assert torch_suite.main() == 1
    printed = capsys.readouterr().out
    assert "test_ours_alone\n    NOT DOCUMENTED: AssertionError: new" in printed
    assert "test_more_than_text\n    NOT DOCUMENTED: " in printed


def test_a_folder_that_is_not_torchs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torch_suite", "--tests", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        torch_suite.main()
    assert "it must be torch's folder `test`" in capsys.readouterr().err
