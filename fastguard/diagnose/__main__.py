"""``python -m fastguard.diagnose``; the command is fastguard/speech/cli/diagnose.py."""

import sys

from fastguard._extras import load_command

main = load_command("fastguard.speech.cli.diagnose", __name__)

if __name__ == "__main__":
    sys.exit(main())
