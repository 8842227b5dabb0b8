"""Training of a CTC speech model; the guard's first user."""

import contextlib
import dataclasses
import logging
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastguard._io.failures import in_a_line
from fastguard.guard.report import PendingReport, StepReport
from fastguard.guard.report_files import GradientExplosionError
from fastguard.speech.data.batching import Batch, LoadError
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.tokenizer import Tokenizer, tokenizer_from_dict
from fastguard.speech.recognition.evaluation import Evaluation, evaluate
from fastguard.speech.recognition.recognizer import network
from fastguard.speech.storage import checkpoint
from fastguard.stable_init import stable_init_

from .config import Config
from .data import Data
from .distillation import consistency_loss, distillation_loss
from .loss import ctc_loss
from .metrics import EpochMetrics, EpochTotals, MetricsFile, StepMetrics, epoch_table
from .parallel import Parallel
from .precision import autocast
from .random_state import random_state, set_random_state
from .run_folder import RunError, RunFolder
from .schedules import learning_rate, set_learning_rate
from .state_schema import check_state
from .stepper import build_optimizer, build_stepper, set_options
from .teacher import load_teacher
from .tracking import Curves

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_SIGNAL = 1.0  # seconds in which a second one is the same: a terminal's and torchrun's Ctrl-C
_NORMS_EVERY = 50  # steps between curves of each parameter's norm


class Trainer:
    """A model, its data and all that a run changes. ``fit`` trains; for settings see config.py.

    Where the run folder holds a state, everything is as it was when that was written: the losses
    that follow are those of a run that was never interrupted.

    Raises:
        CorpusError: the corpus is absent or has nothing to train on.
        RunError: the state does not fit the settings.
    """

    def __init__(self, config: Config, folder: RunFolder, parallel: Parallel):
        self.config = config
        self.folder = folder
        self.parallel = parallel
        self.device = parallel.device
        random.seed(config.seed)
        numpy.random.seed(config.seed)
        torch.manual_seed(config.seed)
        state = folder.find_state()

        self.teacher = load_teacher(config, self.device) if config.teacher else None
        lists = folder.path if parallel.main else None
        self.data = Data(config, self._known_tokenizer(state), lists)
        self.tokenizer = self.data.tokenizer
        self.model = self._build_model().to(self.device)
        self.forward = parallel.wrap(self.model)
        if config.compile:
            self.forward = torch.compile(self.forward, dynamic=True)
        self.ema = self._build_ema() if config.ema else None
        self.optimizer = build_optimizer(config, self.model)
        self.stepper = build_stepper(config, self.model, parallel, folder.path)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.sampler, self.loader = self.data.train_loader(parallel)
        self.evaluation_split = "dev" if self.data.corpus.split("dev") else "train"
        if self.evaluation_split == "train":
            logger.warning(
                "%s has no dev split: the error rates are those of the training split", config.data
            )
        evaluated = self.data.corpus.split(self.evaluation_split)
        self._durations = {u.id: u.duration for u in evaluated}
        self.step = 0
        self.epochs: list[EpochMetrics] = []
        self.unfinished: EpochMetrics | None = None  # of the epoch in which max_steps ends the run
        self.totals = EpochTotals()  # of the epoch that is under way
        self.batches = 0  # of that epoch, behind us
        self._rejected: list[Rejected] = []  # of the step that is under way, in all processes
        self._torn = False  # the optimizer's step has begun, and not ended
        self.stopping = False  # in all processes alike; what a signal asks for, they agree on
        self._asked: float | None = None  # when a signal asked this process to stop
        self.sinks: list = []  # of metrics; open while fit runs
        self._random: dict | None = None  # to be restored when the loader has begun
        if parallel.rank:  # dropout of its own, now that all have begun with the same weights
            torch.manual_seed(config.seed + parallel.rank)
        if state is not None:
            self._restore(state)

    def _known_tokenizer(self, state: dict | None) -> Tokenizer | None:
        """That of the state, or of the teacher, whose symbols the student's must be."""
        if state is not None:
            try:
                return tokenizer_from_dict(state["tokenizer"])
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"the state has no tokenizer: {error}") from error
        return None if self.teacher is None else self.teacher.tokenizer

    def _build_model(self) -> nn.Module:
        config = self.config
        model = network(config, self.tokenizer.vocab_size)
        stable_init_(model, config.init.linear_std, config.init.conv_scale)
        logger.info(
            "%s: %.1f M parameters on %s%s, %s",
            config.model,
            sum(p.numel() for p in model.parameters()) / 1e6,
            self.device,
            f" x {self.parallel.world_size}" if self.parallel.world_size > 1 else "",
            config.precision,
        )
        return model

    def _build_ema(self) -> AveragedModel:
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema))

    # --- training ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train for ``config.epochs`` or ``config.max_steps``, whichever ends first.

        Every epoch ends with an evaluation on the dev split and a checkpoint; where ``max_steps``
        ends the run inside an epoch, the checkpoint comes first, and goes on in that epoch. Ctrl-C
        ends the run after the step it is in, or the batch of an evaluation, with a checkpoint; a
        second Ctrl-C at once.

        Raises:
            GradientExplosionError: the guard's patience is spent.
            LoadError: a process, or one of its workers, could not load a batch.

        Before these, and where it trains alone before any other error, a checkpoint is written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._stop_on_interrupt())
            stack.enter_context(logging_redirect_tqdm([logging.getLogger("fastguard")]))
            self.sinks = self._open_sinks(stack)
            self._saved_at = time.monotonic()
            try:
                while len(self.epochs) < self.config.epochs and not self._finished():
                    self._train_epoch(len(self.epochs) + 1)
                if self.batches and not self.stopping:
                    self._close_epoch(len(self.epochs) + 1)
                if not self.stopping:
                    self._average_best()
            except Exception as error:
                self._save_after(error)
                raise
            self.parallel.wait()  # gloo may abort a process that another one leaves behind
        logger.info("\n%s", epoch_table([*self.epochs, *filter(None, [self.unfinished])]))
        self._tell_the_end()

    def _open_sinks(self, stack: contextlib.ExitStack) -> list:
        """Where metrics go: nowhere but in the process that writes."""
        if not self.parallel.main:
            return []
        path = self.folder.path
        skips = sum(epoch.skipped for epoch in self.epochs) + self.totals.skipped
        sinks = [
            MetricsFile(path / "metrics.jsonl", self.step, len(self.epochs)),
            Curves(path / "tensorboard", self.step, skips),
        ]
        return [stack.enter_context(contextlib.closing(sink)) for sink in sinks]

    def _record(self, metrics: StepMetrics | EpochMetrics) -> None:
        for sink in self.sinks:
            sink.write(metrics)

    def _finished(self) -> bool:
        most = self.config.max_steps
        return self.stopping or (most is not None and self.step >= most)

    def _tell_the_end(self) -> None:
        how = "Stopped" if self.stopping else "Finished"
        if unsaved := self.folder.unsaved:
            reasons = "; ".join(f"no {what}: {reason}" for what, reason in unsaved.items())
            logger.error(
                "%s at step %d, but not all could be written (%s); %s",
                how,
                self.step,
                reasons,
                self.folder.way_on(),
            )
        elif self.stopping:
            logger.info("Stopped at step %d; %s", self.step, self.folder.way_on())
        else:
            logger.info("Finished at step %d; results are in %s", self.step, self.folder.path)

    def _train_epoch(self, epoch: int) -> None:
        self.model.train()
        self.sampler.set_epoch(epoch)
        total = len(self.sampler)
        if self.batches < total:  # a state may be of the moment before the evaluation
            self._train_batches(epoch, total)
        self.stepper.poll(wait=True)
        if self.stopping or self.batches < total:
            self._save()
        else:
            self._close_epoch(epoch)

    def _train_batches(self, epoch: int, total: int) -> None:
        windows = self._agreed(iter(self.loader), self.config.grad_accumulation)
        self._restore_random()
        bar = tqdm(
            total=total,
            initial=self.batches,
            desc=f"epoch {epoch}/{self.config.epochs}",
            leave=False,
            disable=None if self.parallel.main else True,
            unit="batch",
        )
        clock = time.perf_counter()
        for window in windows:
            number = self.batches
            self.batches += len(window)
            loss = self._train_step(window, epoch, number, clock)
            clock = time.perf_counter()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(len(window))
            if self._finished():
                break
            if self.batches < total and self._save_is_due():
                self._save()
        bar.close()

    def _close_epoch(self, epoch: int) -> None:
        """Evaluate, keep the weights if they are among the best, and write the state, unless there
        is more to come of the epoch: that state is written already, and goes on in it."""
        start = time.perf_counter()
        found = self.evaluate(self.evaluated)
        if self.stopping:
            self._save()
            return
        ended = self.totals.close(epoch, self.step, found, time.perf_counter() - start)
        self._record(ended)
        logger.info(
            "Epoch %d: loss=%.3f, grad_norm=%.2f, wer=%.3f, cer=%.3f, skipped=%d/%d, %.0f s (%s)",
            epoch,
            ended.loss,
            ended.grad_norm,
            ended.wer,
            ended.cer,
            ended.skipped,
            ended.steps,
            ended.seconds,
            ended.status,
        )
        whole = self.batches >= len(self.sampler)
        if whole:
            self.epochs.append(ended)
            self.totals = EpochTotals()
            self.batches = 0
        else:
            self.unfinished = ended
        weights = self._weights(ended.wer)
        if self.parallel.main:
            self.folder.save_best(weights, found)
        if whole:
            self._save()

    # --- a step -----------------------------------------------------------------------------------

    def _train_step(self, window: list[Batch], epoch: int, number: int, clock: float) -> float:
        """Forward, backward and the guarded step of a window of batches; its loss."""
        self._set_learning_rate(epoch, number)
        self.optimizer.zero_grad()
        ids = [id for batch in window for id in batch.ids]
        name = f"{number} [{', '.join(ids)}]"
        for row in self._rejected:
            logger.warning("Left out %s: %s", row.id, row.reason)
        with self._undone_on_failure(number):
            loss = self._backward(window, number)
        if loss is None:
            return float("nan")
        explosion = None
        self._torn = True
        try:
            report = self.stepper.step(self.optimizer, scaler=self.scaler, loss=loss, batch_id=name)
        except GradientExplosionError as error:
            report, explosion = error.reports[-1], error
        self.step += 1
        if self.ema is not None and not report.skipped:
            self.ema.update_parameters(self.model)
        self._torn = False
        loss = self.parallel.sum(loss.item()) / self.parallel.world_size
        self._record_step(epoch, number, loss, report, time.perf_counter() - clock, ids)
        if explosion is not None:
            raise explosion
        return loss

    @contextlib.contextmanager
    def _undone_on_failure(self, number: int):
        """What fails before the optimizer's step, as for want of memory, leaves what there was
        before it: a state to go on from. Of the model a forward pass changes the buffers alone."""
        numbers = random_state(self.device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            yield
        except Exception:
            self.batches = number
            set_random_state(numbers, self.device)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise

    def _backward(self, window: list[Batch], number: int) -> Tensor | None:
        """Gradients of the loss per output frame of the whole window; None if it is empty."""
        losses, frames = [], []
        for place, batch in enumerate(window, start=number):
            loss, count = self._loss(batch)
            everywhere = self.parallel.sum(count)
            if everywhere == 0:
                continue
            # DistributedDataParallel and FSDP take the mean over processes.
            loss = loss * (count * self.parallel.world_size / everywhere)
            losses.append(loss.detach())
            frames.append(everywhere)
            accumulates = self.config.grad_accumulation > 1
            total = loss * everywhere if accumulates else loss  # a window divides by its weights
            (total if self.scaler is None else self.scaler.scale(total)).backward()
            if accumulates:
                self.stepper.accumulate(
                    scaler=self.scaler,
                    loss=losses[-1],
                    batch_id=f"{place} [{', '.join(batch.ids)}]",
                    weight=everywhere,
                )
        if not losses:
            return None
        weights = torch.tensor(frames, device=self.device, dtype=torch.float32)
        return (torch.stack(losses) * weights).sum() / weights.sum()

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Loss per output frame of a batch, and its output frames."""
        if not len(batch):  # every process must take part in a step of all
            self.model.eval()  # the silence is no speech for BatchNorm to learn from
            log_probs, _ = self._forward(*self._silence())
            self.model.train()
            return log_probs.sum() * 0.0, 0
        batch = batch.to(self.device)
        log_probs, lengths = self._forward(batch.features, batch.feature_lengths)
        loss = ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths)
        if batch.views > 1:
            loss = loss + self.config.consistency.weight * consistency_loss(log_probs, lengths)
        if self.teacher is not None:
            distill = self.config.distill
            with autocast(self.device, self.config.precision):
                targets, _ = self.teacher(batch.features, batch.feature_lengths)
            distance = distillation_loss(log_probs, targets, lengths, distill.temperature)
            loss = (1 - distill.weight) * loss + distill.weight * distance
        return loss, int(lengths.sum())

    def _silence(self) -> tuple[Tensor, Tensor]:
        """Features and length of what stands in for a batch of nothing."""
        return torch.zeros(1, 8, self.config.features.n_mels, device=self.device), torch.tensor([8])

    def _forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.parallel.sharded:
            self.parallel.share_buffers(self.model)
        with autocast(self.device, self.config.precision):
            return self.forward(features, lengths)

    def _set_learning_rate(self, epoch: int, number: int) -> None:
        optim = self.config.optim
        progress = (epoch - 1 + number / len(self.sampler)) / self.config.epochs
        if self.config.max_steps is not None:
            progress = max(progress, self.step / self.config.max_steps)
        set_learning_rate(
            self.optimizer,
            learning_rate(optim.schedule, optim.lr, optim.warmup, self.step, progress),
        )

    def _record_step(
        self,
        epoch: int,
        number: int,
        loss: float,
        report: StepReport | PendingReport,
        seconds: float,
        ids: list[str],
    ) -> None:
        metrics = StepMetrics(
            self.step,
            epoch,
            number,
            loss,
            report.total_norm,
            report.clip_coef,
            report.verdict.name.lower(),
            self.optimizer.param_groups[0]["lr"],
            seconds,
            tuple(ids) if report.skipped else (),
            report.nonfinite,
            report.loss_scale,
            report.scale_search,
            tuple(row.id for row in self._rejected),
        )
        self.totals.add(metrics)
        self._record(metrics)
        if self.step % _NORMS_EVERY == 0 and isinstance(report, PendingReport) and self.sinks:
            self.sinks[-1].write_norms(report.norms(), self.step)
        logger.info("Batch %d: loss=%.2f, grad_norm=%.2f", number, loss, report.total_norm)

    @contextlib.contextmanager
    def _stop_on_interrupt(self):
        """Ctrl-C, and SIGTERM, with which schedulers announce that they take the machine away."""

        def stop(signum, frame):
            if self._asked is None:
                self._asked = time.monotonic()
                logger.info("Stopping after this step; Ctrl-C again stops at once")
            elif time.monotonic() - self._asked > _ONE_SIGNAL:
                raise KeyboardInterrupt

        previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _agreed(self, batches: Iterator[Batch], size: int = 1) -> Iterator[list[Batch]]:
        """The batches of a step each, to the end or till one process is asked to stop.

        One that went on alone, or stopped alone, would leave the others waiting for ever.

        Raises:
            LoadError: in all processes alike, where one can not load its batches.
        """
        while True:
            window, failure = [], None
            try:
                window = list(islice(batches, size))
            except Exception as error:
                failure = error
            self._agree(window, failure)
            if self.stopping or not window:
                return
            yield window

    def _agree(self, window: Sequence[Batch] = (), failure: Exception | None = None) -> None:
        """In one sum how many are asked to stop, failed, and left out rows; rarely more is said."""
        failed, left_out = 1 << 16, 1 << 32  # each more than there are processes
        rejected = [row for batch in window for row in batch.rejected]
        asked = self._asked is not None
        votes = self.parallel.sum(
            asked + failed * (failure is not None) + left_out * bool(rejected)
        )
        if votes % left_out >= failed:
            causes = self.parallel.gather(None if failure is None else in_a_line(failure))
            raise LoadError(next(filter(None, causes))) from failure
        everywhere = self.parallel.gather(rejected) if votes >= left_out else []
        self._rejected = [row for rows in everywhere for row in rows]
        self.stopping = votes % failed > 0

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Greedy decoding of the dev split; every process gets the whole of it.

        Where a signal ends it early it is not whole, and ``stopping`` is set.
        """
        model.eval()
        self.parallel.share_buffers(model)

        def forward(batch: Batch) -> tuple[Tensor, Tensor]:
            with autocast(self.device, self.config.precision):
                return model(batch.features.to(self.device), batch.feature_lengths.to(self.device))

        @torch.no_grad()
        def agreed() -> Iterator[Batch]:
            for (batch,) in self._agreed(iter(loader)):
                if not len(batch) and self.parallel.sharded:  # every process must gather the shards
                    with autocast(self.device, self.config.precision):
                        model(*self._silence())
                yield batch

        loader = self.data.evaluation_loader(self.evaluation_split, self.parallel)
        found = evaluate(
            forward,
            _Sized(agreed, len(loader)),
            self.tokenizer,
            durations=self._durations,
            progress=f"evaluating {self.evaluation_split}",
        )
        shares = self.parallel.gather(found.rows)
        # Where the batches do not divide, some come twice.
        return Evaluation(list({row.id: row for rows in shares for row in rows}.values()))

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept as best: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    # --- states -----------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        due = self.config.checkpoint
        late = time.monotonic() - self._saved_at > 60 * due.minutes
        return self.parallel.any(late) or (due.steps is not None and self.step % due.steps == 0)

    def _save(self) -> None:
        """Write the state, from which the next step would be the same."""
        weights, moments = self.parallel.state_of(self.model, self.optimizer)
        loaders = self.parallel.gather(self._place())
        numbers = self.parallel.gather(self._random or random_state(self.device))
        guard = self.stepper.state_dict()
        if self.parallel.main:
            self.folder.save(
                {
                    **self._description(),
                    "model": weights,
                    "ema": None if self.ema is None else self.ema.state_dict(),
                    "optimizer": moments,
                    "guard": guard,
                    "scaler": None if self.scaler is None else self.scaler.state_dict(),
                    "loader": loaders,
                    "random": numbers,
                    "batches": self.batches,
                    "totals": dataclasses.asdict(self.totals),
                    "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
                }
            )
        self._saved_at = time.monotonic()

    def _save_after(self, error: Exception) -> None:
        """Write the state of the last whole step, if this process has it and the others are here
        to add theirs. Whatever comes of it, the run ends with the error that it has."""
        together = isinstance(error, (GradientExplosionError, LoadError))
        alone = self.parallel.world_size == 1
        if self._torn or self.folder.newest == self.step or not (alone or together):
            return
        try:
            self._save()
        except Exception as another:
            logger.warning("No checkpoint at step %d: %s", self.step, in_a_line(another))

    def _place(self) -> dict:
        """In the epoch: after the batches that were trained on, not those that were read."""
        return {**self.sampler.state_dict(), "position": self.batches}

    def _weights(self, wer: float) -> dict:
        """What is evaluated, for recognition."""
        weights = self.parallel.weights_of(self.evaluated)
        return {**self._description(), "model": weights, "wer": wer}

    def _description(self) -> dict:
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "config": self.config.to_dict(),
            "step": self.step,
            "epoch": len(self.epochs),
        }

    def _restore(self, state: dict) -> None:
        try:
            check_state(
                state,
                self.model.state_dict(),
                None if self.ema is None else self.ema.state_dict(),
                self.optimizer,
                self.scaler,
                len(self.sampler),
                self.parallel.world_size,
            )
            self.parallel.load(self.model, self.optimizer, state["model"], state["optimizer"])
            set_options(self.optimizer, self.config)
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.stepper.load_state_dict(state["guard"])
            self.step = state["step"]
            self.batches = state["batches"]
            self.totals = EpochTotals(**state["totals"])
            self.epochs = [EpochMetrics(**epoch) for epoch in state["epochs"]]
            self._restore_place(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"the state does not fit these settings: {error}") from error
        logger.info("Continuing at step %d, epoch %d", self.step, len(self.epochs) + 1)

    def _restore_place(self, state: dict) -> None:
        """Where in the epoch, and the random numbers of each process."""
        if len(state["loader"]) != self.parallel.world_size:
            logger.warning(
                "The state is of %d processes and there are %d: the epoch begins anew",
                len(state["loader"]),
                self.parallel.world_size,
            )
            self.batches, self.totals = 0, EpochTotals()
            return
        if self.batches:
            self.loader.load_state_dict(state["loader"][self.parallel.rank])
        self._random = state["random"][self.parallel.rank]

    def _restore_random(self) -> None:
        """Last of all before the first step: to begin with a loader draws a number."""
        if self._random is not None:
            set_random_state(self._random, self.device)
            self._random = None

    def _average_best(self) -> None:
        """Evaluate the mean of the best weights, and keep it."""
        wanted = self.model.state_dict()
        best = self.folder.best_weights(wanted) if self.parallel.main else []
        mean = self.parallel.from_main(checkpoint.average(best) if len(best) > 1 else None)
        if mean is None:
            return
        model = network(self.config, self.tokenizer.vocab_size).to(self.device)
        model.load_state_dict(mean["model"])
        found = self.evaluate(model)
        if self.stopping:
            return
        logger.info(
            "Mean of the %d best: wer=%.3f, cer=%.3f; the best alone: wer=%.3f",
            len(best),
            found.rates.wer,
            found.rates.cer,
            mean["wer"],
        )
        if self.parallel.main:
            self.folder.save_averaged({**mean, "wer": found.rates.wer}, found)


@dataclasses.dataclass
class _Sized:
    """Batches whose number is known, for a bar of progress."""

    batches: Callable[[], Iterator[Batch]]
    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()
