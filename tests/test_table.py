"""fastguard._table: the layout of text tables."""

from fastguard._table import aligned, facts, table

ROWS = [["layer", "kind", "norm"], ["a", "Linear", "1.5"], ["longer", "x", "-"]]


def test_columns_have_one_width_and_numbers_end_at_the_same_place():
    assert aligned(ROWS, left=(0, 1)) == [
        "layer   kind    norm",
        "a       Linear   1.5",
        "longer  x          -",
    ]
    assert aligned(ROWS)[1] == "a       Linear   1.5"
    assert aligned(ROWS)[2] == "longer       x     -"


def test_no_line_ends_in_spaces():
    assert aligned([["a", "b"], ["long", ""]], left=(0, 1)) == ["a     b", "long"]


def test_a_table_has_a_title_and_a_rule():
    assert table("times", ["step", "ms"], [["adamw", "12"]]) == (
        "times\nstep   ms\n---------\nadamw  12"
    )


def test_facts_have_their_values_in_one_column():
    lines = facts({"torch": "2.11", "CPU kernels": "none"})
    assert [line.index(value) for line, value in zip(lines, ("2.11", "none"), strict=True)] == [
        27,
        27,
    ]
