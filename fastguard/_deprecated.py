"""Old names that still work. Each warns once in a process and names its successor."""

import warnings
from collections.abc import Mapping

_warned: set[str] = set()


def warn_once(old: str, new: str) -> None:
    """A DeprecationWarning that ``old`` is now called ``new``, at the first call for ``old``."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(
            f"{old} is now called {new}; the old name will be removed in fastguard 1.0",
            DeprecationWarning,
            stacklevel=3,
        )


class Renamed:
    """An attribute of a class under its old name: ``old = Renamed("new")``."""

    def __init__(self, new: str):
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._names = f"{owner.__name__}.{name}", f"{owner.__name__}.{self._new}"

    def __get__(self, instance: object, owner: type | None = None):
        if instance is None:
            return self
        warn_once(*self._names)
        return getattr(instance, self._new)


def renamed_object(module: str, name: str, renames: Mapping[str, tuple[str, object]]):
    """For a module's ``__getattr__``: the object that had the old ``name``.

    Args:
        module: the module's ``__name__``.
        renames: old name -> (new name, object).

    Raises:
        AttributeError: ``name`` is no old name.
    """
    if name not in renames:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new, value = renames[name]
    warn_once(f"{module}.{name}", f"{module}.{new}")
    return value


def with_new_keys(values: Mapping, renames: Mapping[str, str]) -> dict:
    """A dict as it was written before, with its keys as they are called now.

    Files that an older fastguard wrote are read through this function, without a warning.

    Args:
        renames: old key -> new key; a key that ``values`` has under both names keeps the new one.
    """
    return {
        renames.get(key, key): value
        for key, value in values.items()
        if key not in renames or renames[key] not in values
    }
