"""The evaluation of a model while it trains, shared between the processes of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard.speech.data.batching import Batch
from fastguard.speech.recognition.evaluation import Evaluation, evaluate

from .agreement import Agreement
from .data import Data
from .learner import Learner
from .precision import autocast


class Evaluator:
    """Greedy decoding of one split.

    Args:
        learner: gives the device, the precision and the stand-in for an empty batch.
        data: the run's corpus and tokenizer.
        split: which rows are recognised.
        agreement: ends an evaluation in all processes alike.
    """

    def __init__(self, learner: Learner, data: Data, split: str, agreement: Agreement):
        self.learner = learner
        self.data = data
        self.split = split
        self.agreement = agreement
        self._durations = {u.id: u.duration for u in data.corpus.split(split)}

    def __call__(self, model: nn.Module) -> Evaluation:
        """Evaluate ``model``; every process gets all rows.

        Where a signal ends the evaluation early, rows are missing and ``agreement.stopping`` is
        set.
        """
        model.eval()
        parallel = self.learner.parallel
        parallel.share_buffers(model)

        def forward(batch: Batch) -> tuple[Tensor, Tensor]:
            return self._forward(model, batch.features, batch.feature_lengths)

        @torch.no_grad()
        def agreed() -> Iterator[Batch]:
            for (batch,) in self.agreement.micro_batches(iter(loader)):
                if not len(batch) and parallel.sharded:  # every process must gather the shards
                    self._forward(model, *self.learner.silence())
                yield batch

        loader = self.data.evaluation_loader(self.split, parallel)
        found = evaluate(
            forward,
            _Sized(agreed, len(loader)),
            self.data.tokenizer,
            durations=self._durations,
            progress=f"evaluating {self.split}",
        )
        shares = parallel.gather(found.rows)
        # Where the batches do not divide evenly, some come twice.
        return Evaluation(list({row.id: row for rows in shares for row in rows}.values()))

    def _forward(self, model: nn.Module, features: Tensor, lengths: Tensor):
        device = self.learner.device
        with autocast(device, self.learner.config.precision):
            return model(features.to(device), lengths.to(device))


@dataclass
class _Sized:
    """An iterator of batches whose number is known, for a progress bar."""

    batches: Callable[[], Iterator[Batch]]
    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()
