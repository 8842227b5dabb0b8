"""``python -m fastguard.export``; the command is fastguard/speech/cli/export.py."""

import sys

from fastguard._extras import load_command

main = load_command("fastguard.speech.cli.export", __name__)

if __name__ == "__main__":
    sys.exit(main())
