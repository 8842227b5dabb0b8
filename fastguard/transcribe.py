"""``python -m fastguard.transcribe``; the command is fastguard/speech/cli/transcribe.py."""

import sys

from fastguard._extras import load_command

main = load_command("fastguard.speech.cli.transcribe", __name__)

if __name__ == "__main__":
    sys.exit(main())
