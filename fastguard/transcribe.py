"""``python -m fastguard.transcribe``; the command is fastguard/speech/cli/transcribe.py."""

import sys

from fastguard.speech.cli.transcribe import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
