"""Which corpus a spec names, and where it is.

synthetic                 sentences spoken by eSpeak NG, generated on first use
asterisk[:DIR][@LANG]     telephone prompts of the Debian packages asterisk-core-sounds-LANG
manifest:FILE             lines of JSON, csv or tsv; also a folder, or train=FILE,dev=FILE
webdataset:TARS           samples of webdataset; also a folder, or train=TARS,dev=TARS
lhotse:CUTS               a CutSet of lhotse, or a folder in its format Shar
librispeech:DIR           LibriSpeech as unpacked
yesno:DIR                 the 60 recordings of OpenSLR 1
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .archives import read_lhotse, read_webdataset
from .manifests import absolute_files, read_manifest
from .readers import (
    ASTERISK_SOUNDS,
    CorpusError,
    Rejected,
    Row,
    read_asterisk,
    read_librispeech,
    read_yesno,
    user_path,
)
from .synthetic import build_synthetic

SPECS = (
    "synthetic, asterisk[:DIR][@LANG], manifest:FILE, webdataset:TARS, lhotse:CUTS, "
    "librispeech:DIR, yesno:DIR"
)
_READERS = {"librispeech": read_librispeech, "yesno": read_yesno}
# Of places that may be train=PLACE,dev=PLACE.
_READERS_OF_SPLITS = {
    "manifest": lambda place, cache_dir: read_manifest(place),
    "webdataset": read_webdataset,
    "lhotse": read_lhotse,
}


def read_spec(spec: str, cache_dir: Path | None, seed: int) -> Iterator[Row | Rejected]:
    """The rows of a corpus; raises CorpusError if it is unknown or does not exist.

    Args:
        spec: as at the top of this file.
        cache_dir: of the synthetic corpus, and of recordings from tar files.
        seed: of the synthetic corpus.
    """
    if spec == "synthetic":
        return read_manifest(build_synthetic(cache_dir, seed))
    if asterisk := re.fullmatch(r"asterisk(?::(.+?))?(?:@(\w+))?", spec):
        return read_asterisk(user_path(asterisk[1] or ASTERISK_SOUNDS), asterisk[2] or "en")
    kind, _, place = spec.partition(":")
    if kind in _READERS and place:
        return _READERS[kind](user_path(place))
    if kind in _READERS_OF_SPLITS and place:
        return _READERS_OF_SPLITS[kind](place, cache_dir)
    raise CorpusError(f"unknown corpus {spec!r}: choose one of {SPECS}")


def absolute(spec: str) -> str:
    """The spec with an absolute path."""
    kind, colon, place = spec.partition(":")
    if kind == "asterisk":
        place, at, language = place.rpartition("@") if "@" in place else (place, "", "")
        return f"{kind}:{user_path(place).absolute()}{at}{language}" if place else spec
    if kind in _READERS_OF_SPLITS and place:
        return f"{kind}:{absolute_files(place)}"
    if kind in _READERS and place:
        return f"{kind}{colon}{user_path(place).absolute()}"
    return spec
