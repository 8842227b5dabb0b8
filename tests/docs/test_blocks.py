"""Each code block of a document is run by a test, or says why not."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from . import blocks
from .blocks import CODE, all_blocks, blocks_of, find


def test_there_are_blocks_of_every_language():
    found = Counter(block.language for block in all_blocks() if block.kind == "name")
    assert found["python"] >= 15
    assert found["diff"] and found["sh"]


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.place)
def test_a_block_has_a_language_and_code_has_a_name(block):
    assert block.language, "write the language after the fence; `text` for output"
    if block.language == "python":
        assert block.kind == "name", "write <!-- name: NAME --> before it, and a test in tests/docs"
    elif block.language in CODE:
        assert block.kind in ("name", "not run"), "write its name, or <!-- not run: REASON -->"
    else:
        assert block.kind in ("", "output of")


def test_names_are_given_once_and_each_is_run():
    names = [block.said for block in all_blocks() if block.kind == "name"]
    assert len(names) == len(set(names))
    source = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    run = re.findall(r'(?:run_block|find|assert_prints)\(\s*"([\w-]+)"', source)
    assert set(names) == set(run) - {"no-such-block"}


def test_each_output_is_compared():
    outputs = {block.said for block in all_blocks() if block.kind == "output of"}
    source = (Path(__file__).parent / "test_guides.py").read_text(encoding="utf-8")
    assert outputs == set(re.findall(r'assert_prints\(\s*"([\w-]+)"', source))


def test_a_name_that_is_not_there():
    with pytest.raises(LookupError, match="no-such-block -->, found: none"):
        find("no-such-block")


def test_what_is_no_block():
    text = "a\n<!-- name: one -->\n```python\nx = 1\n```\n\n```text\n2\n```\n"
    one, two = blocks_of(text, "f.md")
    assert one == ("f.md", 4, "python", "name", "one", "x = 1\n")
    assert (two.kind, two.code) == ("", "2\n")
    with pytest.raises(ValueError, match=r"f\.md:3: no fence follows"):
        blocks_of("a\n<!-- name: one -->\n\n```python\n```\n", "f.md")
    with pytest.raises(ValueError, match=r"f\.md:2: this fence is never closed"):
        blocks_of("a\n```sh\nb\n", "f.md")


def test_ci_finds_its_test_command():
    block = find("test-command")
    assert (block.file, block.code) == ("README.md", "pip install -e .[test] && pytest\n")
    command = [sys.executable, blocks.__file__]
    done = subprocess.run([*command, block.said], capture_output=True, text=True)
    assert done.stdout == block.code
    missing = subprocess.run([*command, "no-such-block"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "found: none" in missing.stderr
    ci = (blocks.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "tests/docs/blocks.py test-command" in ci
