"""Docstrings as mkdocstrings reads them.

Attributes are documented by Sphinx's comments ``#:``, which griffe does not know. A role of Sphinx
becomes code, and an indented block after ``::`` becomes a fence.
"""

import re
import textwrap

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_BLOCK = re.compile(r"^([^\n]*?)::\n\n((?:(?: {4}[^\n]*)?\n)+)", re.MULTILINE)


def as_markdown(text: str) -> str:
    text = _ROLE.sub(r"`\1`", text)
    return _BLOCK.sub(_fenced, text + "\n").rstrip()


def _fenced(found: re.Match) -> str:
    said, block = found.groups()
    lead = f"{said}:\n\n" if said.strip() else ""
    return f"{lead}```python\n{textwrap.dedent(block).strip()}\n```\n\n"


def comment_above(lines: list[str], number: int) -> str:
    """The comment ``#:`` that ends above the line of this number, from 1; else ""."""
    found = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#:"):
            break
        found.append(line.strip()[2:].strip())
    return " ".join(reversed(found))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.is_attribute and obj.docstring is None and obj.lineno:
            text = comment_above(obj.lines_collection[obj.filepath], obj.lineno)
            if text:
                obj.docstring = griffe.Docstring(text, parent=obj, lineno=obj.lineno)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
