"""Where files are kept that can be made again."""

import os
from pathlib import Path

from .readers import CorpusError


def default_cache(what: str) -> Path:
    """The folder ``fastguard`` in $XDG_CACHE_HOME or ~/.cache, for ``what``; raises CorpusError if
    there is no home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "fastguard")
    try:
        return Path.home() / ".cache" / "fastguard"
    except RuntimeError as error:  # neither HOME nor an entry of the user
        raise CorpusError(
            f"no folder for {what}: {error} Set HOME, or XDG_CACHE_HOME to a folder"
        ) from error
