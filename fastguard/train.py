"""``python -m fastguard.train``; the command is fastguard/speech/cli/train.py."""

from fastguard._extras import load_command
from fastguard.speech.training.parallel import leave

main = load_command("fastguard.speech.cli.train", __name__)

if __name__ == "__main__":
    leave(main())
