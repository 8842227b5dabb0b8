"""``python -m fastguard.report``; the command is fastguard/speech/cli/report.py."""

import sys

from fastguard.speech.cli.report import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
