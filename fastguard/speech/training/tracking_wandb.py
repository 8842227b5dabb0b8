"""Sends curves to Weights & Biases; offline unless the user's environment asks for more."""

import os
from pathlib import Path

from fastguard._extras import require

from .config import Config
from .tracker_ids import keep_id, known_id
from .tracking import Tracker


class Wandb(Tracker):
    """A run of wandb, in ``wandb/`` of the run's folder.

    Without ``WANDB_MODE`` it is offline: nothing leaves the machine until ``wandb sync``.
    ``WANDB_PROJECT`` names the project, by default fastguard. A resumed run keeps its id.

    Args:
        folder: of the run.
        config: the settings, which wandb shows.
        skips: number of skipped steps so far.
    """

    title = "wandb"

    def __init__(self, folder: Path, config: Config, skips: int):
        super().__init__(skips)
        # wandb tells its makers about its own errors, unless this is set.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = require("wandb", "wandb")
        self._try(self._open, folder, config)

    def _open(self, folder: Path, config: Config) -> None:
        known = known_id(folder, "wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastguard"),
            name=folder.resolve().name,
            id=known,
            resume=known and "allow",
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=config.to_dict(),
            # train.log has what is printed, and says where the files are.
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        keep_id(folder, "wandb", self._run.id)

    def _send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def _end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
