"""docs/peers.md: each mark has a test of ours or a named source of a version behind it."""

import ast
import re

import pytest

from .blocks import ROOT

PAGE = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
TEST = re.compile(r"\[(\w+)\]\(\.\./(tests/[\w/]+\.py)\)")
MARKS = {"✓", "part", "no", "?"}
#: A release, or a commit where there are none.
VERSION = re.compile(r" (\d+(?:\.\d+){1,2}|commit [0-9a-f]{10})$")


def sections(level, text):
    """Title and text of each section of this level."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text):
    """The cells of each row that begins with a number."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d+ \|", line)
    ]


PARTS = sections(2, PAGE)
FEATURES = rows(PARTS["Table"])
OURS = {int(row[0]): row[1:] for row in rows(PARTS["fastguard's tests"])}
PEERS = sections(3, PARTS["Peers' sources"])


def backed(text):
    """The numbers of the features that a peer's list names."""
    found = re.findall(r"^- ((?:\d+, )*\d+):", text, re.M)
    return {int(number) for numbers in found for number in numbers.split(", ")}


def test_the_table_is_whole():
    assert [int(row[0]) for row in FEATURES] == list(range(1, len(FEATURES) + 1))
    assert len(FEATURES) >= 20 and len(PEERS) == 10
    for _, feature, *marks in FEATURES:
        assert len(marks) == 1 + len(PEERS) and set(marks) <= MARKS, feature
    assert list(OURS) == list(range(1, len(FEATURES) + 1))


@pytest.mark.parametrize("number", OURS)
def test_each_mark_of_ours_has_tests_that_exist(number):
    tests, shows = OURS[number]
    found = TEST.findall(tests)
    assert found and shows
    assert TEST.sub("", tests).strip(", ") == ""
    for name, file in found:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        named = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert len(named) == 1, f"{file} has no {name}"
        marks = [ast.unparse(decorator) for decorator in named[0].decorator_list]
        assert not any(re.search(r"\bmark\.(skip|xfail)\b", mark) for mark in marks), name


@pytest.mark.parametrize(("place", "title"), list(enumerate(PEERS)))
def test_each_mark_of_a_peer_has_a_source_of_a_version(place, title):
    assert VERSION.search(title)
    marked = {int(row[0]) for row in FEATURES if row[3 + place] in ("✓", "part")}
    unchecked = {int(row[0]) for row in FEATURES if row[3 + place] == "?"}
    found = backed(PEERS[title])
    assert marked <= found
    assert not unchecked & found
    assert PEERS[title].count("`") >= 4


def test_the_columns_are_in_the_order_of_the_sections():
    (header,) = re.findall(r"^\| \| feature \| fastguard \|(.*)\|$", PAGE, re.M)
    names = re.findall(r"\[([\w-]+)\]\(#([\w-]+)\)", header)
    titles = [title.split(",")[0].split(" ")[0] for title in PEERS]
    assert [re.sub(r"(?<=y|r)-", "", n).lower() for n, _ in names] == [t.lower() for t in titles]


@pytest.mark.parametrize(
    ("recipe", "fault", "verdict"),
    [
        ("zclip", "nan input", "NaN weights"),
        ("zclip", "inf gradient", "NaN weights"),
        ("smartclip", "nan input", "NaN weights"),
        ("smartclip", "inf gradient", "NaN weights"),
        ("stabilityguard", "nan input", "NaN buffers"),
        ("stabilityguard", "1e30 gradient", "NaN moments"),
        ("OLMo-core", "nan input", "NaN weights"),
        ("OLMo-core", "1e30 gradient", "starved"),
    ],
)
def test_what_the_page_says_of_the_grid_is_in_it(recipe, fault, verdict):
    grid = (ROOT / "docs" / "results" / "stability.md").read_text(encoding="utf-8")
    table = grid.split("The worst verdict of all patients, by fault:")[1].split("## Patients")[0]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    (row,) = [row for row in cells if row[0] == recipe]
    assert row[cells[0].index(fault)] == verdict
    (said,) = [text for title, text in PEERS.items() if title.split(" ")[0] == recipe]
    assert re.search(rf"[Gg]rid\b[^.]*\b{verdict}\b", " ".join(said.split()))
