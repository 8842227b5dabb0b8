"""The command that runs torch's own tests of attention tells ours from torch's."""

from __future__ import annotations

import re
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

    def test_of_another_message(self):
        self.test_ours_alone()

    def test_undocumented(self):
        self.test_ours_alone()

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


@pytest.mark.slow
def test_it_names_what_is_not_documented(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_some.py").write_text(TESTS)
    new = torch_suite.Difference("is new", "new")
    known = {
        "test_ours_alone": new,
        "test_of_another_message": torch_suite.Difference("is old", "old"),
        "test_text": torch_suite.TEXT,
        "test_more_than_text": torch_suite.TEXT,
        "test_same": new,
    }
    differences = {"test_some.py": {f"Test::{name}": why for name, why in known.items()}}
    monkeypatch.setattr(torch_suite, "FILES", {"test_some.py": ""})
    monkeypatch.setattr(torch_suite, "DIFFERENCES", differences)
    monkeypatch.setattr(sys, "argv", ["torch_suite", "--tests", str(tmp_path)])
    assert torch_suite.main() == 1
    printed = capsys.readouterr().out
    assert "all: 1 passed with both, 1 failed with both, 5 failed with ours alone" in printed
    assert "1 skipped with both; 6 made an attention of ours" in printed
    assert "test_ours_alone\n    is new\n" in printed
    assert "test_of_another_message\n    NOT DOCUMENTED: AssertionError: new" in printed
    assert "test_undocumented\n    NOT DOCUMENTED: AssertionError: new" in printed
    assert "test_more_than_text\n    FAILS WITH ANY TEXT TOO" in printed
    assert "test_text\n    FAILS" not in printed
    assert "test_same\n    DOCUMENTED, and does not fail" in printed

    for name in set(known) - {"test_ours_alone", "test_text"}:
        del differences["test_some.py"][f"Test::{name}"]
    monkeypatch.setattr(torch_suite, "FILES", {"test_some.py": "ours_alone or test_text or skip"})
    assert torch_suite.main() == 0


def test_a_folder_that_is_not_torchs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torch_suite", "--tests", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        torch_suite.main()
    assert "it must be torch's folder `test`" in capsys.readouterr().err


def test_the_record_has_the_documented_differences():
    results = torch_suite.REPOSITORY / "docs" / "results" / "torch_attention_tests.md"
    record = results.read_text(encoding="utf-8")
    known = {n: why for of in torch_suite.DIFFERENCES.values() for n, why in of.items()}
    named = dict(re.findall(r"^  (Test\w+::\w+)\n    (.*)$", record, re.M))
    assert named == {name: difference.why for name, difference in known.items()}
    assert f" {len(known)} failed with ours alone" in record.split("\nall: ")[1]
    assert len(known) == 12  # the number in words, there and in the guide
