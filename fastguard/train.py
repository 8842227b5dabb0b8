"""``python -m fastguard.train``; the command is fastguard/speech/cli/train.py."""

from fastguard.speech.cli.train import main
from fastguard.speech.training.parallel import leave

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
