"""Reads corpora that other toolkits packed, through the library that packed them: lhotse and
webdataset.

A training reads recordings in any order, which a tar file does not allow. So recordings inside tar
files are copied once into a folder of the cache; the name of the folder depends on the path, size
and time of the archive. A CutSet that refers to audio files is read without copying.
"""

import functools
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from fastguard._extras import MissingExtra, require
from fastguard._io.failures import in_a_line

from . import containers, ffmpeg
from .cache import default_cache
from .manifests import SPLIT_NAMES, named_files, text_of
from .part import Part
from .readers import CorpusError, Rejected, Row

_ROWS = "rows.jsonl"
_TEXTS = ("txt", "text", "transcript", "transcription")  # extensions of webdataset's members


def read_webdataset(place: str, cache_dir: Path | None = None) -> Iterator[Row | Rejected]:
    """Read tar files whose members KEY.wav (or another audio suffix) and KEY.txt, or KEY.json with
    a key for the text as in a manifest, are a row.

    Args:
        place: a tar file, a folder of them, or a pattern (``train-{000..009}.tar``, ``*.tar``); or
            ``train=PATTERN,dev=PATTERN``. Without splits, that of a shard is the first word of its
            name, if it is one.
        cache_dir: default ``fastguard`` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CorpusError: webdataset is not installed, there is no such file, or one is damaged.
    """
    library = _library("webdataset")
    for split, pattern in named_files(place):
        for shard in _shards(library, pattern):
            write = functools.partial(_unpack_samples, library, shard)
            word = shard.stem.replace("_", "-").replace(".", "-").partition("-")[0]
            rows = _unpacked([shard], write, cache_dir)
            yield from _rows_in(rows, SPLIT_NAMES.get(split or word))


def read_lhotse(place: str, cache_dir: Path | None = None) -> Iterator[Row | Rejected]:
    """Read a CutSet of lhotse; each supervision is a row.

    Args:
        place: a file such as cuts.jsonl.gz, whose recordings are files; a folder in the format
            Shar (cuts.*.jsonl.gz and recording.*.tar), or one with such folders train, dev and
            test; or ``train=PLACE,dev=PLACE``.
        cache_dir: default ``fastguard`` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CorpusError: lhotse is not installed, there is no such file, or one is damaged.
    """
    library = _library("lhotse")
    for split, path in _cut_sets(place):
        split = SPLIT_NAMES.get(split)
        if not path.is_dir():
            yield from (_row(row, path.parent, split) for row in _cut_rows(library, path))
            continue
        shards = sorted(path.glob("cuts.*.jsonl*"))
        if not shards:
            raise CorpusError(
                f"{path} has no cuts.*.jsonl.gz: give lhotse:FILE, or a folder in the format Shar"
            )
        for cuts in shards:
            number = cuts.name.split(".")[1]
            tars = sorted(path.glob(f"recording.{number}.tar*"))
            if len(tars) != 1:
                raise CorpusError(f"{cuts} needs one recording.{number}.tar, and has {len(tars)}")
            write = functools.partial(_unpack_cuts, library, cuts, tars[0])
            yield from _rows_in(_unpacked([cuts, *tars], write, cache_dir), split)


def _library(name: str) -> ModuleType:
    try:
        return require(name, name)
    except MissingExtra as error:
        raise CorpusError(str(error)) from error


# --- the cache ------------------------------------------------------------------------------------


def _unpacked(
    archive: list[Path], write: Callable[[Path], list[dict]], cache_dir: Path | None
) -> Path:
    """The folder with the recordings of an archive and their rows; ``write(folder)`` writes the
    recordings, unless the cache has them, and returns the rows."""
    stats = [(str(file.resolve()), (s := file.stat()).st_size, s.st_mtime_ns) for file in archive]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    cache = (cache_dir or default_cache("the unpacked corpus")) / "unpacked"
    folder = cache / key
    if (folder / _ROWS).is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=cache) as scratch:
            built = Path(scratch, "built")
            built.mkdir()
            lines = [json.dumps(row) + "\n" for row in write(built)]
            (built / _ROWS).write_text("".join(lines), encoding="utf-8")
            _publish(built, folder)
    except OSError as error:
        raise CorpusError(
            f"{archive[-1]} cannot be unpacked to {cache}: {error}; set XDG_CACHE_HOME to a folder "
            "with room"
        ) from error
    return folder


def _publish(built: Path, folder: Path) -> None:
    """Give the folder its name, unless another process has unpacked the archive meanwhile."""
    try:
        os.rename(built, folder)
    except OSError:
        if not (folder / _ROWS).is_file():
            raise


def _rows_in(folder: Path, split: str | None) -> Iterator[Row | Rejected]:
    with (folder / _ROWS).open(encoding="utf-8") as file:
        for line in file:
            yield _row(json.loads(line), folder, split)


def _row(row: dict, folder: Path, split: str | None) -> Row | Rejected:
    if "reason" in row:
        return Rejected(row["id"], row["reason"])
    own = row.get("split")
    if split and own not in (None, split):
        return Rejected(row["id"], f"two splits: {own!r:.60} in the {split} of the corpus")
    part = Part(row.get("start", 0.0), row.get("seconds"), row.get("channel"))
    audio = Path(row["audio"])
    # lhotse takes a relative path from the working folder.
    audio = folder / audio if (folder / audio).exists() else audio
    return Row(row["id"], audio, row["text"], split or own, row.get("duration"), part)


# --- webdataset -----------------------------------------------------------------------------------


def _shards(library: ModuleType, pattern: str) -> list[Path]:
    """The tar files of a pattern. Only files: the library would run the command of "pipe:"."""
    place = Path(pattern).expanduser()
    if place.is_dir():
        found = sorted(place.rglob("*.tar"))
    else:
        names = library.shardlists.expand_urls(str(place))
        found = [Path(path) for name in names for path in sorted(glob.glob(name)) or [name]]
    if not found or (missing := [path for path in found if not path.is_file()]):
        raise CorpusError(
            f"{missing[0] if found else f'a tar file in {place}'} does not exist: give "
            "webdataset:FILE.tar, a folder, or a pattern such as train-{000..009}.tar"
        )
    return [path.absolute() for path in found]


def _unpack_samples(library: ModuleType, shard: Path, folder: Path) -> list[dict]:
    rows = []
    try:
        for sample in library.tarfile_to_samples()([{"url": str(shard)}]):
            id = f"{shard.stem}/{sample['__key__']}"
            try:
                rows.append({"id": id, **_unpack_sample(sample, folder, len(rows))})
            except ValueError as error:
                rows.append({"id": id, "reason": f"unusable sample: {error}"})
    except OSError:
        raise
    except Exception as error:
        raise CorpusError(
            f"{shard} cannot be read by webdataset: {in_a_line(error)}; copy it again"
        ) from error
    return rows


def _unpack_sample(sample: dict, folder: Path, number: int) -> dict:
    """Write the recording of a sample; raises ValueError for one that has none, or no text."""
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    suffixes = {name: "." + name.rpartition(".")[2].lower() for name in members}
    audio = [n for n, s in suffixes.items() if s in (*containers.SUFFIXES, *ffmpeg.SUFFIXES)]
    if len(audio) != 1:
        raise ValueError(f"{len(audio)} recordings among {', '.join(members)[:100]}; keep one")
    row = _text(members)
    row["audio"] = f"{number:06}{suffixes[audio[0]]}"  # a name from an archive may be any path
    (folder / row["audio"]).write_bytes(members[audio[0]])
    return row


def _text(members: dict[str, bytes]) -> dict:
    """Text, and split if there is one, of a sample."""
    for name in _TEXTS:
        if name in members:
            return {"text": members[name].decode("utf-8")}
    entry = json.loads(members["json"]) if "json" in members else {}
    if not isinstance(entry, dict) or not isinstance(text := text_of(entry), str):
        raise ValueError(f"its json is {entry!r:.60}, without a text")
    split = entry.get("split")
    return {"text": text, "split": SPLIT_NAMES.get(split, split)}


# --- lhotse ---------------------------------------------------------------------------------------


def _cut_sets(place: str) -> Iterator[tuple[str, Path]]:
    for split, name in named_files(place):
        path = Path(name).expanduser()
        if not path.exists():
            raise CorpusError(f"{path} does not exist: give lhotse:cuts.jsonl.gz, or a folder")
        inner = [path / name for name in SPLIT_NAMES if path.is_dir() and (path / name).is_dir()]
        if split or not inner:
            yield split, path
        else:
            yield from ((folder.name, folder) for folder in inner)


def _cut_rows(library: ModuleType, file: Path) -> Iterator[dict]:
    """The rows of a CutSet whose recordings are files."""
    for cut in _cuts(file, lambda: library.CutSet.from_file(file)):
        for row, source in _supervisions(cut):
            if source is not None and source.type != "file":
                row = {"id": row["id"], "reason": _not_a_file(source.type)}
            elif source is not None:
                row["audio"] = str(source.source)
            yield row


def _unpack_cuts(library: ModuleType, cuts: Path, tar: Path, folder: Path) -> list[dict]:
    """Write the recordings of a shard, and return its rows."""
    fields = {"cuts": [str(cuts.absolute())], "recording": [str(tar.absolute())]}
    rows = []
    for number, cut in enumerate(_cuts(tar, lambda: library.CutSet.from_shar(fields=fields))):
        for row, source in _supervisions(cut):
            if source is not None and source.type != "memory":
                row = {"id": row["id"], "reason": _not_a_file(source.type)}
            elif source is not None:
                row["audio"] = f"{number:06}.audio"
                (folder / row["audio"]).write_bytes(source.source)
            rows.append(row)
    return rows


def _cuts(file: Path, read: Callable[[], object]) -> Iterator:
    try:
        yield from read()
    except (CorpusError, OSError, GeneratorExit):
        raise
    except Exception as error:
        raise CorpusError(f"{file} cannot be read by lhotse: {in_a_line(error)}") from error


def _not_a_file(kind: str) -> str:
    # lhotse would run the command of "command", and open the address of "url".
    todo = "save the recordings with cuts.save_audios(DIR)"
    return f"recording elsewhere: its source is of type {kind!r:.60}; {todo}"


def _supervisions(cut) -> Iterator[tuple[dict, object]]:
    """A row without its audio, and the source of its recording; a rejected row and None."""
    recording = cut.recording if type(cut).__name__ in ("MonoCut", "MultiCut") else None
    if recording is None or recording.transforms or len(recording.sources) != 1:
        todo = "save it with cuts.save_audios(DIR)"
        kind = type(cut).__name__
        yield {"id": cut.id, "reason": f"no plain recording: a {kind} of several; {todo}"}, None
        return
    if not cut.supervisions:
        yield {"id": cut.id, "reason": "no supervision: the cut has no text; transcribe it"}, None
    source = recording.sources[0]
    for supervision in cut.supervisions:
        row = {"id": supervision.id}
        channels = supervision.channel
        channels = [channels] if isinstance(channels, int) else list(channels)
        odd = len(channels) > 1 and len(channels) < len(source.channels)
        if supervision.text is None or odd or not set(channels) <= set(source.channels):
            what = f"text {supervision.text!r:.60}, channels {channels} of {source.channels}"
            yield row | {"reason": f"unusable supervision: {what}; correct it"}, None
            continue
        start = max(cut.start, cut.start + supervision.start)
        seconds = min(cut.start + cut.duration, cut.start + supervision.end) - start
        row |= {"text": supervision.text, "duration": seconds}
        if start > 0 or start + seconds < recording.duration - 0.001:
            row |= {"start": start, "seconds": seconds}
        if len(source.channels) > len(channels):
            row["channel"] = source.channels.index(channels[0])
        yield row, source
