"""Training of a CTC speech model; the guard's first user."""

import contextlib
import logging
import random
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from . import checkpoint
from .config import Config
from .guard import GradGuard
from .init import stable_init_
from .metrics import EpochMetrics, MetricsFile, StepMetrics, epoch_table, summarize
from .ops import Verdict
from .optim import AdamW
from .recognizer import features, network
from .speech.batching import Batch, BucketBatchSampler, SpeechDataset, make_loader
from .speech.corpora import Corpus, load_corpus
from .speech.decoding import ErrorRates, error_rates, greedy_decode
from .speech.features import Augment, SpecAugment
from .speech.loss import ctc_loss
from .speech.models.ctc import CTCModel
from .speech.tokenizer import CharTokenizer
from .step_report import PendingReport, StepReport

logger = logging.getLogger(__name__)

_EVALUATION_BATCH = 8
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A model, its corpus and all that a run changes. ``fit`` trains; see fastguard.config.Config.

    Raises:
        CorpusError: the corpus is absent or has nothing to train on.
    """

    def __init__(self, config: Config, run_dir: Path):
        self.config = config
        self.run_dir = run_dir
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        random.seed(config.seed)
        torch.manual_seed(config.seed)

        self.log_mel = features(config)
        self.corpus = self._load_corpus()
        self.tokenizer = CharTokenizer.from_texts(u.text for u in self.corpus.utterances)
        self.model = self._build_model().to(self.device)
        self.optimizer = self._build_optimizer()
        self.stepper = self._build_stepper()
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.sampler, self.train_loader = self._loader("train", config.batch_size)
        self.evaluation_split = "dev" if self.corpus.split("dev") else "train"
        if self.evaluation_split == "train":
            logger.warning(
                "%s has no dev split: the error rates are those of the training split", config.data
            )
        self.step = 0
        self.epochs: list[EpochMetrics] = []
        self.stopping = False

    def _load_corpus(self) -> Corpus:
        corpus = load_corpus(
            self.config.data,
            max_duration=self.config.max_duration,
            seed=self.config.seed,
            max_output_length=lambda s: CTCModel.output_lengths(self.log_mel.num_frames_of(s)),
        )
        logger.info(corpus.summary())
        return corpus

    def _build_model(self) -> nn.Module:
        config = self.config
        model = network(config, self.tokenizer.vocab_size)
        stable_init_(model, config.init.linear_std, config.init.conv_scale)
        count = sum(p.numel() for p in model.parameters())
        logger.info(
            "%s: %.1f M parameters on %s, %s",
            config.model,
            count / 1e6,
            self.device,
            config.precision,
        )
        return model

    def _build_optimizer(self) -> torch.optim.AdamW:
        """fastguard's beside the guard; without it torch's, so that runs show what both change."""
        optim = self.config.optim
        options = {
            "lr": optim.lr,
            "betas": optim.betas,
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }
        if self.config.guard.enabled:
            return AdamW(self.model.parameters(), **options)
        return torch.optim.AdamW(self.model.parameters(), fused=True, **options)

    def _build_stepper(self) -> "GradGuard | PlainClip":
        guard = self.config.guard
        if guard.enabled:
            return GradGuard(
                self.model,
                guard.max_norm,
                guard.skip_norm,
                guard.patience,
                report_dir=self.run_dir,
            )
        return PlainClip(self.model, guard.max_norm)

    def _loader(self, split: str, batch_size: int) -> tuple[BucketBatchSampler, StatefulDataLoader]:
        train = split == "train"
        utterances = self.corpus.split(split)
        augment = Augment(spec=SpecAugment(**vars(self.config.augment))) if train else None
        sampler = BucketBatchSampler(
            [u.duration for u in utterances],
            batch_size=batch_size,
            seed=self.config.seed,
            shuffle=train,
        )
        dataset = SpeechDataset(
            utterances,
            self.tokenizer,
            self.log_mel,
            augment,
            self.config.seed,
            max_duration=self.config.max_duration,
        )
        return sampler, make_loader(dataset, sampler)

    # --- training -------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train for ``config.epochs`` or ``config.max_steps``, whichever ends first.

        Every epoch ends with an evaluation on the dev split and a checkpoint. Ctrl-C ends the run
        after the step it is in, with a checkpoint; a second Ctrl-C at once.

        Raises:
            GradientExplosionError: the guard's patience is spent. The checkpoint is written first.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._stop_on_interrupt())
            stack.enter_context(logging_redirect_tqdm([logging.getLogger("fastguard")]))
            metrics = stack.enter_context(
                contextlib.closing(MetricsFile(self.run_dir / "metrics.jsonl"))
            )
            for epoch in range(1, self.config.epochs + 1):
                best = False
                try:
                    best = self._train_epoch(epoch, metrics)
                finally:
                    self._save(best)
                if self._finished():
                    break
        logger.info("\n%s\n%s", epoch_table(self.epochs), self._closing_line())

    def _finished(self) -> bool:
        return self.stopping or self.step == self.config.max_steps

    def _closing_line(self) -> str:
        if self.stopping:
            return f"Stopped at step {self.step}; the state is in {self.run_dir / 'last.pt'}"
        return f"Finished at step {self.step}; results are in {self.run_dir}"

    def _train_epoch(self, epoch: int, metrics: MetricsFile) -> bool:
        """Whether the epoch ended, and with the lowest WER so far."""
        start = time.perf_counter()
        self.model.train()
        self.sampler.set_epoch(epoch)
        steps: list[StepMetrics] = []
        bar = tqdm(
            self.train_loader,
            f"epoch {epoch}/{self.config.epochs}",
            leave=False,
            disable=None,
            unit="batch",
        )
        clock = time.perf_counter()
        for number, batch in enumerate(bar):
            loss, report = self._train_step(batch.to(self.device), number)
            now = time.perf_counter()
            steps.append(self._step_metrics(epoch, number, loss, report, now - clock, batch))
            metrics.write(steps[-1])
            clock = now
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            logger.info("Batch %d: loss=%.2f, grad_norm=%.2f", number, loss, report.total_norm)
            if self._finished():
                break
        bar.close()
        self.stepper.poll(wait=True)
        if self.stopping:
            return False
        rates = self.evaluate(self.evaluation_split)
        ended = summarize(epoch, steps, rates.wer, rates.cer, time.perf_counter() - start)
        metrics.write(ended)
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
        best = all(ended.wer < earlier.wer for earlier in self.epochs)
        self.epochs.append(ended)
        return best

    def _train_step(self, batch: Batch, number: int) -> tuple[float, StepReport | PendingReport]:
        self.optimizer.zero_grad()
        with self._autocast():
            log_probs, output_lengths = self.model(batch.features, batch.feature_lengths)
        loss = ctc_loss(log_probs, output_lengths, batch.targets, batch.target_lengths)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        report = self.stepper.step(
            self.optimizer,
            scaler=self.scaler,
            loss=loss,
            batch_id=f"{number} [{', '.join(batch.ids)}]",
        )
        self.step += 1
        return loss.item(), report

    def _step_metrics(self, epoch, number, loss, report, seconds, batch) -> StepMetrics:
        return StepMetrics(
            self.step,
            epoch,
            number,
            loss,
            report.total_norm,
            report.clip_coef,
            report.verdict.name.lower(),
            self.optimizer.param_groups[0]["lr"],
            seconds,
            tuple(batch.ids) if report.skipped else (),
            report.nonfinite,
        )

    def _autocast(self):
        dtype = _AUTOCAST[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @contextlib.contextmanager
    def _stop_on_interrupt(self):
        """Ctrl-C, and SIGTERM, with which schedulers announce that they take the machine away."""

        def stop(signum, frame):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            logger.info("Stopping after this step; Ctrl-C again stops at once")

        previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- evaluation and checkpoints ---------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> ErrorRates:
        """Error rates of greedy decoding on a split with at least one utterance."""
        self.model.eval()
        references, hypotheses = [], []
        _, loader = self._loader(split, _EVALUATION_BATCH)
        for batch in tqdm(loader, f"evaluating {split}", leave=False, disable=None, unit="batch"):
            batch = batch.to(self.device)
            with self._autocast():
                log_probs, lengths = self.model(batch.features, batch.feature_lengths)
            references += batch.texts
            hypotheses += map(self.tokenizer.decode, greedy_decode(log_probs, lengths))
        return error_rates(references, hypotheses)

    def _save(self, best: bool) -> None:
        """Write last.pt, and best.pt if the weights are the best so far."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.stepper.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "config": self.config.to_dict(),
            "step": self.step,
            "epoch": len(self.epochs),
        }
        try:
            checkpoint.save(self.run_dir / "last.pt", state)
            if best:
                checkpoint.copy(self.run_dir / "last.pt", self.run_dir / "best.pt")
        except (OSError, checkpoint.CheckpointError) as error:
            logger.warning("No checkpoint: %s", error)


class PlainClip:
    """What a loop without the guard does: torch's clipping and an unconditional step.

    The ``before`` settings train with it, so that runs show what the guard changes.
    """

    def __init__(self, model: nn.Module, max_norm: float):
        self.parameters = list(model.parameters())
        self.max_norm = max_norm
        self.steps = 0

    def step(self, optimizer, *, scaler=None, loss=None, batch_id=None) -> StepReport:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm).item()
        coef = min(1.0, self.max_norm / (norm + 1e-6))
        if not norm < float("inf"):
            logger.warning("Large gradient norm: %s at batch %s", norm, batch_id)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        self.steps += 1
        verdict = Verdict.CLIP if coef < 1 else Verdict.APPLY
        return StepReport(self.steps - 1, batch_id, verdict, norm, coef)

    def poll(self, wait: bool = False) -> list[StepReport]:
        return []  # it has kept nothing back

    def state_dict(self) -> dict:
        return {"steps": self.steps}
