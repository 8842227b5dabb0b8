"""Turns the command line of ``python -m fastguard.train`` into settings."""

import argparse
import dataclasses
import difflib
import sys
import typing
from pathlib import Path

import jsonargparse

import fastguard
from fastguard._command import check_words
from fastguard.speech.data.specs import absolute
from fastguard.speech.storage.plain import shown
from fastguard.speech.storage.yaml_file import read_yaml

from .config import MODELS, Config
from .initial_weights import source_settings
from .run_folder import RunError

OVERLAYS = {
    "stable": "overlay configs/stable.yaml: tiny steps that survive explosions",
    "guarded": "overlay configs/guarded.yaml: a full learning rate under the adaptive guard",
}

_PATHS = ("init_from", "run_dir")  # what --init-from takes over depends on both

_NUMBERS = {"inf": ".inf", "nan": ".nan"}  # Python's spelling to YAML's


def parse(argv: list[str] | None = None) -> Config:
    """The settings of ``python -m fastguard.train``.

    Later ones override earlier ones: configs/MODEL.yaml; each ``--config FILE``; with ``--stable``
    or ``--guarded`` configs/stable.yaml or configs/guarded.yaml, and configs/guarded_MODEL.yaml if
    it exists; with ``--init-from`` the model, features and tokenizer of its run; all other options.
    A wrong option ends the program with a message and exit status 2.
    """
    argv = [_normalised(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = _parser()
    check_words(parser, argv)
    first = argparse.ArgumentParser(parser.prog, parser.usage, add_help=False, allow_abbrev=False)
    for overlay in OVERLAYS:
        first.add_argument(f"--{overlay}", action="store_true")
    first.add_argument("--config", type=Path, action="append", default=[])
    first.add_argument("--model")
    for name in _PATHS:
        first.add_argument(f"--{name}")
    chosen, rest = first.parse_known_args(argv)

    overlays = [overlay for overlay in OVERLAYS if getattr(chosen, overlay)]
    if len(overlays) > 1:
        parser.error("--stable and --guarded exclude each other: choose one")
    _check_options(parser, rest)
    given = [(file, _read(parser, file)) for file in chosen.config]
    in_files = {name: value for _, settings in given for name, value in settings.items()}
    places = {name: vars(chosen)[name] or in_files.get(name) for name in _PATHS}
    explicit = {name for _, settings in given for name in _keys(settings, _groups())}
    taken = {k: v for k, v in _of_source(parser, places).items() if k not in explicit}
    source_model = taken.pop("model", None)
    model = chosen.model or in_files.get("model") or source_model or Config.model
    if model not in MODELS:
        parser.error(f"--model {model}: choose one of {', '.join(MODELS)}")
    files = [config_file(model), *chosen.config]
    for overlay in overlays:
        own = config_file(f"{overlay}_{model}")
        files += [config_file(overlay), *([own] if own.is_file() else [])]
    layers = [word for file in files for word in ("--config", str(file))]
    try:
        words = [f"--{name}={value}" for name, value in taken.items()]
        words += [f"--{name}={vars(chosen)[name]}" for name in _PATHS if vars(chosen)[name]]
        parsed = parser.instantiate(parser.parse_args([*layers, "--model", model, *words, *rest]))
        settings = {f.name: parsed[f.name] for f in dataclasses.fields(Config)}
        settings["data"] = absolute(settings["data"])
        if settings["init_from"] is not None:
            settings["init_from"] = settings["init_from"].absolute()
        return Config(**settings)
    except (OverflowError, ValueError) as error:
        parser.error(str(error))


def _of_source(parser: jsonargparse.ArgumentParser, places: dict) -> dict[str, object]:
    """The settings of the run that --init-from names; none without it."""
    for name, value in places.items():
        if not isinstance(value, str | None):
            parser.error(f"{name} must be a path, got {shown(value)}")
    none = (None, "null")
    init_from, run_dir = (None if place in none else Path(place) for place in places.values())
    if init_from is None:
        return {}
    try:
        return source_settings(init_from.absolute(), run_dir)
    except RunError as error:
        parser.error(str(error))


def config_file(name: str) -> Path:
    """Path of configs/NAME.yaml: beside the package in a checkout, inside it in a wheel."""
    package = Path(fastguard.__file__).parent
    inside = package / "configs" / f"{name}.yaml"
    return inside if inside.is_file() else package.parent / "configs" / f"{name}.yaml"


def _normalised(word: str) -> str:
    """An option with the name of its field: --run-dir=a-b becomes --run_dir=a-b."""
    if not word.startswith("--"):
        return _NUMBERS.get(word, word)
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + _NUMBERS.get(value, value)


def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastguard.train",
        usage="%(prog)s [--model teacher|baseline]\n"
        "       [--stable | --guarded] [--config FILE] [--data SPEC] [--run-dir DIR]\n"
        "       [--resume auto|never|PATH] [--init-from PATH] [--epochs N]\n"
        "       [--precision fp32|bf16|fp16] [--optim.lr X] [... any setting listed by --help]",
        description="Train a CTC speech model. An option may be written with - or _ in its name; "
        "options override files, and later files override earlier ones.",
        epilog="example: python -m fastguard.train --model baseline --guarded --data asterisk",
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help="YAML file with any of the settings below; may be given several times",
    )
    for overlay, text in OVERLAYS.items():
        parser.add_argument(f"--{overlay}", action="store_true", help=text)
    parser.add_class_arguments(Config)
    return parser


def _check_options(parser: jsonargparse.ArgumentParser, words: list[str]) -> None:
    known = [f"--{name}" for name in (*_names(Config), "help", "print_config")]
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            parser.error(f"unknown option {name}{_nearest(name, known)}")


def _read(parser: jsonargparse.ArgumentParser, file: Path) -> dict:
    """The settings in a YAML file; unknown keys end the program."""
    if not file.exists():
        parser.error(f"--config {file}: the file does not exist")
    try:
        settings = read_yaml(file)
    except (OSError, ValueError) as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {file}: has no settings; write lines such as epochs: 10")
    known = _names(Config)
    groups = _groups()
    for name in _keys(settings, groups):
        if name in groups:
            parser.error(
                f"--config {file}: {name} is a group; write its settings indented below it"
            )
        if name not in known:
            parser.error(f"--config {file}: unknown setting {name}{_nearest(name, known)}")
    return settings


def _names(kind: type, prefix: str = "") -> list[str]:
    """Names of all settings; settings of groups have a dot."""
    types = typing.get_type_hints(kind)
    names = []
    for field in dataclasses.fields(kind):
        name, inner = prefix + field.name, types[field.name]
        names += _names(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return names


def _groups() -> set[str]:
    return {name.partition(".")[0] for name in _names(Config) if "." in name}


def _keys(settings: dict, groups: set[str]) -> typing.Iterator[str]:
    for key, value in settings.items():
        if key in groups and isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield str(key)


def _nearest(name: str, known: list[str]) -> str:
    """A hint for a wrong name: the most similar one, or the names of its group."""
    last = {k.rpartition(".")[2].lstrip("-"): k for k in known}
    part = name.rpartition(".")[2].lstrip("-")
    close = [last[match] for match in difflib.get_close_matches(part, last, 1, 0.6)]
    if part not in last:
        close = difflib.get_close_matches(name, known, 1, 0.6) or close
    if close:
        return f"; did you mean {close[0]}?"
    group = name.rpartition(".")[0]
    there = [k for k in known if group and k.rpartition(".")[0] == group]
    return f"; there are {', '.join(there)}" if there else "; --help lists them all"
