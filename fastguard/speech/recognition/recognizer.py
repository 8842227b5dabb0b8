"""A trained model with all that recognition needs: features, tokenizer and settings."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastguard.speech.data.features import LogMel
from fastguard.speech.data.tokenizer import Tokenizer, tokenizer_from_dict
from fastguard.speech.models import build_model
from fastguard.speech.storage import checkpoint, weights
from fastguard.speech.training.config import Config, warn_without_text_rules


@dataclass
class Recognizer:
    """The contents of a checkpoint, ready to recognise speech. The model is in evaluation mode."""

    model: nn.Module
    tokenizer: Tokenizer
    log_mel: LogMel
    config: Config

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Recognizer":
        """Read a checkpoint of :mod:`fastguard.train`, or a .safetensors file of
        :mod:`fastguard.export`.

        Raises:
            CheckpointError: the file is missing, damaged or not of fastguard, or its weights do not
                fit its settings.
        """
        state = (weights if path.suffix == ".safetensors" else checkpoint).load(path)
        try:
            config = Config.from_dict(state["config"])
            tokenizer = tokenizer_from_dict(state["tokenizer"])
            with torch.device("meta"):  # before memory is allocated for what the settings say
                wanted = untrained_model(config, tokenizer.vocab_size).state_dict()
            checkpoint.check_fit(state["model"], wanted)
            model = untrained_model(config, tokenizer.vocab_size)
            model.load_state_dict(state["model"])
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{path} cannot be used by this version of fastguard: {error}"
            ) from error
        warn_without_text_rules(path, state["config"])
        return cls(model.to(device).eval(), tokenizer, features(config), config)

    @torch.no_grad()
    def __call__(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs (B, T', V) float32 and output_lengths (B,) int64 of features (B, T, n_mels) and
        feature_lengths (B,) int64."""
        return self.model(features, feature_lengths)


def features(config: Config) -> LogMel:
    """The features that the settings describe."""
    wanted = config.features
    return LogMel(wanted.sample_rate, wanted.n_mels, normalization=wanted.normalization)


def untrained_model(config: Config, vocab_size: int) -> nn.Module:
    """The model that the settings describe, with torch's initial weights."""
    options = {"dropout": config.network.dropout}
    if config.model == "teacher":
        options["attention_clamp"] = config.network.attention_clamp
        options["attention_dropout"] = config.network.attention_dropout
    return build_model(
        config.model, vocab_size=vocab_size, n_mels=config.features.n_mels, **options
    )
