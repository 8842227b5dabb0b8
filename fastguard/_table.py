"""Text tables: rows of cells in columns of equal width, the text to the left, numbers to the right.

Commands, benchmarks and the diagnosis print their tables through this module.
"""

from collections.abc import Container, Iterator, Mapping, Sequence

_FACT_WIDTH = 26


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """One line of text for each row, with two spaces between the columns.

    Args:
        rows: cells as text; all rows have the same length.
        left: the indices of the columns that are aligned to the left; the others hold numbers and
            are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(row, widths, left)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int], left: Container[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i in left else cell.rjust(width)


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """The title, the header, a rule as long as the longest line, and a line for each row."""
    first, *others = aligned([header, *rows])
    rule = "-" * max(map(len, (first, *others)))
    return "\n".join([title, first, rule, *others])


def facts(values: Mapping[str, str]) -> list[str]:
    """One line "name value" for each entry, the values in one column."""
    return [f"{name:{_FACT_WIDTH}} {value}" for name, value in values.items()]
