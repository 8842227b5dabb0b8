"""Packages that only an extra installs: how their absence is told."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message names the extra. Commands end with 2."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose}: pip install 'torch-fastguard[{extra}]'")


def require(module: str, extra: str) -> ModuleType:
    """The imported module; raises MissingExtra where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there; something that it imports is not
        raise MissingExtra(f"the package {error.name} is not installed", extra) from None
