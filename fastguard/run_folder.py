"""The folder of a run: what lies in it, whether a run may go on there, and from which state.

config.yaml  train.log  metrics.jsonl  tensorboard/  bad_step_*.json
hypotheses.jsonl alignments.txt rates.json  of best.pt on the dev split
last.pt      the newest state, for --resume: weights, optimizer, guard, random numbers, place
best.pt      the weights of the lowest WER; averaged.pt those of the mean of the best
checkpoints/ step_*.pt, the last states, and best_*.pt, the best weights
"""

import logging
import math
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from . import checkpoint
from .checkpoint import CheckpointError
from .config import Config
from .evaluation import Evaluation, write

logger = logging.getLogger(__name__)

# Settings that a run may change when it goes on: they say how long and where, not what.
_MAY_CHANGE = ("run_dir", "resume", "epochs", "max_steps", "num_workers", "parallel", "checkpoint")

_WAIT = 10.0  # seconds for a folder: a killed run's loader processes live on for some


class RunError(RuntimeError):
    """A run can not begin in its folder; the message says why and what to do."""


class RunFolder:
    """Reads and writes the folder at ``path``; nothing is made before :meth:`begin`."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self._states = path / "checkpoints"
        self._lock: FileLock | None = None

    def begin(self) -> None:
        """Make the folder, keep others out till :meth:`close`, and write the settings into it.

        The state that --resume names is taken over first: from then on the folder needs no other.

        Raises:
            RunError: there is a run in it that must not, or can not, go on; another process trains
                in it; or --resume names something that holds no state.
            OSError: it can not be written.
        """
        new = not self._has_begun()
        source = self._source() if new else None
        if not new:
            self._check_continues()
        elif (self.path / "metrics.jsonl").exists():
            raise RunError(
                f"{self.path} holds a run without a config.yaml, which can not be continued: "
                "choose another --run-dir, or move it away"
            )
        self._states.mkdir(parents=True, exist_ok=True)
        self._keep_others_out()
        for left_over in (*self.path.glob("*.tmp"), *self._states.glob("*.tmp")):
            left_over.unlink()
        if source is not None:
            path, state = source
            checkpoint.copy(path, self._state_path(state))
        checkpoint.write_text(self.path / "config.yaml", self.config.to_yaml())

    def _has_begun(self) -> bool:
        """A run that failed before its first step leaves its settings, and is none."""
        traces = ("metrics.jsonl", "checkpoints/step_*.pt")
        return (self.path / "config.yaml").exists() and any(
            list(self.path.glob(trace)) for trace in traces
        )

    def close(self) -> None:
        """Let others into the folder."""
        if self._lock is not None:
            self._lock.release()

    def _keep_others_out(self) -> None:
        lock = FileLock(self._states / "lock")
        try:
            lock.acquire(timeout=_WAIT)
        except Timeout as error:
            raise RunError(
                f"another process trains in {self.path}: end it, or choose another --run-dir"
            ) from error
        except NotImplementedError:
            logger.warning("%s can not be locked: start no second run in it", self.path)
        self._lock = lock

    def _check_continues(self) -> None:
        try:
            saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            saved = Config.from_dict(saved).to_dict()
        except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
            raise RunError(
                f"{self.path}/config.yaml is not what fastguard wrote: {error}; choose another "
                "--run-dir"
            ) from error
        # The same command again, after a kill, goes on with what it had begun.
        if self.config.resume not in ("auto", saved["resume"]) or self.config.resume == "never":
            raise RunError(
                f"{self.path} holds a run already: choose another --run-dir, or continue it with "
                "--resume auto"
            )
        if changed := _differences(saved, self.config.to_dict()):
            raise RunError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Give the same "
                "to continue it, or choose another --run-dir (with --resume "
                f"{self.path} it starts from that run's state)"
            )

    # --- states to go on from ---------------------------------------------------------------------

    def find_state(self) -> dict | None:
        """The newest state that can be read, or None for a new run."""
        found = self._newest(self.path)
        if found is None and (self.path / "metrics.jsonl").exists():
            logger.warning("%s holds no state yet: the run begins anew", self.path)
        return None if found is None else found[1]

    def _source(self) -> tuple[Path, dict] | None:
        """What --resume names, and its state."""
        if self.config.resume in ("auto", "never"):
            return None
        source = Path(self.config.resume)
        try:
            found = self._newest(source) if source.is_dir() else (source, _load(source))
        except CheckpointError as error:
            raise RunError(f"--resume {error}") from error
        if found is None:
            raise RunError(f"--resume {source}: there is no state in this folder")
        return found

    def _newest(self, folder: Path) -> tuple[Path, dict] | None:
        for path in sorted(folder.glob("checkpoints/step_*.pt"), reverse=True):
            try:
                return path, _load(path)
            except CheckpointError as error:
                logger.warning("%s; taking the one before it", error)
        return None

    def _state_path(self, state: dict) -> Path:
        return self._states / f"step_{state['step']:09d}.pt"

    def save(self, state: dict) -> None:
        """Write a state, and drop the oldest. Where that fails, warn: the run must not end.

        Those of later steps go too: they could not be read, or the run has left their way.
        """
        path = self._state_path(state)
        try:
            checkpoint.save(path, state)
            checkpoint.copy(path, self.path / "last.pt")
            states = sorted(self._states.glob("step_*.pt"))
            end = states.index(path) + 1
            for old in (*states[: max(0, end - self.config.checkpoint.keep_last)], *states[end:]):
                old.unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("No checkpoint at step %d, training goes on: %s", state["step"], error)

    # --- the best weights -------------------------------------------------------------------------

    def save_best(self, weights: dict, found: Evaluation) -> None:
        """Keep weights if they are among the best; best.pt is the very best of them, and what it
        recognised lies beside it."""
        step, wer = weights["step"], found.rates.wer
        path = self._states / f"best_{wer:.6f}_{step:09d}.pt"
        kept = [other for other in self.best() if other != path]
        if len(kept) >= self.config.checkpoint.keep_best and wer >= _wer_of(kept[-1]):
            return
        try:
            checkpoint.save(path, weights)
            for again in self._states.glob(f"best_*_{step:09d}.pt"):
                if again != path:  # of the same epoch, which a kill made the run repeat
                    again.unlink()
            if self.best()[0] == path:
                self._promote(path, found)
            for worse in self.best()[self.config.checkpoint.keep_best :]:
                worse.unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("No best checkpoint, training goes on: %s", error)

    def best(self) -> list[Path]:
        """Files of the best weights, those of the lowest WER first, of equals the oldest."""
        return sorted(self._states.glob("best_*.pt"), key=_rank)

    def best_weights(self) -> list[dict]:
        """What is in these files, of those that can be read."""
        weights = []
        for path in self.best():
            try:
                weights.append(checkpoint.load(path))
            except CheckpointError as error:
                logger.warning("%s; the mean of the best is without it", error)
        return weights

    def save_averaged(self, weights: dict, found: Evaluation) -> None:
        """Keep the mean of the best weights, as best.pt too if it is."""
        path = self.path / "averaged.pt"
        try:
            checkpoint.save(path, weights)
            if found.rates.wer < _wer_of(self.best()[0]):
                self._promote(path, found)
        except (OSError, CheckpointError) as error:
            logger.warning("No averaged checkpoint: %s", error)

    def _promote(self, path: Path, found: Evaluation) -> None:
        """To best.pt, unless that is better: the mean of a run that went on for more epochs."""
        best = self.path / "best.pt"
        try:
            present = checkpoint.load(best).get("wer", math.inf)
        except CheckpointError:
            present = math.inf
        if not present < found.rates.wer:
            checkpoint.copy(path, best)
            write(self.path, found)


def _load(path: Path) -> dict:
    state = checkpoint.load(path)
    if missing := {"optimizer", "guard", "loader", "random"} - set(state):
        raise CheckpointError(
            f"{path} holds weights, and nothing to go on with: it lacks {sorted(missing)}"
        )
    return state


def _wer_of(best: Path) -> float:
    return float(best.name.split("_")[1])


def _rank(best: Path) -> tuple[bool, float, str]:
    """NaN comes last: it has no place in an order."""
    wer = _wer_of(best)
    return math.isnan(wer), wer, best.name


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
