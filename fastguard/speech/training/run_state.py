"""All that a run changes, as one dict for a checkpoint, and back."""

import logging
from dataclasses import dataclass, field

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from fastguard._random import random_state, set_random_state
from fastguard.guard import GradGuard
from fastguard.speech.data.sampler import BucketBatchSampler
from fastguard.speech.data.tokenizer import Tokenizer

from .config import Config
from .learner import Learner
from .metrics import EpochMetrics
from .parallel import Parallel
from .precision import float32_weights
from .progress import Progress
from .run_folder import RunError
from .state_schema import check_state
from .stepper import PlainClip, set_options

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds."""

    config: Config
    parallel: Parallel
    tokenizer: Tokenizer
    learner: Learner
    optimizer: torch.optim.Optimizer
    stepper: "GradGuard | PlainClip"
    scaler: torch.amp.GradScaler | None
    sampler: BucketBatchSampler
    loader: StatefulDataLoader
    progress: Progress
    _random: dict | None = field(default=None, init=False)  # for when the loader has begun

    def collect(self) -> dict:
        """The state after which the next step would be the same. Every process must take part."""
        learner = self.learner
        weights, moments = self.parallel.state_of(learner.model, self.optimizer)
        loaders = self.parallel.gather(self._place())
        numbers = self.parallel.gather(self._random or random_state(learner.device))
        return {
            **self._description(),
            "model": weights,
            "ema": None if learner.ema is None else learner.ema.state_dict(),
            "optimizer": moments,
            "guard": self.stepper.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "loader": loaders,
            "random": numbers,
            **self.progress.to_dict(),
        }

    def weights(self, ended: EpochMetrics) -> dict:
        """The evaluated weights with all that recognition needs, and what they are ranked by.

        Every process must take part.

        Args:
            ended: metrics of the epoch that gave these weights.
        """
        evaluated = self.learner.evaluated
        trained = evaluated is self.learner.model
        weights = self.parallel.weights_of(evaluated, self.optimizer if trained else None)
        rates = {"wer": ended.wer, "cer": ended.cer, "loss": ended.loss}
        return {**self._description(), "model": weights, **rates}

    def restore(self, state: dict) -> None:
        """Take over a state that :meth:`collect` gave.

        Raises:
            RunError: the state does not fit the settings.
        """
        learner = self.learner
        try:
            check_state(
                state,
                float32_weights(learner.model, self.optimizer),
                None if learner.ema is None else learner.ema.state_dict(),
                self.optimizer,
                self.scaler,
                len(self.sampler),
                self.parallel.world_size,
            )
            # A frozen encoder has no moments in the state. FSDP wants those of all that learns.
            trained = state["epoch"] + (state["batches"] > 0)
            learner.freeze_encoder(trained <= self.config.freeze_encoder)
            self.parallel.load(learner.model, self.optimizer, state["model"], state["optimizer"])
            set_options(self.optimizer, self.config)
            if learner.ema is not None:
                learner.ema.load_state_dict(state["ema"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.stepper.load_state_dict(state["guard"])
            self.progress.restore(state)
            self._restore_place(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"the state does not fit these settings: {error}") from error
        logger.info("Continuing at step %d, epoch %d", self.progress.step, self.progress.epoch)

    def restore_random(self) -> None:
        """Set the random numbers of the restored state. This comes right before the first step,
        because a loader draws a number when it begins."""
        if self._random is not None:
            set_random_state(self._random, self.learner.device)
            self._random = None

    def _place(self) -> dict:
        """The place in the epoch: after the batches that were trained on, not those read ahead."""
        return {**self.sampler.state_dict(), "position": self.progress.batches}

    def _description(self) -> dict:
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "config": self.config.to_dict(),
            "step": self.progress.step,
            "epoch": len(self.progress.epochs),
        }

    def _restore_place(self, state: dict) -> None:
        """Restore the place in the epoch and the random numbers of this process."""
        saved = len(state["loader"])
        if saved != self.parallel.world_size:
            logger.warning(
                "The state is of %d processes and there are %d: the epoch starts again",
                saved,
                self.parallel.world_size,
            )
            self.progress.begin_epoch()
            return
        if self.progress.batches:
            self.loader.load_state_dict(state["loader"][self.parallel.rank])
        self._random = state["random"][self.parallel.rank]
