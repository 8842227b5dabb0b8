"""Which settings may differ where a run continues in its folder, or from another run's state."""

from collections.abc import Iterator

from .config import Config

# Settings that may change within a folder: they do not change what is computed.
_MAY_CHANGE = (
    "run_dir", "resume", "epochs", "max_steps", "num_workers", "parallel", "checkpoint",
    "log_every", "loggers",
)  # fmt: skip
# Settings of another run's state that must stay: its weights, alphabet and statistics depend on
# them.
_OF_STATE = ("model", "features", "text", "tokenizer", "guard.enabled")
# The same, if the state is inside an epoch: the order of batches depends on them.
_OF_EPOCH = ("data", "seed", "batch_size", "batch_duration")


def changed_in_folder(saved: dict, given: dict) -> list[str]:
    """The settings, with both values, by which a run cannot continue in its folder."""
    return [text for name, text in _differences(saved, given) if not _among(name, _MAY_CHANGE)]


def nothing_left(epochs: int, steps: int, config: Config) -> str | None:
    """Why a run would end before its first step after ``epochs`` whole epochs and ``steps`` steps;
    None if it would not."""
    if epochs >= config.epochs:
        return f"{epochs} epochs are trained, and epochs={config.epochs}"
    if config.max_steps is not None and steps >= config.max_steps:
        return f"{steps} steps are done, and max_steps={config.max_steps}"
    return None


def contradictions(state: dict, config: Config) -> list[str]:
    """The settings, with both values, by which a run cannot continue from another run's state.

    Raises:
        TypeError, ValueError: the state's own settings are not of this version of fastguard.
    """
    saved = Config.from_dict(state["config"])
    fixed = list(_OF_STATE)
    if state.get("batches", 0):
        fixed += _OF_EPOCH
    if state.get("epoch", 0) < saved.freeze_encoder:
        fixed.append("freeze_encoder")
    if bool(saved.ema) != bool(config.ema):
        fixed.append("ema")
    if "fp16" in (saved.precision, config.precision):
        fixed.append("precision")  # the state has, or lacks, a loss scale
    if saved.tokenizer.kind == config.tokenizer.kind == "char":
        fixed[fixed.index("tokenizer")] = "tokenizer.kind"  # which ignores the size
    differences = _differences(saved.to_dict(), config.to_dict())
    return [text for name, text in differences if _among(name, fixed)]


def _differences(saved: dict, given: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting that differs, with both values in words, in the order of the names."""
    for key in sorted(saved.keys() | given.keys()):
        name, old, new = prefix + key, saved.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif old != new:
            yield name, f"{name} was {old} and is {new}"


def _among(name: str, settings: tuple[str, ...] | list[str]) -> bool:
    """Whether the setting, or the group that it is in, is one of ``settings``."""
    return any(name == one or name.startswith(f"{one}.") for one in settings)
