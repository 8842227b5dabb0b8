"""The folder of a run: its files, whether a run may continue in it, and from which state.

config.yaml  train.log  metrics.jsonl  bad_step_*.json
tensorboard/  wandb/  mlruns/  loggers.json  of --loggers
left_out.jsonl  changed_labels.jsonl        of the corpus
hypotheses.jsonl alignments.txt rates.json  of best.pt on the dev split
last.pt      the newest state, for --resume: weights, optimizer, guard, random numbers, place
best.pt      the best weights, in the order of ranking.py; averaged.pt: the mean of the best
checkpoints/ step_*.pt, the last states, and best_*.pt, the best weights
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from fastguard._io import files
from fastguard._io.terminal import one_line
from fastguard.speech.recognition.evaluation import Evaluation, write
from fastguard.speech.storage import checkpoint
from fastguard.speech.storage.checkpoint import CheckpointError
from fastguard.speech.storage.plain import shown
from fastguard.speech.storage.yaml_file import read_yaml

from .config import Config, warn_without_text_rules
from .ranking import NAME_OF_BEST, Rank, comparable
from .resumed import changed_in_folder, contradictions, nothing_left

logger = logging.getLogger(__name__)

# Files that a run writes into its folder, besides reports on bad steps.
_FILES = (
    "config.yaml", "train.log", "metrics.jsonl", "left_out.jsonl", "changed_labels.jsonl",
    "hypotheses.jsonl", "alignments.txt", "rates.json", "last.pt", "best.pt", "averaged.pt",
    "loggers.json",
)  # fmt: skip
_LOCK = "checkpoints/lock"
_FOLDERS = ("checkpoints", "tensorboard")
_OF_LOGGERS = ("wandb", "mlruns")  # folders of many runs, to which a logger adds one
_BAD_STEP = re.compile(r"bad_step_\d{6,}\.json")
_STATE = re.compile(r"step_(\d{9,18})\.pt")
# Temporary files of versions before files.replacing.
_HALF_WRITTEN = re.compile(rf"({_STATE.pattern}|{NAME_OF_BEST.pattern})\.tmp")

_MOST_STEPS = 10**18
_WAIT = 10.0  # seconds for the lock: the loader processes of a killed run live a few seconds longer


class RunError(RuntimeError):
    """A run cannot begin or continue; the message says why and what to do."""


class RunFolder:
    """Reads and writes the folder at ``path``; nothing is written before :meth:`begin`."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self._states = path / "checkpoints"
        self._lock: FileLock | None = None
        self.newest: int | None = None  # step of the newest state that was read or written
        self.unsaved: dict[str, str] = {}  # what the last attempt could not write, and why

    def begin(self) -> None:
        """Make the folder, lock it until :meth:`close`, and write the settings into it.

        The state that --resume names is copied into the folder, which then needs no other folder. A
        new run finds only this state, because its folder has no files of a run. A run that
        continues finds the states in its own folder.

        Raises:
            RunError: the folder has a run that must not or cannot continue, other files that would
                be overwritten, or a link out of the folder; another process trains in it; or
                --resume names something without a state.
            OSError: the folder cannot be written.
        """
        self._check_place()
        source = None if self._has_begun() else self._source()
        self._states.mkdir(parents=True, exist_ok=True)
        self._keep_others_out()
        begun = self._has_begun()
        if begun:
            self._check_place()  # of a run that began while this one waited
        if (self.path / "config.yaml").exists():
            self._remove_left_overs()
        files.write_text(self.path / "config.yaml", self.config.to_yaml())
        if source is not None and not begun:
            path, state = source
            files.copy(path, self._state_path(state))

    def _check_place(self) -> None:
        """Raise RunError unless a run with these settings may write into the folder."""
        present = self._present()
        if self._has_begun():
            self._check_continues()
        elif "metrics.jsonl" in present and "config.yaml" not in present:
            raise RunError(
                f"{self.path} has a run without a config.yaml, which cannot be continued: "
                "choose another --run-dir, or move it away"
            )
        elif present and not self._has_settings():
            raise RunError(
                f"{self.path} is not the folder of a run, and has files that a run would overwrite "
                f"({', '.join(present[:3])}): choose another --run-dir, or move it away"
            )

    def _present(self) -> list[str]:
        """Names of existing files that a run writes. Raises RunError for a link out of the folder,
        or a file of another kind."""
        names = [*_FILES, *(path.name for path in _ours(self.path, "bad_step_*", _BAD_STEP))]
        try:
            for name in (*_FOLDERS, *_OF_LOGGERS):
                files.check_own_folder(self.path / name)
            for name in (*names, _LOCK):
                files.check_own(self.path / name)
        except files.UnusableFile as error:
            raise RunError(f"{error}, or choose another --run-dir") from error
        full = [name for name in _FOLDERS if any(_but_the_lock(self.path / name))]
        return [*full, *(name for name in names if (self.path / name).exists())]

    def _has_begun(self) -> bool:
        """Whether the folder has a run; one that failed before its first step does not count."""
        traces = (self.path / "metrics.jsonl").exists() or self._saved_states(self.path)
        return bool(traces and (self.path / "config.yaml").exists())

    def _has_settings(self) -> bool:
        """Whether config.yaml is exactly as a run writes it."""
        path = self.path / "config.yaml"
        try:
            return Config.from_dict(read_yaml(path)).to_yaml().encode() == path.read_bytes()
        except (OSError, TypeError, ValueError):
            return False

    def _remove_left_overs(self) -> None:
        """Remove temporary files of a killed run."""
        for folder in (self.path, self._states):
            for path in files.left_overs(folder):
                path.unlink()
        for path in _ours(self._states, "*.tmp", _HALF_WRITTEN):
            path.unlink()

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    def _keep_others_out(self) -> None:
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=_WAIT)
        except Timeout as error:
            raise RunError(
                f"another process trains in {self.path}: end it, or choose another --run-dir"
            ) from error
        except NotImplementedError:
            logger.warning("%s cannot be locked: start no second run in it", self.path)
        self._lock = lock

    def _check_continues(self) -> None:
        try:
            saved = Config.from_dict(read_yaml(self.path / "config.yaml")).to_dict()
        except (OSError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path}/config.yaml was not written by fastguard: {error}; choose another "
                "--run-dir"
            ) from error
        # The same command, given again after a kill, continues its run.
        if self.config.resume not in ("auto", saved["resume"]) or self.config.resume == "never":
            raise RunError(
                f"{self.path} already has a run: choose another --run-dir, or continue it with "
                "--resume auto"
            )
        if changed := changed_in_folder(saved, self.config.to_dict()):
            raise RunError(
                f"{self.path} has a run with other settings: {'; '.join(changed)}. Use the same "
                "to continue it, or choose another --run-dir (with --resume "
                f"{self.path} it starts from that run's state)"
            )

    # --- states to continue from ------------------------------------------------------------------

    def find_state(self) -> dict | None:
        """The newest readable state in this folder; None for a new run."""
        found = self._newest(self.path)
        if found is not None:
            logger.info("state: %s", found[0])
            self.newest = found[1]["step"]
            warn_without_text_rules(found[0], found[1]["config"])
            return found[1]
        if (self.path / "metrics.jsonl").exists():
            logger.warning(
                "%s has no state yet: the run starts again from the beginning", self.path
            )
        return None

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
            raise RunError(f"--resume {source}: the folder has no state")
        self._check_state_continues(*found)
        return found

    def _check_state_continues(self, path: Path, state: dict) -> None:
        """Raise RunError unless a run with these settings can continue from another run's state."""
        try:
            changed = contradictions(state, self.config)
            reason = nothing_left(state.get("epoch", 0), state["step"], self.config)
        except (TypeError, ValueError) as error:
            raise RunError(f"--resume {path} cannot be continued: {error}") from error
        begin = f"or begin anew with its weights: --init-from {path}"
        if changed:
            raise RunError(
                f"--resume {path} was trained with other settings: {'; '.join(changed)}. Use the "
                f"same, {begin}"
            )
        if reason is not None:
            raise RunError(
                f"--resume {path}: {reason}, so nothing is left to train. Give more, {begin}"
            )

    def _newest(self, folder: Path) -> tuple[Path, dict] | None:
        for path in reversed(self._saved_states(folder)):
            try:
                return path, _load(path)
            except CheckpointError as error:
                logger.warning("%s; using the state before it", error)
        return None

    def _saved_states(self, folder: Path) -> list[Path]:
        """Files of states, the oldest first."""
        return sorted(_ours(folder / "checkpoints", "step_*.pt", _STATE), key=_step_of)

    def _state_path(self, state: dict) -> Path:
        return self._states / f"step_{state['step']:09d}.pt"

    def save(self, state: dict) -> None:
        """Write a state and remove the oldest. A failure is a warning, because the run must go on.

        States of later steps are removed too: they could not be read, or belong to another course
        of the run.
        """
        path = self._state_path(state)
        try:
            checkpoint.save(path, state)
            files.link(path, self.path / "last.pt")
            states = self._saved_states(self.path)
            end = states.index(path) + 1
            for old in (*states[: max(0, end - self.config.checkpoint.keep_last)], *states[end:]):
                old.unlink()
            self.newest = state["step"]
            self.unsaved.pop("state", None)
        except (OSError, CheckpointError) as error:
            self.unsaved["state"] = str(error)
            logger.warning("No checkpoint at step %d, training continues: %s", state["step"], error)

    # --- the best weights -------------------------------------------------------------------------

    def save_best(self, weights: dict, found: Evaluation) -> None:
        """Keep weights that are among the best. The best of all are best.pt, with their hypotheses
        beside them."""
        rank = Rank(_rate(found), weights["loss"], weights["step"])
        path = self._states / rank.name
        kept = [other for other in self.best() if other != path]
        full = len(kept) >= self.config.checkpoint.keep_best
        if full and not rank < Rank.from_name(kept[-1].name):
            return
        try:
            checkpoint.save(path, weights)
            for again in self.best():
                if again != path and _step_of(again) == rank.step:
                    again.unlink()  # of the same epoch, repeated after a kill
            if self.best()[0] == path:
                self._promote(path, found)
            for worse in self.best()[self.config.checkpoint.keep_best :]:
                worse.unlink()
            self.unsaved.pop("best weights", None)
        except (OSError, CheckpointError) as error:
            self.unsaved["best weights"] = str(error)
            logger.warning("No best checkpoint, training continues: %s", error)

    def best(self) -> list[Path]:
        """Files of the best weights, the best first."""
        paths = _ours(self._states, "best_*.pt", NAME_OF_BEST)
        return sorted(paths, key=lambda path: Rank.from_name(path.name))

    def best_weights(self, wanted: Mapping[str, Tensor]) -> list[dict]:
        """The contents of these files, without those that cannot be read or do not fit ``wanted``,
        the state dict of the model."""
        weights = []
        for path in self.best():
            try:
                found = checkpoint.load(path)
                _check_fit(path, found, wanted)
            except CheckpointError as error:
                logger.warning("%s; the mean of the best weights is without it", error)
            else:
                weights.append(found)
        return weights

    def save_averaged(self, weights: dict, found: Evaluation) -> None:
        """Keep the mean of the best weights, also as best.pt if it is the best."""
        path = self.path / "averaged.pt"
        try:
            checkpoint.save(path, weights)
            if _rate(found) < Rank.from_name(self.best()[0].name).rate:
                self._promote(path, found)
        except (OSError, CheckpointError) as error:
            self.unsaved["averaged weights"] = str(error)
            logger.warning("No averaged checkpoint: %s", error)

    def look_for_newest(self) -> bool:
        """Set ``newest`` from the folder, where another process writes; return whether it has a
        state.

        Files are not read: a state gets its name when it is complete.
        """
        states = self._saved_states(self.path)
        self.newest = _step_of(states[-1]) if states else None
        return bool(states)

    def way_on(self) -> str:
        """A sentence on how the run can be continued."""
        if self.newest is None:
            return "no state was written: the same command starts again from the beginning"
        return (
            f"the same command with --run-dir {one_line(str(self.path))} continues from the state "
            f"of step {self.newest}"
        )

    def _promote(self, path: Path, found: Evaluation) -> None:
        """Make weights best.pt, unless it is better: the mean of a run that was continued."""
        best = self.path / "best.pt"
        try:
            present = checkpoint.load(best)
        except CheckpointError:
            present = {}
        rates = (present.get(name, math.inf) for name in ("wer", "cer"))
        if not comparable(*rates, len(found.rows), found.rates.words) < _rate(found):
            files.link(path, best)
            write(self.path, found)


def _load(path: Path) -> dict:
    state = checkpoint.load(path)
    if missing := {"optimizer", "guard", "loader", "random", "step"} - set(state):
        raise CheckpointError(
            f"{path} has weights, but no state to continue from: it lacks {sorted(missing)}"
        )
    if type(step := state["step"]) is not int or not 0 <= step < _MOST_STEPS:
        raise CheckpointError(f"{path} is of step {shown(step)}, which is not a number of steps")
    return state


def _check_fit(path: Path, weights: dict, wanted: Mapping[str, Tensor]) -> None:
    try:
        checkpoint.check_fit(weights["model"], wanted)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error


def _but_the_lock(folder: Path) -> Iterator[Path]:
    """The files in a folder, without an empty lock, which a killed run leaves."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != "lock" or path.stat().st_size:
            yield path


def _ours(folder: Path, pattern: str, name: re.Pattern) -> Iterator[Path]:
    """Files with names of a run. Links are left out, because a run makes none."""
    for path in folder.glob(pattern):
        if name.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            yield path


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _rate(found: Evaluation) -> float:
    """The number by which the evaluated weights are compared with others."""
    rates = found.rates
    return comparable(rates.wer, rates.cer, len(found.rows), rates.words)
