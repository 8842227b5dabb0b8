"""Settings of a training run: dataclasses, and what makes a set of them impossible."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import yaml

from fastguard.speech.data.audio import SAMPLE_RATES
from fastguard.speech.data.text import TextRules
from fastguard.speech.storage.plain import from_plain, shown, to_plain

logger = logging.getLogger(__name__)

ModelName = Literal["teacher", "baseline"]
MODELS = get_args(ModelName)


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Learning rate; with a schedule the largest."""
    schedule: Literal["constant", "cosine", "noam"] = "constant"
    """What follows the warm-up: the same rate, half a cosine down to 0, or 1 / sqrt(step)."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of exp_avg and exp_avg_sq."""
    eps: float = 1e-8
    """Added to the root of exp_avg_sq."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""


@dataclass
class GuardConfig:
    """What happens between backward and the optimizer."""

    enabled: bool = True
    """Use fastguard.GradGuard; false: torch's clip_grad_norm_ and an unconditional step."""
    max_norm: float = 1.0
    """Gradient norm that is clipped to."""
    skip_norm: float = float("inf")
    """Norm above which a batch is an outlier and skipped, once the median norm lies below it."""
    threshold: Literal["fixed", "zclip", "median", "autoclip", "adagc"] = "fixed"
    """Where clipping begins: at max_norm, or where fastguard.thresholds learns to, below it."""
    patience: int = 25
    """Skips in a row that end the run with an error."""


@dataclass
class InitConfig:
    """Initial weights (fastguard.stable_init_)."""

    linear_std: float = 0.01
    """Standard deviation of linear weights."""
    conv_scale: float = 1.0
    """Factor on torch's default convolution weights."""


@dataclass
class NetworkConfig:
    """Options of the model itself."""

    dropout: float = 0.1
    """Probability with which a residual branch loses a channel."""
    attention_clamp: float | None = None
    """Bound on the attention output; null leaves it free. The baseline has no attention."""
    attention_dropout: float = 0.0
    """Probability with which an attention weight is dropped."""


@dataclass
class FeaturesConfig:
    """Log-mel features."""

    sample_rate: int = 16_000
    """Hz; recordings of another rate are resampled."""
    n_mels: int = 80
    """Mel bins per frame of 10 ms."""
    normalization: Literal["utterance", "level"] = "utterance"
    """Each bin by its own mean and deviation, or decibels under the loudest, which suits short
    recordings of one microphone."""


@dataclass
class TokenizerConfig:
    """Symbols of the output; kept in every checkpoint."""

    kind: Literal["char", "unigram", "bpe"] = "char"
    """Characters, or pieces of SentencePiece trained on the training split."""
    vocab_size: int = 256
    """Pieces of SentencePiece, the blank included."""


@dataclass
class AugmentConfig:
    """Speed perturbation and SpecAugment on the training split; 0 masks turn the latter off."""

    speeds: tuple[float, ...] = ()
    """Speeds that an utterance is played at, one of them drawn each time."""
    freq_masks: int = 2
    """Frequency masks per utterance."""
    freq_width: int = 15
    """Widest frequency mask in bins."""
    time_masks: int = 2
    """Time masks per utterance."""
    time_ratio: float = 0.05
    """Widest time mask as a part of the utterance."""
    warmup: int = 0
    """Epochs before masks, and the second view of --consistency.weight, begin."""


@dataclass
class ConsistencyConfig:
    """Two views of each utterance, masked differently, that the model should hear alike."""

    weight: float = 0.0
    """Weight of their difference beside the mean CTC loss of both; 0: one view."""


@dataclass
class CheckpointConfig:
    """When the state is written, and how much of it is kept."""

    minutes: float = 10.0
    """Write after so many minutes, besides the end of each epoch."""
    steps: int | None = None
    """Write after so many steps, too."""
    keep_last: int = 2
    """States to keep; the older ones serve where the newest cannot be read."""
    keep_best: int = 5
    """Weights to keep, those of the lowest WER; at the end they are averaged."""


@dataclass
class DistillConfig:
    """What a teacher of --teacher adds to the CTC loss."""

    weight: float = 0.5
    """Share of the distillation in the loss, between 0 and 1."""
    temperature: float = 2.0
    """Divides the logits of both before they are compared."""


@dataclass
class Config:
    """Everything a run depends on; kept in its folder as config.yaml."""

    model: ModelName = "teacher"
    """Which model; its file in configs/ gives the defaults."""
    data: str = "synthetic"
    """Corpus: synthetic, asterisk[:DIR][@LANG], manifest:FILE.jsonl, librispeech:DIR, yesno:DIR."""
    check: Literal["auto", "decode", "header"] = "auto"
    """Decode every recording before training, or trust headers; auto decodes up to 2000."""
    run_dir: Path | None = None
    """Folder for log, metrics, checkpoints; default runs/MODEL-TIME."""
    resume: str = "auto"
    """auto continues the run in --run-dir, if there is one; never refuses a folder with a run; a
    checkpoint or run folder is continued in a new folder."""
    teacher: Path | None = None
    """Checkpoint or run folder of a trained model to learn from, besides the texts."""
    epochs: int = 10
    """Passes over the training split."""
    max_steps: int | None = None
    """End after this many optimizer steps, skipped ones included."""
    batch_size: int = 2
    """Utterances per batch."""
    batch_duration: float | None = None
    """Seconds per batch, padding counted; where given, in place of batch_size."""
    grad_accumulation: int = 1
    """Batches per optimizer step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp32 turns autocast off; fp16 scales the loss."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is evaluated and kept as best; 0: none."""
    max_duration: float = 20.0
    """Longer recordings, in seconds, are left out."""
    num_workers: int = 0
    """Processes that load recordings; 0 loads in the training process."""
    compile: bool = False
    """Run the model through torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole model in each process, or shards of one (FSDP2)."""
    seed: int = 0
    """Of initial weights, order, masks and the synthetic corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init: InitConfig = field(default_factory=InitConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    text: TextRules = field(default_factory=TextRules)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self):
        self._check_ranges()
        self._check_agreement()

    def _check_ranges(self) -> None:
        for name, least in _AT_LEAST.items():
            value = _look_up(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
            if isinstance(value, int) and value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, got {shown(value)}")
        for name in _ABOVE_ZERO:
            value = _look_up(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {shown(value)}")
        for name in _FINITE:
            if not math.isfinite(value := _look_up(self, name)):
                raise ValueError(f"{name} must be finite, got {shown(value)}")
        for name, least, most in _BETWEEN:
            value = _look_up(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must lie between {least} and {most}, got {shown(value)}")
        if self.ema == 1:
            raise ValueError("ema must be below 1, got 1.0: the average would never change")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas must be at least 0 and below 1, got {self.optim.betas}")
        if not all(0.5 <= speed <= 2 for speed in self.augment.speeds):
            raise ValueError(
                f"augment.speeds must lie between 0.5 and 2, got {list(self.augment.speeds)}"
            )

    def _check_agreement(self) -> None:
        guard = self.guard
        if not guard.enabled and (guard.skip_norm != math.inf or guard.threshold != "fixed"):
            raise ValueError(
                f"guard.skip_norm={guard.skip_norm:g} and guard.threshold={guard.threshold} need "
                "the guard: add --guard.enabled true, or --stable or --guarded"
            )
        if self.optim.schedule == "noam" and self.optim.warmup == 0:
            raise ValueError("optim.schedule=noam needs a warm-up: set --optim.warmup")
        if self.parallel == "fsdp" and (self.compile or self.ema):
            raise ValueError("--compile and --ema do not work with --parallel fsdp: leave one out")

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, for YAML and for checkpoints."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """What :meth:`to_dict` gave; what is missing, as in files of earlier versions, by default.

        Raises:
            ValueError: a key that is none of the settings, or a value that a setting cannot have.
        """
        return from_plain(cls, values)

    def to_yaml(self) -> str:
        """What ``--config`` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def warn_without_text_rules(path: Path, values: dict) -> None:
    """Say so where the settings in ``path`` are of a version that had no TextRules: what was done
    to its texts is none of today's choices."""
    if "text" in values:
        return
    rules = ", ".join(f"{name}={value}" for name, value in vars(TextRules()).items())
    logger.warning(
        "%s was written before the settings text.*: in its training the digits, * and # of a text "
        "became English words one by one, and from now on texts are normalised with %s",
        path,
        rules,
    )


def _look_up(config: Config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


_MOST = 10**15  # of a count; the arithmetic of floats is exact up to there
_AT_LEAST = {
    "epochs": 1,
    "max_steps": 1,
    "batch_size": 1,
    "grad_accumulation": 1,
    "num_workers": 0,
    "optim.warmup": 0,
    "optim.weight_decay": 0,
    "init.linear_std": 0,
    "init.conv_scale": 0,
    "guard.patience": 1,
    "guard.max_norm": 0,
    "guard.skip_norm": 0,
    "consistency.weight": 0,
    "augment.freq_masks": 0,
    "augment.freq_width": 0,
    "augment.time_masks": 0,
    "augment.warmup": 0,
    "tokenizer.vocab_size": 3,
    "checkpoint.steps": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 1,
}
_ABOVE_ZERO = (
    "optim.lr",
    "optim.eps",
    "batch_duration",
    "max_duration",
    "checkpoint.minutes",
    "network.attention_clamp",
    "distill.temperature",
)
_FINITE = (
    "optim.lr",
    "optim.eps",
    "optim.weight_decay",
    "init.linear_std",
    "init.conv_scale",
    "consistency.weight",
    "distill.temperature",
)
_BETWEEN = (
    ("seed", 0, 2**63 - 1),  # what both torch and numpy take
    ("features.sample_rate", *SAMPLE_RATES),
    ("features.n_mels", 1, 512),  # more than the bins of a spectrum of 16 kHz
    ("ema", 0, 1),
    ("network.dropout", 0, 1),
    ("network.attention_dropout", 0, 1),
    ("augment.time_ratio", 0, 1),
    ("distill.weight", 0, 1),
)
