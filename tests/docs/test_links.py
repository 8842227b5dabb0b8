"""Each relative link of a document leads to a file of this repository, each anchor to a heading."""

import re

import pytest

import fastguard

from .blocks import ROOT, documents

LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
#: Files, folders and commands that a document names as code.
NAMED = re.compile(r"`((?:tests|bench|fastguard|configs|csrc|docs|examples)/[\w/.]+\.\w+)`")
DOCUMENTS = [*documents(), ROOT / "tests" / "simt" / "README.md"]


def links(text):
    """(target, anchor) of each link outside of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [(target, anchor.removeprefix("#")) for target, anchor in LINK.findall(text)]


def anchors(text):
    """Those of the headings, as GitHub and mkdocs form them of plain words."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    broken = []
    for target, anchor in links(text):
        place = (path.parent / target).resolve() if target else path
        inside = place.is_relative_to(ROOT) and place.exists()
        if not inside or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    named = NAMED.findall(path.read_text(encoding="utf-8"))
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_links_are_found():
    found = [link for path in DOCUMENTS for link in links(path.read_text(encoding="utf-8"))]
    assert len(found) >= 100
    assert sum(bool(anchor) for _, anchor in found) >= 10
    assert links("[a](b.md#c) `[d](e)`\n```text\n[f](g)\n```\n[h](https://i)") == [("b.md", "c")]
    assert anchors("# A `b` c?\n## d-e 1,000\n```sh\n# f\n```\n") == {"a-b-c", "d-e-1000"}


def test_the_citation_names_the_present_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", text, re.M) == [fastguard.__version__]


def test_each_mark_has_a_test_behind_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.count("|") == 4]
    marked = [row for row in rows if row[1].strip() == "✓"]
    assert len(marked) >= 7
    for _, _, proof in marked:
        assert re.search(r"\]\(tests/[\w/]+\.py\)", proof)
