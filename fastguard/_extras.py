"""Packages beside torch and numpy: what a missing one is called, and which command installs it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

#: What the commands import besides torch and numpy: each module, by the package that brings it.
COMMAND_PACKAGES = {
    "torchaudio": "torchaudio",
    "soundfile": "soundfile",
    "jiwer": "jiwer",
    "jsonargparse": "jsonargparse",
    "yaml": "PyYAML",
    "tqdm": "tqdm",
    "filelock": "filelock",
    "espeakng_loader": "espeakng-loader",
    "silero_vad": "silero-vad",
    "torchdata": "torchdata",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
}


class MissingExtra(ImportError):
    """A package is not installed. The message ends with the command that installs it.

    Args:
        purpose: what is missing, or what needs it.
        extra: the extra of torch-fastguard that has the package; None for a package that
            ``pip install torch-fastguard`` brings itself.
    """

    def __init__(self, purpose: str, extra: str | None) -> None:
        wanted = "torch-fastguard" if extra is None else f"'torch-fastguard[{extra}]'"
        super().__init__(f"{purpose}: pip install {wanted}")


def require(module: str, extra: str) -> ModuleType:
    """The imported module; raises MissingExtra where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there; something that it imports is not
        raise MissingExtra(f"the package {error.name} is not installed", extra) from None


def load_command(module: str, caller: str) -> Callable[..., int]:
    """The ``main`` of a command's module, for the entry point whose ``__name__`` is ``caller``.

    Where packages are missing, an entry point that is imported raises MissingExtra, which names all
    of them. One that is run as a program ends with that message in one line and exit status 2.
    """
    try:
        return _import_main(module)
    except MissingExtra as error:
        if caller != "__main__":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _import_main(module: str) -> Callable[..., int]:
    missing = [
        package
        for name, package in COMMAND_PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]
    if not missing:
        try:
            return importlib.import_module(module).main
        except ModuleNotFoundError as error:  # a package that one of these packages needs
            name = (error.name or "").partition(".")[0]
            if name in ("", "fastguard"):
                raise
            missing = [name]
    are = "package {} is" if len(missing) == 1 else "packages {} are"
    raise MissingExtra(f"the {are.format(', '.join(missing))} not installed", None)
