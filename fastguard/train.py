"""``python -m fastguard.train``: train a CTC speech model; ``--help`` lists the settings."""

import logging
import sys
import time
from pathlib import Path

from .config import parse
from .guard import GradientExplosionError
from .metrics import log_to
from .speech.readers import CorpusError
from .trainer import Trainer

logger = logging.getLogger("fastguard.train")  # run with -m, __name__ is "__main__"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run or its corpus failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    config = parse(argv)
    run_dir = config.run_dir or Path("runs") / f"{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run_dir / "metrics.jsonl").exists():
        print(
            f"error: {run_dir} holds a run already: choose another --run-dir, or move it away",
            file=sys.stderr,
        )
        return 2
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        log_to(run_dir / "train.log")
        config.save(run_dir / "config.yaml")
    except OSError as error:
        print(f"error: can not write the run folder: {error}; choose --run-dir", file=sys.stderr)
        return 2
    logger.info("run folder: %s", run_dir)
    try:
        trainer = Trainer(config, run_dir)
        trainer.fit()
    except (CorpusError, GradientExplosionError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 130 if trainer.stopping else 0


if __name__ == "__main__":
    sys.exit(main())
