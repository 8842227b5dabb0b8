"""Settings of a training run, and the checks of their values."""

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
LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Learning rate; with a schedule the largest rate."""
    schedule: Literal["constant", "cosine", "noam"] = "constant"
    """After the warm-up: a constant rate, half a cosine down to 0, or 1 / sqrt(step)."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0; at most a fifth of the run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of exp_avg and exp_avg_sq."""
    eps: float = 1e-8
    """Added to the root of exp_avg_sq."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""


@dataclass
class GuardConfig:
    """The guard between the backward pass and the optimizer."""

    enabled: bool = True
    """Use fastguard.GradGuard; false: torch's clip_grad_norm_ and an unconditional step."""
    max_norm: float = 1.0
    """Largest gradient norm; larger ones are clipped to it."""
    skip_norm: float = float("inf")
    """Norm above which an outlier is skipped: a norm also above 4 times the running median."""
    threshold: Literal["fixed", "zclip", "median", "autoclip", "adagc"] = "fixed"
    """Threshold of clipping: max_norm, or a rule of fastguard.thresholds, which stays below it."""
    patience: int = 25
    """Consecutive skips that end the run with an error."""


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
    """Probability of dropping a channel of a residual branch."""
    attention_clamp: float | None = None
    """Bound on the attention output; null for none. The baseline has no attention."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""


@dataclass
class FeaturesConfig:
    """Log-mel features."""

    sample_rate: int = 16_000
    """Hz; recordings of another rate are resampled."""
    n_mels: int = 80
    """Mel bins per frame of 10 ms."""
    normalization: Literal["speech", "utterance", "level"] = "speech"
    """Each bin by its mean and deviation in frames with speech, or in all frames, silence included;
    or decibels below the loudest, which suits short recordings of one microphone."""


@dataclass
class TokenizerConfig:
    """Symbols of the output; saved in every checkpoint."""

    kind: Literal["char", "unigram", "bpe"] = "char"
    """Characters, or SentencePiece pieces trained on the training split."""
    vocab_size: int = 256
    """Number of SentencePiece pieces, the blank included."""


@dataclass
class AugmentConfig:
    """Speed perturbation and SpecAugment on the training split; 0 masks turn SpecAugment off."""

    speeds: tuple[float, ...] = ()
    """Speeds of an utterance; one is drawn each time."""
    freq_masks: int = 2
    """Frequency masks per utterance."""
    freq_width: int = 15
    """Largest width of a frequency mask, in bins."""
    time_masks: int = 2
    """Time masks per utterance."""
    time_ratio: float = 0.05
    """Largest width of a time mask, as a fraction of the utterance."""
    warmup: int = 0
    """Epochs without masks and without the second view of --consistency.weight."""


@dataclass
class ConsistencyConfig:
    """Consistency loss: two views of each utterance with different masks should agree."""

    weight: float = 0.0
    """Weight of their difference, added to the mean CTC loss of both; 0: one view."""


@dataclass
class CheckpointConfig:
    """When states are written, and how many are kept."""

    minutes: float = 10.0
    """Write a state after so many minutes, and at the end of each epoch."""
    steps: int | None = None
    """Also write a state after so many steps."""
    keep_last: int = 2
    """States to keep; an older one is used if the newest cannot be read."""
    keep_best: int = 5
    """Best weights to keep; at the end they are averaged."""


@dataclass
class DistillConfig:
    """Distillation from the model of --teacher."""

    weight: float = 0.5
    """Weight of the distillation loss, between 0 and 1; the CTC loss has the rest."""
    temperature: float = 2.0
    """Temperature that divides the logits of both models."""


@dataclass
class Config:
    """All settings of a run; saved in its folder as config.yaml."""

    model: ModelName = "teacher"
    """The model; its file in configs/ has the defaults."""
    data: str = "synthetic"
    """Corpus: synthetic, asterisk[:DIR][@LANG], manifest:FILE (lines of JSON, csv or tsv; also
    manifest:train=FILE,dev=FILE, or a folder), webdataset:TARS, lhotse:CUTS, librispeech:DIR,
    yesno:DIR."""
    check: Literal["auto", "decode", "header"] = "auto"
    """Decode every recording before training, or trust headers; auto decodes up to 2000."""
    channel: Literal["mix", "left", "right"] = "mix"
    """Channel of a recording: the mean of all, or one; mix takes the loudest of channels that
    cancel. A row of a manifest may name its own."""
    run_dir: Path | None = None
    """Folder for log, metrics and checkpoints; default runs/MODEL-TIME."""
    resume: str = "auto"
    """auto continues a run in --run-dir; never refuses a folder with a run; a checkpoint or a run
    folder is continued in a new folder."""
    init_from: Path | None = None
    """Begin with the weights of this .pt or .safetensors file or run folder, on any corpus; model,
    features and tokenizer are those of its run unless given."""
    freeze_encoder: int = 0
    """Epochs in which only the head learns, at the start of a run with --init-from."""
    teacher: Path | None = None
    """Checkpoint or run folder of a trained model for distillation."""
    epochs: int = 10
    """Passes over the training split."""
    max_steps: int | None = None
    """End after so many optimizer steps, skipped ones included."""
    batch_size: int = 2
    """Utterances per batch."""
    batch_duration: float | None = None
    """Seconds per batch, padding included; replaces batch_size."""
    grad_accumulation: int = 1
    """Batches per optimizer step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of autocast; fp32 turns it off, fp16 scales the loss."""
    ema: float = 0.0
    """Decay per step of averaged weights, which are evaluated and kept as best; 0: none. It rises
    from 0.18 as (1 + n) / (10 + n) in step n."""
    max_duration: float = 20.0
    """Longest recording, in seconds; longer ones are left out."""
    num_workers: int = 0
    """Processes that load recordings; 0 loads in the training process."""
    log_every: int = 10
    """Steps between lines of the log; a skipped step, and the first of an epoch, have one too."""
    loggers: str = "tensorboard"
    """Where curves go: tensorboard, wandb, mlflow, several with commas between, or none."""
    compile: bool = False
    """Compile the model with torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole model in each process, or shards (FSDP2)."""
    seed: int = 0
    """Seed of initial weights, order, masks and the synthetic corpus."""
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

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The names in ``loggers``; empty for none."""
        if self.loggers.strip() == "none":
            return ()
        return tuple(name.strip() for name in self.loggers.split(","))

    def _check_agreement(self) -> None:
        for name in self.logger_names:
            if name not in LOGGERS:
                raise ValueError(
                    f"loggers: {shown(name)} is not known; give {', '.join(LOGGERS)}, with commas "
                    "between, or none"
                )
        guard = self.guard
        if not guard.enabled and (guard.skip_norm != math.inf or guard.threshold != "fixed"):
            raise ValueError(
                f"guard.skip_norm={guard.skip_norm:g} and guard.threshold={guard.threshold} need "
                "the guard: add --guard.enabled true, --stable or --guarded"
            )
        if self.optim.schedule == "noam" and self.optim.warmup == 0:
            raise ValueError("optim.schedule=noam needs a warm-up: set --optim.warmup")
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"--init-from {self.init_from} begins a new run, and --resume {self.resume} "
                "continues one: remove one of them"
            )
        if self.freeze_encoder and self.init_from is None and self.resume in ("auto", "never"):
            raise ValueError(
                f"freeze_encoder={self.freeze_encoder} needs a trained encoder: add --init-from"
            )
        if self.parallel == "fsdp" and (self.compile or self.ema):
            raise ValueError("--compile and --ema do not work with --parallel fsdp: remove one")

    def to_dict(self) -> dict:
        """The settings as plain dicts, lists, strings and numbers, for YAML and checkpoints."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The settings from what :meth:`to_dict` gave. Missing ones, as in files of earlier
        versions, get their defaults; a missing features.normalization is "utterance", which was
        the only one.

        Raises:
            TypeError: a key is not a setting.
            ValueError: a setting cannot have its value.
        """
        config = from_plain(cls, values)
        if "normalization" not in values.get("features", {}):
            config.features.normalization = "utterance"
        return config

    def to_yaml(self) -> str:
        """The settings as text that ``--config`` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def warn_without_text_rules(path: Path, values: dict) -> None:
    """Warn if the settings in ``path`` are of a version without TextRules, whose normalisation none
    of today's rules describes."""
    if "text" in values:
        return
    rules = ", ".join(f"{name}={value}" for name, value in vars(TextRules()).items())
    logger.warning(
        "%s was written before the settings text.*: in its training each digit, * and # of a text "
        "became an English word; now texts are normalised with %s",
        path,
        rules,
    )


def _look_up(config: Config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


_MOST = 10**15  # of a count; floats are exact up to there
_AT_LEAST = {
    "epochs": 1,
    "max_steps": 1,
    "batch_size": 1,
    "grad_accumulation": 1,
    "freeze_encoder": 0,
    "num_workers": 0,
    "log_every": 1,
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
    ("seed", 0, 2**63 - 1),  # the range of torch and numpy
    ("features.sample_rate", *SAMPLE_RATES),
    ("features.n_mels", 1, 512),  # a spectrum at 16 kHz has fewer bins
    ("ema", 0, 1),
    ("network.dropout", 0, 1),
    ("network.attention_dropout", 0, 1),
    ("augment.time_ratio", 0, 1),
    ("distill.weight", 0, 1),
)
