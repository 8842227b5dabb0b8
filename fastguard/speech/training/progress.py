"""How far a run has come."""

import dataclasses

from fastguard.speech.recognition.evaluation import Evaluation

from .metrics import EpochMetrics, EpochTotals


@dataclasses.dataclass
class Progress:
    """Steps, batches and epochs of a run; part of a checkpoint."""

    step: int = 0
    #: Batches of the current epoch that were trained on.
    batches: int = 0
    #: Sums over the steps of the current epoch.
    totals: EpochTotals = dataclasses.field(default_factory=EpochTotals)
    #: Epochs that have ended.
    epochs: list[EpochMetrics] = dataclasses.field(default_factory=list)
    #: The epoch in which ``max_steps`` ended the run.
    unfinished: EpochMetrics | None = None

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1."""
        return len(self.epochs) + 1

    @property
    def skipped(self) -> int:
        """Steps that the guard skipped in the whole run."""
        return sum(epoch.skipped for epoch in self.epochs) + self.totals.skipped

    def close_epoch(
        self, found: Evaluation, split: str, seconds: float, whole: bool
    ) -> EpochMetrics:
        """The current epoch's metrics. The next epoch begins if this one is ``whole``.

        Args:
            found: the evaluation of ``split``.
            split: "dev" or "train".
            seconds: that the evaluation took.
            whole: whether all batches of the epoch were trained on.
        """
        ended = self.totals.close(self.epoch, self.step, found, seconds, split)
        if whole:
            self.epochs.append(ended)
            self.begin_epoch()
        else:
            self.unfinished = ended
        return ended

    def begin_epoch(self) -> None:
        """Forget the batches of the current epoch."""
        self.batches, self.totals = 0, EpochTotals()

    def to_dict(self) -> dict:
        """The part of a checkpoint about progress."""
        return {
            "batches": self.batches,
            "totals": dataclasses.asdict(self.totals),
            "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
        }

    def restore(self, state: dict) -> None:
        """Take over the progress of a checkpoint."""
        self.step = state["step"]
        self.batches = state["batches"]
        self.totals = EpochTotals(**state["totals"])
        self.epochs = [EpochMetrics(**epoch) for epoch in state["epochs"]]
