"""``python -m fastguard.export``; the command is fastguard/speech/cli/export.py."""

import sys

from fastguard.speech.cli.export import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
