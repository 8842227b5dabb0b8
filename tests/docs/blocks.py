"""The code blocks of README.md and docs/, found by name.

The line before a block's fence is a comment, which no page shows. It has one of these forms::

    <!-- name: quick-start -->        a test runs it
    <!-- not run: needs a GPU -->     no test does, for this reason
    <!-- output of: quick-start -->   what it prints

``python tests/docs/blocks.py NAME`` prints the block of this name; .ci/run takes its test command
from there. This file needs no package.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Languages whose blocks a reader runs, and which therefore need a name or a reason.
CODE = ("python", "diff", "sh")
_FENCE = re.compile(r"^```(\w*)$")
_MARK = re.compile(r"^<!-- (name|not run|output of): (.+) -->$")


class Block(NamedTuple):
    file: str
    #: The number of its first line of code, from 1.
    line: int
    language: str
    #: "name", "not run" or "output of"; empty without a mark.
    kind: str
    #: The name, or the reason.
    said: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def documents() -> list[Path]:
    """All documents for readers, without those of docs/results, which commands write."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(path for path in found if path.parent.name != "results")


def blocks_of(text: str, file: str) -> list[Block]:
    """The fenced blocks of a document.

    Raises:
        ValueError: a fence that is never closed, or a mark that no fence follows.
    """
    found, lines = [], text.splitlines()
    mark, start = None, None
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if start is None and fence:
            start, language = number, fence[1]
        elif start is not None and line == "```":
            kind, said = mark or ("", "")
            code = "\n".join([*lines[start : number - 1], ""])
            found.append(Block(file, start + 1, language, kind, said, code))
            mark, start = None, None
        elif start is None:
            if mark:
                raise ValueError(f"{file}:{number}: no fence follows <!-- {mark[0]}: ... -->")
            fits = _MARK.match(line)
            mark = (fits[1], fits[2]) if fits else None
    if start is not None:
        raise ValueError(f"{file}:{start}: this fence is never closed")
    return found


def all_blocks() -> list[Block]:
    return [
        block
        for path in documents()
        for block in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def find(name: str, kind: str = "name") -> Block:
    """The one block of this name.

    Raises:
        LookupError: there is none, or several.
    """
    found = [block for block in all_blocks() if (block.kind, block.said) == (kind, name)]
    if len(found) != 1:
        places = ", ".join(block.place for block in found) or "none"
        raise LookupError(f"one block must be marked <!-- {kind}: {name} -->, found: {places}")
    return found[0]


def run_block(name: str, names: dict) -> dict:
    """Execute the Python block of this name with these names, and return them."""
    block = find(name)
    assert block.language == "python", block.place
    code = "\n" * (block.line - 1) + block.code  # a traceback has the document's line
    exec(compile(code, block.file, "exec"), names)
    return names


def printed(name: str) -> str:
    """The output of the block of this name, as a document shows it."""
    return find(name, "output of").code


if __name__ == "__main__":
    try:
        print(find(sys.argv[1]).code, end="")
    except LookupError as error:
        sys.exit(str(error))
