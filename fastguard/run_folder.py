"""The folder of a run: what lies in it, whether a run may go on there, and from which state.

config.yaml  train.log  metrics.jsonl  tensorboard/  bad_step_*.json
hypotheses.jsonl alignments.txt rates.json  of best.pt on the dev split
last.pt      the newest state, for --resume: weights, optimizer, guard, random numbers, place
best.pt      the weights of the lowest WER; averaged.pt those of the mean of the best
checkpoints/ step_*.pt, the last states, and best_*.pt, the best weights
"""

import logging
from pathlib import Path

import yaml

from . import checkpoint
from .checkpoint import CheckpointError
from .config import Config
from .evaluation import Evaluation, write

logger = logging.getLogger(__name__)

# Settings that a run may change when it goes on: they say how long and where, not what.
_MAY_CHANGE = ("run_dir", "resume", "epochs", "max_steps", "num_workers", "parallel", "checkpoint")


class RunError(RuntimeError):
    """A run can not begin in its folder; the message says why and what to do."""


class RunFolder:
    """Reads and writes the folder at ``path``; nothing is made before :meth:`begin`."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self._states = path / "checkpoints"

    def begin(self) -> None:
        """Make the folder, and write the settings into it.

        Raises:
            RunError: there is a run in it that must not, or can not, go on.
            OSError: it can not be written.
        """
        if (self.path / "config.yaml").exists():
            self._check_continues()
        elif (self.path / "metrics.jsonl").exists():
            raise RunError(
                f"{self.path} holds a run without a config.yaml, which can not be continued: "
                "choose another --run-dir, or move it away"
            )
        self._states.mkdir(parents=True, exist_ok=True)
        for left_over in (*self.path.glob("*.tmp"), *self._states.glob("*.tmp")):
            left_over.unlink()
        checkpoint.write_text(self.path / "config.yaml", self.config.to_yaml())

    def _check_continues(self) -> None:
        if self.config.resume != "auto":
            raise RunError(
                f"{self.path} holds a run already: choose another --run-dir, or continue it with "
                "--resume auto"
            )
        try:
            saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            saved = Config.from_dict(saved).to_dict()
        except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
            raise RunError(
                f"{self.path}/config.yaml is not what fastguard wrote: {error}; choose another "
                "--run-dir"
            ) from error
        if changed := _differences(saved, self.config.to_dict()):
            raise RunError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Give the same "
                "to continue it, or choose another --run-dir (with --resume "
                f"{self.path} it starts from that run's state)"
            )

    # --- states to go on from ---------------------------------------------------------------------

    def find_state(self) -> dict | None:
        """The state to go on from, or None for a new run. Of a folder the newest that can be read.

        Raises:
            RunError: --resume names something that holds none.
        """
        if self.config.resume in ("auto", "never"):
            found = self._newest(self.path)
            if found is None and (self.path / "metrics.jsonl").exists():
                logger.warning("%s holds no state yet: the run begins anew", self.path)
            return found
        source = Path(self.config.resume)
        try:
            found = self._newest(source) if source.is_dir() else _load(source)
        except CheckpointError as error:
            raise RunError(f"--resume {error}") from error
        if found is None:
            raise RunError(f"--resume {source}: there is no state in this folder")
        return found

    def _newest(self, folder: Path) -> dict | None:
        for path in sorted(folder.glob("checkpoints/step_*.pt"), reverse=True):
            try:
                return _load(path)
            except CheckpointError as error:
                logger.warning("%s; taking the one before it", error)
        return None

    def save(self, state: dict) -> None:
        """Write a state, and drop the oldest. Where that fails, warn: the run must not end."""
        path = self._states / f"step_{state['step']:09d}.pt"
        try:
            checkpoint.save(path, state)
            checkpoint.copy(path, self.path / "last.pt")
            for old in sorted(self._states.glob("step_*.pt"))[: -self.config.checkpoint.keep_last]:
                old.unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("No checkpoint at step %d, training goes on: %s", state["step"], error)

    # --- the best weights -------------------------------------------------------------------------

    def save_best(self, weights: dict, found: Evaluation) -> None:
        """Keep weights if they are among the best; best.pt is the very best of them, and what it
        recognised lies beside it."""
        kept, wer = self.best(), found.rates.wer
        if len(kept) >= self.config.checkpoint.keep_best and wer >= _wer_of(kept[-1]):
            return
        path = self._states / f"best_{wer:.6f}_{weights['step']:09d}.pt"
        try:
            checkpoint.save(path, weights)
            if self.best()[0] == path:
                checkpoint.copy(path, self.path / "best.pt")
                write(self.path, found)
            for worse in self.best()[self.config.checkpoint.keep_best :]:
                worse.unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("No best checkpoint, training goes on: %s", error)

    def best(self) -> list[Path]:
        """Files of the best weights, those of the lowest WER first, of equals the oldest."""
        return sorted(self._states.glob("best_*.pt"))

    def save_averaged(self, weights: dict, found: Evaluation) -> None:
        """Keep the mean of the best weights, as best.pt too if it is."""
        try:
            checkpoint.save(self.path / "averaged.pt", weights)
            if found.rates.wer < _wer_of(self.best()[0]):
                checkpoint.copy(self.path / "averaged.pt", self.path / "best.pt")
                write(self.path, found)
        except (OSError, CheckpointError) as error:
            logger.warning("No averaged checkpoint: %s", error)


def _load(path: Path) -> dict:
    state = checkpoint.load(path)
    if missing := {"optimizer", "guard", "loader", "random"} - set(state):
        raise CheckpointError(
            f"{path} holds weights, and nothing to go on with: it lacks {sorted(missing)}"
        )
    return state


def _wer_of(best: Path) -> float:
    return float(best.name.split("_")[1])


def _differences(saved: dict, given: dict, prefix: str = "") -> list[str]:
    changed = []
    for key in saved.keys() | given.keys():
        old, new = saved.get(key), given.get(key)
        if prefix + key in _MAY_CHANGE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{prefix}{key}.")
        else:
            changed.append(f"{prefix}{key} was {old} and is {new}")
    return sorted(changed)
