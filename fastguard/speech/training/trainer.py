"""Training of a CTC speech model: the order of epochs, steps, evaluations and checkpoints."""

import contextlib
import logging
import math
import random
import time

import numpy
import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastguard._io.failures import in_a_line
from fastguard.guard.report_files import GradientExplosionError
from fastguard.speech.data.batching import Batch, LoadError
from fastguard.speech.data.tokenizer import Tokenizer, tokenizer_from_dict
from fastguard.speech.recognition.evaluation import Evaluation
from fastguard.speech.recognition.recognizer import Recognizer, untrained_model
from fastguard.speech.storage import checkpoint

from .agreement import Agreement
from .config import Config
from .data import Data
from .evaluator import Evaluator
from .initial_weights import InitialWeights
from .journal import Journal
from .learner import Learner
from .parallel import Parallel
from .precision import float32_weights
from .progress import Progress
from .resumed import nothing_left
from .run_folder import RunError, RunFolder
from .run_state import RunState
from .schedules import capped_warmup, learning_rate, set_learning_rate
from .stepper import build_optimizer, build_stepper, forget_norms
from .teacher import load_teacher

logger = logging.getLogger(__name__)


class Trainer:
    """A model, its data and all that a run changes. ``fit`` trains; for settings see config.py.

    If the run folder holds a state, the run continues from it: the losses that follow are those of
    a run that was never interrupted.

    Args:
        config: the settings.
        folder: of the run, begun in the main process.
        parallel: the processes that train together.

    Raises:
        CorpusError: the corpus is absent or has nothing to train on.
        RunError: the state does not fit the settings.
    """

    def __init__(self, config: Config, folder: RunFolder, parallel: Parallel):
        self.config = config
        self.folder = folder
        self.parallel = parallel
        random.seed(config.seed)
        numpy.random.seed(config.seed)
        torch.manual_seed(config.seed)
        state = folder.find_state()

        teacher = load_teacher(config, parallel.device) if config.teacher else None
        initial = InitialWeights(config) if config.init_from and state is None else None
        lists = folder.path if parallel.main else None
        preferred = None if initial is None else initial.tokenizer
        self.data = Data(config, _known_tokenizer(state, teacher), lists, preferred)
        self.tokenizer = self.data.tokenizer
        self.learner = Learner(config, self.tokenizer, initial, teacher, parallel)
        self.optimizer = build_optimizer(config, self.learner.model, parallel.world_size)
        self.stepper = build_stepper(config, self.learner.model, parallel, folder.path)
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(parallel.device.type) if fp16 else None
        self.sampler, self.loader = self.data.train_loader(parallel)
        self._warmup = self._steps_of_warmup()
        self.progress = Progress()
        self.agreement = Agreement(parallel)
        self.journal = Journal(config)
        self.evaluator = Evaluator(
            self.learner, self.data, self.data.evaluation_split, self.agreement
        )
        if parallel.main:
            self.data.warn_of_evaluation()
        self.state = RunState(
            config,
            parallel,
            self.tokenizer,
            self.learner,
            self.optimizer,
            self.stepper,
            self.scaler,
            self.sampler,
            self.loader,
            self.progress,
        )
        self._half_stepped = False  # the optimizer's step has begun, and not ended
        self._saved_at = time.monotonic()
        if parallel.rank:  # its own dropout, now that all processes have the same weights
            torch.manual_seed(config.seed + parallel.rank)
        if state is not None:
            self.state.restore(state)

    @property
    def stopping(self) -> bool:
        """Whether a signal ends the run; the same in all processes."""
        return self.agreement.stopping

    # --- epochs -----------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train for ``config.epochs`` or ``config.max_steps``, whichever ends first.

        Every epoch ends with an evaluation on the dev split and a checkpoint. If ``max_steps`` ends
        the run inside an epoch, the checkpoint is written before the evaluation and continues in
        that epoch. Ctrl-C ends the run after the current step, or the current batch of an
        evaluation, with a checkpoint; a second Ctrl-C ends it at once.

        Raises:
            GradientExplosionError: the guard's patience is spent.
            LoadError: a process, or one of its workers, could not load a batch.

        A checkpoint is written before these errors, and, in a run of one process, before any other
        error.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.agreement.stop_on_signals())
            stack.enter_context(logging_redirect_tqdm([logging.getLogger("fastguard")]))
            if self.parallel.main:
                stack.enter_context(self.journal.writing_to(self.folder.path, self.progress))
            self._saved_at = time.monotonic()
            try:
                self._train()
            except Exception as error:
                self._save_after(error)
                raise
            self.parallel.wait()  # gloo may abort a process that another one leaves behind
        self.journal.end(self.progress, self.folder, self.stopping)

    def _train(self) -> None:
        progress = self.progress
        if reason := nothing_left(len(progress.epochs), progress.step, self.config):
            logger.info("Nothing is left to train: %s; a larger number trains on", reason)
        while self.progress.epoch <= self.config.epochs and not self._finished():
            self._train_epoch()
        if self.progress.batches and not self.stopping:
            self._close_epoch()
        if not self.stopping:
            self._average_best()

    def _finished(self) -> bool:
        most = self.config.max_steps
        return self.stopping or (most is not None and self.progress.step >= most)

    def _train_epoch(self) -> None:
        self._set_frozen()
        self.learner.train()
        self.sampler.set_epoch(self.progress.epoch)
        total = len(self.sampler)
        if self.progress.batches < total:  # a state may be of the moment before the evaluation
            self._train_batches(total)
        self.stepper.poll(wait=True)
        if self.stopping or self.progress.batches < total:
            self._save()
        else:
            self._close_epoch()

    def _set_frozen(self) -> None:
        """Freeze the encoder in the first epochs, if the settings ask for it."""
        frozen, progress = self.config.freeze_encoder, self.progress
        self.learner.freeze_encoder(progress.epoch <= frozen)
        if not frozen or progress.batches:
            return
        if progress.epoch == 1:
            logger.info("Only the head learns until the end of epoch %d", frozen)
        elif progress.epoch == frozen + 1:
            forget_norms(self.stepper)
            logger.info("The whole model learns from now on")

    def _train_batches(self, total: int) -> None:
        steps = self.agreement.micro_batches(iter(self.loader), self.config.grad_accumulation)
        self.state.restore_random()
        bar = tqdm(
            total=total,
            initial=self.progress.batches,
            desc=f"epoch {self.progress.epoch}/{self.config.epochs}",
            leave=False,
            disable=None if self.parallel.main else True,
            unit="batch",
        )
        clock = time.perf_counter()
        for micro_batches in steps:
            loss = self._train_step(micro_batches, clock)
            clock = time.perf_counter()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(len(micro_batches))
            if self._finished():
                break
            if self.progress.batches < total and self._save_is_due():
                self._save()
        bar.close()

    def _close_epoch(self) -> None:
        """Evaluate, keep the weights if they are among the best, and write the state.

        If more batches of the epoch are to come, the state is already written, and continues in
        the epoch.
        """
        start = time.perf_counter()
        found = self.evaluate(self.learner.evaluated)
        if self.stopping:
            self._save()
            return
        whole = self.progress.batches >= len(self.sampler)
        seconds = time.perf_counter() - start
        ended = self.progress.close_epoch(found, self.evaluator.split, seconds, whole)
        self.journal.epoch(ended, seconds)
        weights = self.state.weights(ended)
        if self.parallel.main:
            self.folder.save_best(weights, found)
        if whole:
            self._save()

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Greedy decoding of the evaluation split; every process gets all rows of it."""
        return self.evaluator(model)

    def _average_best(self) -> None:
        """Evaluate the mean of the best weights, and keep it."""
        wanted = float32_weights(self.learner.model, self.optimizer)
        best = self.folder.best_weights(wanted) if self.parallel.main else []
        mean = self.parallel.from_main(checkpoint.average(best) if len(best) > 1 else None)
        if mean is None:
            return
        model = untrained_model(self.config, self.tokenizer.vocab_size).to(self.parallel.device)
        model.load_state_dict(mean["model"])
        found = self.evaluate(model)
        if self.stopping:
            return
        logger.info(
            "Mean of the %d best: wer=%.3f, cer=%.3f; the best alone: wer=%.3f, cer=%.3f",
            len(best),
            found.rates.wer,
            found.rates.cer,
            mean["wer"],
            mean.get("cer", math.nan),  # older versions did not write it
        )
        if self.parallel.main:
            rates = {"wer": found.rates.wer, "cer": found.rates.cer}
            self.folder.save_averaged({**mean, **rates}, found)

    # --- a step -----------------------------------------------------------------------------------

    def _train_step(self, micro_batches: list[Batch], clock: float) -> float:
        """Forward, backward and the guarded step; the loss per output frame."""
        progress, number = self.progress, self.progress.batches
        self._set_learning_rate()
        self.optimizer.zero_grad()
        ids = [id for batch in micro_batches for id in batch.ids]
        for row in self.agreement.rejected:
            logger.warning("Left out %s: %s", row.id, row.reason)
        with self.learner.undo_on_failure():
            loss = self.learner.backward(micro_batches, number, self.stepper, self.scaler)
        progress.batches += len(micro_batches)
        if loss is None:
            return float("nan")
        explosion = None
        self._half_stepped = True
        try:
            name = f"{number} [{', '.join(ids)}]"
            report = self.stepper.step(self.optimizer, scaler=self.scaler, loss=loss, batch_id=name)
        except GradientExplosionError as error:
            report, explosion = error.reports[-1], error
        progress.step += 1
        if self.learner.ema is not None and not report.skipped:
            self.learner.update_average(self.optimizer)
        self._half_stepped = False
        loss = self.parallel.sum(loss.item()) / self.parallel.world_size
        self.journal.step(
            progress,
            number,
            loss,
            report,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - clock,
            ids=ids,
            rejected=self.agreement.rejected,
            batches=len(self.sampler),
        )
        if explosion is not None:
            raise explosion
        return loss

    def _steps_of_warmup(self) -> int:
        """The settings' warm-up, or less of it in a short run, which is logged.

        It is called before a state is restored: the number of batches depends on the epoch.
        """
        config = self.config
        steps = config.epochs * math.ceil(len(self.sampler) / config.grad_accumulation)
        if config.max_steps is not None:
            steps = min(steps, config.max_steps)
        warmup = capped_warmup(config.optim.warmup, steps)
        if warmup < config.optim.warmup:
            logger.info(
                "Warm-up of %d steps, not optim.warmup=%d: at most a fifth of the run's %d steps",
                warmup,
                config.optim.warmup,
                steps,
            )
        return warmup

    def _set_learning_rate(self) -> None:
        optim, progress = self.config.optim, self.progress
        part = (progress.epoch - 1 + progress.batches / len(self.sampler)) / self.config.epochs
        if self.config.max_steps is not None:
            part = max(part, progress.step / self.config.max_steps)
        set_learning_rate(
            self.optimizer,
            learning_rate(optim.schedule, optim.lr, self._warmup, progress.step, part),
        )

    # --- states -----------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        due = self.config.checkpoint
        late = time.monotonic() - self._saved_at > 60 * due.minutes
        return self.parallel.any(late) or (
            due.steps is not None and self.progress.step % due.steps == 0
        )

    def _save(self) -> None:
        """Write the state after which the next step would be the same."""
        state = self.state.collect()
        if self.parallel.main:
            self.folder.save(state)
        self._saved_at = time.monotonic()

    def _save_after(self, error: Exception) -> None:
        """Write the state of the last whole step, if this process has it and the others are here
        to add theirs. If that fails, the run still ends with ``error``."""
        together = isinstance(error, (GradientExplosionError, LoadError))
        alone = self.parallel.world_size == 1
        saved = self.folder.newest == self.progress.step
        if self._half_stepped or saved or not (alone or together):
            return
        try:
            self._save()
        except Exception as another:
            logger.warning("No checkpoint at step %d: %s", self.progress.step, in_a_line(another))


def _known_tokenizer(state: dict | None, teacher: Recognizer | None) -> Tokenizer | None:
    """The tokenizer of the state, or of the teacher, whose symbols the student must have."""
    if state is not None:
        try:
            return tokenizer_from_dict(state["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the state has no tokenizer: {error}") from error
    return None if teacher is None else teacher.tokenizer
