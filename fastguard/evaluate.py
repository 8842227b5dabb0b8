"""``python -m fastguard.evaluate``; the command is fastguard/speech/cli/evaluate.py."""

import sys

from fastguard.speech.cli.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
