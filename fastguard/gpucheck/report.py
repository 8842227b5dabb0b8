"""What is printed is also in a file, line by line: a crash loses nothing that was said."""

from pathlib import Path

from tqdm import tqdm

from fastguard import _table as table


class Report:
    """Lines for a person and for an issue, and what failed among them."""

    def __init__(self, path: Path):
        self.path = path
        self.failed: list[str] = []
        self._file = path.open("w", encoding="utf-8")

    def line(self, text: str = "") -> None:
        tqdm.write(text)  # print, but that it does not tear a progress bar
        self._file.write(text + "\n")
        self._file.flush()

    def section(self, title: str) -> None:
        self.line(f"\n== {title} ==")

    def fail(self, what: str, text: str = "") -> None:
        """``what`` is for the list at the end, ``text`` is printed here."""
        self.failed.append(what)
        self.line(text or f"FAILED  {what}")

    def facts(self, facts: dict[str, str]) -> None:
        for line in table.facts(facts):
            self.line(line)

    def close(self) -> None:
        self._file.close()


def tail(text: str, lines: int) -> str:
    """The last lines, set in."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])
