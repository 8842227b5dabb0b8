"""Settings of a training run: dataclasses, the YAML files of ``configs/``, and the command line."""

import argparse
import dataclasses
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import jsonargparse
import yaml

ModelName = Literal["teacher", "baseline"]
MODELS = get_args(ModelName)


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Learning rate, constant."""
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


@dataclass
class FeaturesConfig:
    """Log-mel features."""

    sample_rate: int = 16_000
    """Hz; recordings of another rate are resampled."""
    n_mels: int = 80
    """Mel bins per frame of 10 ms."""


@dataclass
class AugmentConfig:
    """SpecAugment on the training split; 0 masks turn it off."""

    freq_masks: int = 2
    """Frequency masks per utterance."""
    freq_width: int = 15
    """Widest frequency mask in bins."""
    time_masks: int = 2
    """Time masks per utterance."""
    time_ratio: float = 0.05
    """Widest time mask as a part of the utterance."""


@dataclass
class Config:
    """Everything a run depends on; kept in its folder as config.yaml."""

    model: ModelName = "teacher"
    """Which model; its file in configs/ gives the defaults."""
    data: str = "synthetic"
    """Corpus: synthetic, asterisk[:DIR][@LANG], manifest:FILE.jsonl, librispeech:DIR, yesno:DIR."""
    run_dir: Path | None = None
    """Folder for log, metrics, checkpoints; default runs/MODEL-TIME."""
    epochs: int = 10
    """Passes over the training split."""
    max_steps: int | None = None
    """End after this many optimizer steps, skipped ones included."""
    batch_size: int = 2
    """Utterances per step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp32 turns autocast off; fp16 scales the loss."""
    max_duration: float = 20.0
    """Longer recordings, in seconds, are left out."""
    seed: int = 0
    """Of initial weights, order, masks and the synthetic corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init: InitConfig = field(default_factory=InitConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        for name, value, least in (
            ("epochs", self.epochs, 1),
            ("max_steps", self.max_steps, 1),
            ("batch_size", self.batch_size, 1),
            ("guard.patience", self.guard.patience, 1),
            ("features.n_mels", self.features.n_mels, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.optim.lr > 0:
            raise ValueError(f"optim.lr must be above 0, got {self.optim.lr}")

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, for YAML and for checkpoints."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """What :meth:`to_dict` gave; what is missing, as in files of earlier versions, by default.

        Raises:
            TypeError: a key that is none of the settings.
            ValueError: a value that a setting can not have.
        """
        return _from_plain(cls, values)

    def save(self, path: Path) -> None:
        """Write YAML that ``--config`` reads back."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _from_plain(kind: type, values: dict):
    types = typing.get_type_hints(kind)
    given = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(types.get(key)):
            value = _from_plain(types[key], value)
        elif isinstance(value, list):
            value = tuple(value)
        given[key] = Path(value) if key == "run_dir" and value is not None else value
    return kind(**given)


def parse(argv: list[str] | None = None) -> Config:
    """Settings of ``python -m fastguard.train``; each of these overrides the ones before it.

    configs/MODEL.yaml, ``--config FILE``, with ``--stable`` configs/stable.yaml, the other options.
    A wrong option ends the program with a message and exit status 2.
    """
    argv = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stable", action="store_true")
    first.add_argument("--config", type=Path, action="append", default=[])
    first.add_argument("--model")
    chosen, rest = first.parse_known_args(argv)

    parser = _parser()
    model = chosen.model or _model_of(chosen.config) or Config.model
    if model not in MODELS:
        parser.error(f"--model {model}: choose one of {', '.join(MODELS)}")
    files = [
        config_file(model),
        *chosen.config,
        *([config_file("stable")] if chosen.stable else []),
    ]
    for file in files:
        if not file.is_file():
            parser.error(f"--config {file}: there is no such file")
    layers = [word for file in files for word in ("--config", str(file))]
    parsed = parser.instantiate(parser.parse_args([*layers, "--model", model, *rest]))
    try:
        return Config(**{f.name: parsed[f.name] for f in dataclasses.fields(Config)})
    except ValueError as error:
        parser.error(str(error))


def _underscored(word: str) -> str:
    """--run-dir=a-b as --run_dir=a-b: the options are named after the fields."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastguard.train",
        usage="%(prog)s [--model teacher|baseline] [--stable] [--config FILE] [--data SPEC]\n"
        "       [--run-dir DIR] [--epochs N] [--max-steps N] [--precision fp32|bf16|fp16]\n"
        "       [--seed N] [--optim.lr X] [... any setting listed by --help]",
        description="Train a CTC speech model. An option may be written with - or _ in its name; "
        "options override files, and of two files the later one wins.",
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help="YAML with any of the settings below; may be given several times",
    )
    parser.add_argument(
        "--stable",
        action="store_true",
        help="overlay configs/stable.yaml, the settings that survive explosions",
    )
    parser.add_class_arguments(Config)
    return parser


def _model_of(files: list[Path]) -> str | None:
    for file in reversed(files):
        try:
            settings = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError):
            continue  # said with its place when the file is read as settings
        if isinstance(settings, dict) and "model" in settings:
            return settings["model"]
    return None


def config_file(name: str) -> Path:
    """configs/NAME.yaml: in a checkout beside the package, in a wheel inside it."""
    package = Path(__file__).parent
    inside = package / "configs" / f"{name}.yaml"
    return inside if inside.is_file() else package.parent / "configs" / f"{name}.yaml"
