"""``python -m fastguard.report``; the command is fastguard/speech/cli/report.py."""

import sys

from fastguard._extras import load_command

main = load_command("fastguard.speech.cli.report", __name__)

if __name__ == "__main__":
    sys.exit(main())
