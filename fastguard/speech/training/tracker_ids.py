"""Remembers which run of a logger belongs to a run's folder, in its ``loggers.json``."""

import json
import re
from pathlib import Path

from fastguard._io import files

_FILE = "loggers.json"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def known_id(folder: Path, logger: str) -> str | None:
    """The id of the logger's run; None if there is none."""
    found = _read(folder).get(logger)
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def keep_id(folder: Path, logger: str, run: str) -> None:
    """Write the id of the logger's run; raises OSError."""
    ids = _read(folder)
    if ids.get(logger) != run:
        files.write_text(folder / _FILE, json.dumps(ids | {logger: run}, indent=1) + "\n")


def _read(folder: Path) -> dict:
    try:
        ids = files.read_json(folder / _FILE)
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}
