"""The model in training: its forward pass, its loss, its gradients and its averaged weights."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastguard._random import random_state, set_random_state
from fastguard.guard import GradGuard
from fastguard.optim import AdamW
from fastguard.speech.data.batching import Batch
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.recognition.recognizer import Recognizer, untrained_model
from fastguard.stable_init import stable_init_

from .config import Config
from .distillation import consistency_loss, distillation_loss
from .initial_weights import InitialWeights
from .loss import ctc_loss
from .parallel import Parallel
from .precision import autocast, has_masters
from .schedules import average_decay
from .stepper import PlainClip

logger = logging.getLogger(__name__)


class Learner:
    """A new model with initial weights, as the settings describe it, and what trains it.

    Args:
        config: the run's settings.
        tokenizer: names the symbols of the head.
        initial: weights of another run, in place of those that are drawn; None without them.
        teacher: the trained model whose outputs the loss compares with; None without one.
        parallel: the processes that train together.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        initial: InitialWeights | None,
        teacher: Recognizer | None,
        parallel: Parallel,
    ):
        self.config = config
        self.teacher = teacher
        self.parallel = parallel
        self.device = parallel.device
        self.frozen = False
        self.model = self._initial_model(tokenizer, initial).to(self.device)
        self.wrapped = self._wrap()
        self.ema = self._average() if config.ema else None

    def _initial_model(self, tokenizer: Tokenizer, initial: InitialWeights | None) -> nn.Module:
        config = self.config
        model = untrained_model(config, tokenizer.vocab_size)
        stable_init_(model, config.init.linear_std, config.init.conv_scale)
        if initial is not None:
            initial.put_into(model, tokenizer)
        logger.info(
            "%s: %.1f M parameters on %s%s, %s",
            config.model,
            sum(p.numel() for p in model.parameters()) / 1e6,
            self.device,
            f" x {self.parallel.world_size}" if self.parallel.world_size > 1 else "",
            config.precision,
        )
        return model

    def _wrap(self) -> nn.Module:
        wrapped = self.parallel.wrap(self.model)
        return torch.compile(wrapped, dynamic=True) if self.config.compile else wrapped

    def freeze_encoder(self, frozen: bool) -> None:
        """Let all but the head learn, or not. A frozen encoder also keeps BatchNorm's statistics,
        and has no dropout."""
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for name, parameter in self.model.named_parameters():
            if not name.startswith("head."):
                parameter.requires_grad_(not frozen)
        if self.parallel.world_size > 1 and not self.parallel.sharded:
            self.wrapped = self._wrap()  # DDP looks once which parameters learn

    def train(self) -> None:
        """Set the model to training mode."""
        self.model.train()
        if self.frozen:
            for part in self.model.children():
                part.train(part is self.model.head)

    def _average(self) -> AveragedModel:
        def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
            decay = average_decay(self.config.ema, int(updates))
            get_ema_multi_avg_fn(decay)(averages, weights, updates)

        return AveragedModel(self.model, multi_avg_fn=update)

    def update_average(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the averaged weights towards those of the step that was just taken."""
        model = _Masters(self.model, optimizer) if has_masters(optimizer) else self.model
        self.ema.update_parameters(model)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept as best: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.module

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs (B, T', V) and output lengths (B,) of features (B, T, n_mels), for training."""
        if self.parallel.sharded:
            self.parallel.share_buffers(self.model)
        with autocast(self.device, self.config.precision):
            return self.wrapped(features, lengths)

    def silence(self) -> tuple[Tensor, Tensor]:
        """Features (1, 8, n_mels) and lengths (1,) that stand in for an empty batch."""
        return torch.zeros(1, 8, self.config.features.n_mels, device=self.device), torch.tensor([8])

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Scalar float32 loss per output frame of a batch, and its number of output frames."""
        if not len(batch):  # every process must take part in a step of all
            self.model.eval()  # BatchNorm must not count the silence as speech
            log_probs, _ = self.forward(*self.silence())
            self.train()
            return log_probs.sum() * 0.0, 0
        batch = batch.to(self.device)
        log_probs, lengths = self.forward(batch.features, batch.feature_lengths)
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

    def backward(
        self,
        micro_batches: Sequence[Batch],
        number: int,
        stepper: "GradGuard | PlainClip",
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor | None:
        """Add the gradients of a step's micro-batches.

        Args:
            micro_batches: of one optimizer step.
            number: of the first one in the epoch, for messages.
            stepper: takes the gradients after each micro-batch where they accumulate.
            scaler: multiplies the loss in fp16.

        Returns:
            The loss per output frame of all micro-batches, scalar float32; None if no process has
            an utterance in them.
        """
        losses, frames = [], []
        for place, batch in enumerate(micro_batches, start=number):
            loss, count = self.loss(batch)
            everywhere = self.parallel.sum(count)
            if everywhere == 0:
                continue
            # DistributedDataParallel and FSDP take the mean over processes.
            loss = loss * (count * self.parallel.world_size / everywhere)
            losses.append(loss.detach())
            frames.append(everywhere)
            accumulates = self.config.grad_accumulation > 1
            total = loss * everywhere if accumulates else loss  # the step divides by the weights
            (total if scaler is None else scaler.scale(total)).backward()
            if accumulates:
                stepper.accumulate(
                    scaler=scaler,
                    loss=losses[-1],
                    batch_id=f"{place} [{', '.join(batch.ids)}]",
                    weight=everywhere,
                )
        if not losses:
            return None
        weights = torch.tensor(frames, device=self.device, dtype=torch.float32)
        return (torch.stack(losses) * weights).sum() / weights.sum()

    @contextlib.contextmanager
    def undo_on_failure(self) -> Iterator[None]:
        """Restore the random numbers and the buffers after an error, such as a lack of memory.

        A forward and a backward pass change nothing else of the model, so a state can be written
        from which the run continues.
        """
        numbers = random_state(self.device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            yield
        except Exception:
            set_random_state(numbers, self.device)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise


class _Masters(nn.Module):
    """A model's buffers, and its parameters with the values of their masters."""

    def __init__(self, model: nn.Module, optimizer: AdamW):
        super().__init__()
        self._model = model
        self._values = optimizer.master_state_dict(model)

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        return (self._values[name] for name, _ in self._model.named_parameters())
