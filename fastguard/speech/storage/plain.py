"""Converts dataclasses to plain dicts, lists and numbers, and back with type checks."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

_LONGEST = 60  # characters of a value in a message


def to_plain(instance: Any) -> dict:
    """A dataclass as plain values, for YAML, JSON or a checkpoint."""
    return _plain(dataclasses.asdict(instance))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type, values: object, prefix: str = "") -> Any:
    """The dataclass ``kind`` from what :func:`to_plain` gave; missing fields get their defaults.

    Integers are accepted as floats; nothing else is converted.

    Args:
        kind: a dataclass.
        values: a dict of plain values.
        prefix: comes before the names of fields in messages.

    Raises:
        TypeError: a name is not a field.
        ValueError: a value is not of its field's type, a field without a default is missing, or
            ``kind`` itself refuses a value.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{prefix.rstrip('.') or kind.__name__} must be a dict, got {shown(values)}"
        )
    known = typing.get_type_hints(kind)
    given = {}
    for name, value in values.items():
        if not isinstance(name, str) or name not in known:
            plain = isinstance(name, str) and name.isidentifier() and len(name) <= _LONGEST
            raise TypeError(f"unknown field {prefix}{name if plain else shown(name)}")
        given[name] = _checked(known[name], value, prefix + name)
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in given and not optional:
            raise ValueError(f"{prefix}{field.name} is missing")
    return kind(**given)


def shown(value: object) -> str:
    """A short text for any value, for messages."""
    if isinstance(value, str):
        return repr(value[:_LONGEST]) + ("..." if len(value) > _LONGEST else "")
    if isinstance(value, bool | float | type(None)):
        return repr(value)
    if isinstance(value, int):
        bits = value.bit_length()
        return repr(value) if bits <= 3 * _LONGEST else f"an integer of {bits} bits"
    return f"a {type(value).__name__}"


def _checked(kind: Any, value: object, name: str) -> Any:
    """``value`` converted to the annotation ``kind``; raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value, f"{name}.")
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _checked(inner, value, name)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise ValueError(f"{name} must be one of {', '.join(arguments)}, got {shown(value)}")
    if origin in (list, tuple):
        return origin(_sequence(origin, arguments, value, name))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is too large: {shown(value)}") from None
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be of type {kind.__name__}, got {shown(value)}")


def _sequence(origin: type, kinds: tuple, value: object, name: str) -> list:
    """The elements, checked; a tuple without ... has as many as its annotation."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {shown(value)}")
    if origin is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{name} must have {len(kinds)} values, got {len(value)}")
    pairs = zip(kinds, value, strict=True)
    return [_checked(kind, each, f"{name}[{i}]") for i, (kind, each) in enumerate(pairs)]
