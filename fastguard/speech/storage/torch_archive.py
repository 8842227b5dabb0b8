"""Checks archives of torch.save before torch.load builds anything from them.

torch.load(weights_only=True) runs no code from a file. But it trusts the sizes in a file and checks
no checksums: a compressed archive can fill the memory, a tensor of stride 0 can have any size, and
a flipped bit becomes a weight.
"""

import collections
import math
import pickle
import typing
import zipfile
from typing import Any, BinaryIO

_LARGEST_PICKLE = 32 << 20  # bytes of all that is not a tensor; in memory up to 64 times as much

#: Bytes of an element of each kind of storage.
_ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage"), 1),
}


class ArchiveError(ValueError):
    """torch.load must not read an archive; the message says why."""


def check(file: BinaryIO) -> None:
    """Read a whole archive, and compare its contents with the sizes and checksums in it.

    Raises:
        ArchiveError: the file is not an archive of torch, or damaged; it is compressed; it has
            other objects than dense tensors and plain values; or a tensor is larger than its
            record.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check_sizes(archive, file.seek(0, 2))
            if (damaged := archive.testzip()) is not None:
                raise ArchiveError(f"it is damaged: the checksum of {damaged} differs")
            _check_tensors(archive)
    except ArchiveError:
        raise
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"it is damaged, or not an archive of torch.save: {error}") from error
    except Exception as error:  # for a damaged file zipfile and pickle raise any type
        raise ArchiveError(f"it is damaged: {type(error).__name__}: {error}") from error


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise ArchiveError("it has two records with the same name")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ArchiveError("its records are compressed, which torch.save does not do")
    if (claimed := sum(record.file_size for record in records)) > size:
        raise ArchiveError(f"its records claim {claimed} bytes, and the file has {size}")


def _check_tensors(archive: zipfile.ZipFile) -> None:
    sizes = {record.filename: record.file_size for record in archive.infolist()}
    folders = {name.partition("/")[0] for name in sizes}
    name = f"{next(iter(folders), '')}/data.pkl"
    if len(folders) != 1 or name not in sizes:
        raise ArchiveError("it is not an archive of torch.save")
    if (size := sizes[name]) > _LARGEST_PICKLE:
        raise ArchiveError(f"what is not a tensor in it has {size} bytes, over {_LARGEST_PICKLE}")
    folder = name.removesuffix("data.pkl")
    with archive.open(name) as file:
        _Sizes(file, sizes, f"{folder}data/").load()


class _Sizes(pickle._Unpickler):
    """Reads a pickle like torch.load without building tensors: it compares the size of each tensor
    with its record.

    The unpickler in C allocates a table as long as the largest memo index in a pickle, up to 64 GB.
    This one, like torch.load's, is in Python and uses a dict. BYTEARRAY8, which would allocate a
    bytearray of any length, is removed; torch.load refuses it too.
    """

    dispatch: typing.ClassVar[dict] = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if opcode != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: BinaryIO, sizes: dict[str, int], folder: str):
        super().__init__(file)
        self._sizes = sizes
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _check_tensor
        if module == "torch" and name in _ITEM_SIZES:
            return _ITEM_SIZES[name]
        raise ArchiveError(f"it has a {module}.{name}, not only tensors and plain values")

    def persistent_load(self, saved: Any) -> "_Storage":
        """A storage, whose size is that of its record."""
        kind, itemsize, key, _, count = saved
        there = self._sizes.get(f"{self._folder}{key}")
        if kind != "storage" or type(count) is not int or there != count * itemsize:
            raise ArchiveError(f"its tensor {key!r:.60} does not have the size of its record")
        return _Storage(count)


class _Storage:
    """Stands for a storage."""

    def __init__(self, count: int):
        self.count = count


def _check_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> None:
    """Replaces torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise ArchiveError("it has a tensor with an impossible size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= storage.count or count > storage.count):
        raise ArchiveError("it has a tensor that is larger than its record")
