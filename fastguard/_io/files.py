"""Reads and writes files safely.

Only regular files of bounded size are read. Files are written whole or not at all, into the named
folder: a symbolic link in the place of an output is replaced, not followed.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

#: Largest JSON file in bytes; the report on a bad step has about one million.
LARGEST_JSON = 64 << 20
#: Longest line of a JSON Lines file in bytes.
LARGEST_LINE = 1 << 20

_ANY = 1 << 62  # bytes
_TEMPORARY = re.compile(r"fastguard-[0-9a-f]{16}\.tmp")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


class UnusableFile(OSError):
    """A file is of a kind or size that is not read or written; the message names it."""


# --- reading --------------------------------------------------------------------------------------


def open_regular(path: Path, largest: int) -> BinaryIO:
    """Open a file for reading. A FIFO is refused; open() would wait for its writer.

    Raises:
        UnusableFile: the file is not a regular file, or has more than ``largest`` bytes.
        OSError: it does not exist, or cannot be opened.
    """
    flags = os.O_RDONLY | _flag("O_NONBLOCK") | _flag("O_BINARY") | _flag("O_CLOEXEC")
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # NUL in the name
        raise UnusableFile(f"{path!r} cannot be opened: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFile(f"{path} is {_kind(status.st_mode)}: give a regular file")
        if status.st_size > largest:
            raise _too_large(path, largest)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a file. Raises as :func:`open_regular`; files of /proc have no size before."""
    with open_regular(path, largest) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise _too_large(path, largest)
    return content


def read_text(path: Path, largest: int) -> str:
    """The content of a UTF-8 file. Also raises UnicodeDecodeError, a ValueError."""
    return read_bytes(path, largest).decode("utf-8")


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The value in a JSON file, of any type. Also raises ValueError, in one line."""
    try:
        return json.loads(read_text(path, largest))
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def json_lines(path: Path, largest: int) -> Iterator[tuple[int, dict | None, bool]]:
    """The lines of a JSON Lines file that are not empty.

    Yields:
        The number from 1; the object, or None if the line is not an object or is longer than
        LARGEST_LINE; and whether the line ends with a newline.

    Raises as :func:`open_regular`.
    """
    with open_regular(path, largest) as file:
        number, line = 0, b""
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            whole = line
            while len(line) > LARGEST_LINE and not line.endswith(b"\n"):
                whole, line = b"?", file.readline(LARGEST_LINE + 1)
            if whole.strip():
                yield number, _object(whole), line.endswith(b"\n")


def _object(line: bytes) -> dict | None:
    try:
        found = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _too_large(path: Path, largest: int) -> UnusableFile:
    return UnusableFile(f"{path} has over {largest} bytes: it is not the expected file")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "not a regular file")


def _flag(name: str) -> int:
    """A flag of os.open; 0 on systems that do not have it."""
    return getattr(os, name, 0)


# --- writing --------------------------------------------------------------------------------------


def check_own(path: Path) -> None:
    """Raise :class:`UnusableFile` unless ``path`` is a regular file or does not exist."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise UnusableFile(
            f"{path} is {_kind(mode)}, and a file is to be written there: move it away"
        )


def check_own_folder(path: Path) -> None:
    """Raise :class:`UnusableFile` unless ``path`` is a folder, not a link to one, or does not
    exist."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        kind = "a file" if stat.S_ISREG(mode) else _kind(mode)
        raise UnusableFile(f"{path} is {kind}, and a folder is to be made there: move it away")


def make_folder(path: Path, named: bool) -> None:
    """Make a folder for results, if it does not exist.

    Args:
        path: of the folder.
        named: whether the user named it. Only then it may be a link: another link could lead out of
            the folder of the run.

    Raises:
        UnusableFile: the path is a link or a file.
        OSError: the folder cannot be made.
    """
    if not named:
        check_own_folder(path)
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` if no error occurs. After an error ``path`` is as it
    was.

    Raises:
        UnusableFile: ``path`` is a folder, a FIFO or a device.
        OSError: the disk is full, or the folder is not writable.
    """
    if not path.is_symlink():
        check_own(path)
    temporary = _new_temporary(path.parent)
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows can sync only a writable file
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8, whole or not at all. Raises as :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="\n")


def write_where_told(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file that the user named. It may be a symbolic link, a device or a pipe, such as
    /dev/stdout.

    Raises:
        OSError: the disk is full, the folder is not writable, or nobody reads the pipe.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            descriptor = os.open(path, os.O_WRONLY | _flag("O_NONBLOCK") | _flag("O_CLOEXEC"))
            with os.fdopen(descriptor, "w", encoding="utf-8", errors=errors) as file:
                os.set_blocking(descriptor, True)
                file.write(text)
            return
    write_text(Path(os.path.realpath(path)), text, errors)


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all. Raises as :func:`open_regular` and :func:`replacing`."""
    with (
        open_regular(source, _ANY) as file,
        replacing(target) as temporary,
        open(temporary, "wb") as into,
    ):
        shutil.copyfileobj(file, into)


def link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, which must not be changed afterwards, or a copy if
    the file system has no hard links. Raises OSError."""
    temporary = target.with_name(_temporary_name())
    try:
        os.link(source, temporary)
    except OSError:
        copy(source, target)
        return
    try:
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # os.replace keeps both names of one file


def open_appending(path: Path) -> TextIO:
    """Open a UTF-8 file for appending; it is created if it does not exist.

    Raises:
        UnusableFile: it is a symbolic link, a FIFO, or otherwise not a regular file.
        OSError: it cannot be written.
    """
    check_own(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
        flags |= _flag(name)
    descriptor = os.open(path, flags, 0o666)
    return os.fdopen(descriptor, "a", encoding="utf-8", newline="\n")


def left_overs(folder: Path) -> Iterator[Path]:
    """Temporary files of :func:`replacing` in a folder, whose processes were killed."""
    for path in folder.glob("fastguard-*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            yield path


def _new_temporary(folder: Path) -> Path:
    """A new, empty file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_NOFOLLOW") | _flag("O_CLOEXEC")
    temporary = folder / _temporary_name()
    os.close(os.open(temporary, flags, 0o666))
    return temporary


def _temporary_name() -> str:
    return f"fastguard-{secrets.token_hex(8)}.tmp"


def _sync_folder(folder: Path) -> None:
    """Write the new name to the disk. Not every system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
