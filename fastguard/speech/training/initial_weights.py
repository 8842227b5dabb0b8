"""Fine-tuning: a run that begins with the weights of another one, named by ``--init-from``.

Weights and BatchNorm's statistics are taken, and nothing else: optimizer, guard, learning rate and
epochs begin anew, on any corpus. The encoder must be of the same size and read the same features.
The head has a row for each symbol, and keeps the rows of symbols that both runs have.
"""

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from fastguard._extras import MissingExtra
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.recognition.recognizer import Recognizer, untrained_model
from fastguard.speech.storage.checkpoint import CheckpointError, best_of
from fastguard.speech.storage.plain import to_plain
from fastguard.speech.storage.yaml_file import read_yaml

from .config import Config
from .run_folder import RunError

logger = logging.getLogger(__name__)

_NAMED = 12  # new symbols in the log line


class InitialWeights:
    """The trained model that ``config.init_from`` names.

    Attributes:
        path: the file that was read; of a run folder best.pt, or last.pt where that is missing.
        tokenizer: its tokenizer, if the settings ask for one of the same kind; else None.

    Raises:
        RunError: the file cannot be read, or is of another model or other features than the
            settings say.
    """

    def __init__(self, config: Config):
        self.path, self._source = _load(config.init_from)
        theirs = self._source.config
        if theirs.model != config.model:
            with torch.device("meta"):
                ours = untrained_model(config, self._source.tokenizer.vocab_size)
            raise RunError(
                f"--init-from {self.path} is a {theirs.model} of {_millions(self._source.model)}, "
                f"and these settings train a {config.model} of {_millions(ours)}: "
                f"leave out --model, or use --model {theirs.model}"
            )
        given, wanted = to_plain(config.features), to_plain(theirs.features)
        for name in given:
            if given[name] != wanted[name]:
                raise RunError(
                    f"--init-from {self.path} was trained on features.{name}={wanted[name]}, and "
                    f"these settings say {given[name]}: leave the setting out, or use "
                    f"--features.{name} {wanted[name]}"
                )
        same = _tokenizer_settings(theirs) == _tokenizer_settings(config)
        self.tokenizer = self._source.tokenizer if same else None

    def put_into(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Replace the weights and buffers of a new model, and log in one line what was taken.

        A symbol that the source does not have gets the mean row of those that it has, besides the
        blank, plus its own initial weights (the mean: Hewitt 2021, "Initializing New Word
        Embeddings for Pretrained Language Models"). Initial weights alone would make new symbols
        more likely than all that were learnt to be rare.

        Args:
            model: with initial weights.
            tokenizer: names the rows of the model's head.
        """
        weights, initial = self._source.model.state_dict(), model.state_dict()
        numbers = {symbol: row for row, symbol in enumerate(self._source.tokenizer.symbols)}
        rows = [numbers.get(symbol) for symbol in tokenizer.symbols]
        if rows != list(range(len(numbers))):
            for name in ("head.weight", "head.bias"):
                weights[name] = _by_symbol(weights[name], initial[name], rows)
        model.load_state_dict(weights)
        new = [tokenizer.symbols[row] for row, old in enumerate(rows) if old is None]
        logger.info(
            "Weights of %s (SHA-256 %.12s): all %d tensors of the encoder and the rows of %d of "
            "the head's %d symbols are taken%s; optimizer, guard and epochs begin anew",
            self.path,
            hashlib.sha256(self.path.read_bytes()).hexdigest(),
            sum(not name.startswith("head.") for name in weights),
            len(rows) - len(new),
            len(rows),
            f", new are {_shown(new)}" if new else "",
        )


def source_settings(init_from: Path, run_dir: Path | None) -> dict[str, object]:
    """The settings that a run takes over from its source: the model, features and tokenizer.

    If ``run_dir`` has a run that began with this source, they are those of its config.yaml: the
    source may be gone.

    Returns:
        Names of settings, such as "features.n_mels", and their values.

    Raises:
        RunError: the source cannot be read.
    """
    config = _begun(init_from, run_dir) or _load(init_from)[1].config
    settings: dict[str, object] = {"model": config.model}
    for group in ("features", "tokenizer"):
        values = to_plain(getattr(config, group))
        settings |= {f"{group}.{name}": value for name, value in values.items()}
    return settings


def _begun(init_from: Path, run_dir: Path | None) -> Config | None:
    """The settings of a run in ``run_dir`` that began with ``init_from``; None without one."""
    try:
        config = Config.from_dict(read_yaml(run_dir / "config.yaml")) if run_dir else None
    except (OSError, TypeError, ValueError):
        return None  # RunFolder says what is wrong there
    return config if config is not None and config.init_from == init_from else None


def _load(init_from: Path) -> tuple[Path, Recognizer]:
    try:
        path = best_of(init_from)
        return path, Recognizer.load(path)
    except (CheckpointError, MissingExtra) as error:
        raise RunError(f"--init-from {error}") from error


def _tokenizer_settings(config: Config) -> tuple:
    kind = config.tokenizer.kind
    return kind, None if kind == "char" else config.tokenizer.vocab_size


def _by_symbol(trained: Tensor, initial: Tensor, rows: list[int | None]) -> Tensor:
    """The rows of ``trained`` in the order of ``rows``; for None, their mean plus the initial row.

    Args:
        trained: (V, ...), the rows of the source's symbols, the blank first.
        initial: (len(rows), ...).
        rows: of each symbol, its row in ``trained``.
    """
    kept = [row for row in rows if row]  # neither the blank nor a new symbol
    mean = trained[kept].mean(0) if kept else torch.zeros_like(trained[0])
    parts = [mean + initial[i] if row is None else trained[row] for i, row in enumerate(rows)]
    return torch.stack(parts)


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def _shown(symbols: list[str]) -> str:
    return " ".join(symbols[:_NAMED]) + (" ..." if len(symbols) > _NAMED else "")
