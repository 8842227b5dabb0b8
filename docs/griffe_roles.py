"""Docstrings as Markdown: a role of Sphinx becomes code, a block after ``::`` becomes a fence."""

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


class Roles(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
