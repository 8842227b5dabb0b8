"""What the site makes of a page's links and of a docstring. .ci/run builds the whole site."""

import re
import sys
import types

import pytest

from .blocks import ROOT


@pytest.fixture
def hooks(monkeypatch):
    """docs/site_hooks.py, without mkdocs."""
    files = types.ModuleType("mkdocs.structure.files")
    files.File = None
    for name in ("mkdocs", "mkdocs.structure"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mkdocs.structure.files", files)
    return executed("site_hooks")


@pytest.fixture
def docstrings(monkeypatch):
    """docs/griffe_docstrings.py, without griffe."""
    griffe = types.ModuleType("griffe")
    griffe.Extension = object
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    return executed("griffe_docstrings")


def executed(name):
    module = types.ModuleType(name)
    exec((ROOT / "docs" / f"{name}.py").read_text(encoding="utf-8"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "page, link, expected",
    [
        ("index.md", "[a](docs/guides/amp.md#b)", "[a](guides/amp.md#b)"),
        ("index.md", "![a](docs/assets/b.svg)", "![a](assets/b.svg)"),
        ("index.md", '<img src="docs/assets/b.svg">', '<img src="assets/b.svg">'),
        ("index.md", '<source srcset="docs/assets/b.svg">', '<source srcset="assets/b.svg">'),
        ("index.md", "[a](CHANGELOG.md)", "[a](changelog.md)"),
        ("index.md", "[a](fastguard/clip.py)", "a"),
        ("guides/amp.md", "[a](../../README.md#b)", "[a](../index.md#b)"),
        ("guides/amp.md", "[a](reports.md)", "[a](reports.md)"),
        ("guides/amp.md", "[a](../../examples/amp.py)", "a"),
        ("benchmarks.md", "[a](results)", "a"),
        ("benchmarks.md", "[a](https://b/c.md) [d](#e)", "[a](https://b/c.md) [d](#e)"),
        ("contributing.md", "[a](docs/cuda.md) [b](tests)", "[a](cuda.md) b"),
    ],
)
def test_links_of_the_site(hooks, page, link, expected):
    place = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(link, place, None, None) == expected


def test_docstrings_become_markdown(docstrings):
    text = "See :class:`fastguard.AdamW`.\n\n::\n\n    a = 1\n\n    b = 2\n\nThen: ``c``."
    expected = "See `fastguard.AdamW`.\n\n```python\na = 1\n\nb = 2\n```\n\nThen: ``c``."
    assert docstrings.as_markdown(text) == expected


def test_comments_become_docstrings(docstrings):
    lines = ["class A:", "    #: One", "    #: two.", "    b: int = 0", "    c: int = 1"]
    assert docstrings.comment_above(lines, 4) == "One two."
    assert docstrings.comment_above(lines, 5) == ""


def test_every_page_is_in_the_navigation_once(hooks):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/-]+\.md)$", text[text.index("\nnav:") :], re.M)
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").glob("**/*.md")}
    pages = {page for page in pages if not page.startswith("results/")}
    assert sorted(listed) == sorted(pages | set(hooks.ROOT_PAGES.values()))
