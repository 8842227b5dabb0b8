"""A report that is printed and written to a file line by line: a crash loses no line."""

from pathlib import Path

from tqdm import tqdm

from fastguard import _table as table


class Report:
    """The lines of the report, and the names of the failed checks."""

    def __init__(self, path: Path):
        self.path = path
        self.failed: list[str] = []
        self._file = path.open("w", encoding="utf-8")

    def line(self, text: str = "") -> None:
        tqdm.write(text)  # like print, but it keeps a progress bar intact
        self._file.write(text + "\n")
        self._file.flush()

    def section(self, title: str) -> None:
        self.line(f"\n== {title} ==")

    def fail(self, what: str, text: str = "") -> None:
        """Print ``text``, and add ``what`` to the list of failures at the end."""
        self.failed.append(what)
        self.line(text or f"FAILED  {what}")

    def facts(self, facts: dict[str, str]) -> None:
        for line in table.facts(facts):
            self.line(line)

    def close(self) -> None:
        self._file.close()


def tail(text: str, lines: int) -> str:
    """The last lines, indented."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])
