"""``python -m fastguard.evaluate``; the command is fastguard/speech/cli/evaluate.py."""

import sys

from fastguard._extras import load_command

main = load_command("fastguard.speech.cli.evaluate", __name__)

if __name__ == "__main__":
    sys.exit(main())
