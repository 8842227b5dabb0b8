"""The archives that torch.save writes, judged before torch.load builds anything of them.

torch.load(weights_only=True) runs nothing that is in a file. It believes what a file says of its
sizes, though, and compares no checksums: a compressed archive fills the memory, a tensor of stride
0 is of any size, and a flipped bit becomes a weight.
"""

import collections
import math
import pickle
import typing
import zipfile
from typing import Any, BinaryIO

_LARGEST_PICKLE = 32 << 20  # bytes of what is no tensor; in memory it may be 64 times as much

#: Bytes of an element of each kind of storage.
_ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage"), 1),
}


class ArchiveError(ValueError):
    """An archive that torch.load must not see; the message says why."""


def check(file: BinaryIO) -> None:
    """Read the whole of an archive, and compare it with what it says of itself.

    Raises:
        ArchiveError: it is no archive of torch's, or damaged; it is compressed, holds other things
            than dense tensors and plain values, or a tensor that is larger than its record.
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
        raise ArchiveError(f"it is damaged, or no archive of torch.save: {error}") from error
    except Exception as error:  # zipfile and pickle raise whatever they trip over
        raise ArchiveError(f"it is damaged: {type(error).__name__}: {error}") from error


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise ArchiveError("it holds two records of one name")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ArchiveError("its records are compressed, which torch.save does not do")
    if (claimed := sum(record.file_size for record in records)) > size:
        raise ArchiveError(f"its records claim {claimed} bytes, and the file has {size}")


def _check_tensors(archive: zipfile.ZipFile) -> None:
    sizes = {record.filename: record.file_size for record in archive.infolist()}
    folders = {name.partition("/")[0] for name in sizes}
    name = f"{next(iter(folders), '')}/data.pkl"
    if len(folders) != 1 or name not in sizes:
        raise ArchiveError("it is no archive of torch.save")
    if (size := sizes[name]) > _LARGEST_PICKLE:
        raise ArchiveError(f"what is no tensor in it takes {size} bytes, over {_LARGEST_PICKLE}")
    folder = name.removesuffix("data.pkl")
    with archive.open(name) as file:
        _Sizes(file, sizes, f"{folder}data/").load()


class _Sizes(pickle._Unpickler):
    """Goes through a pickle as torch.load will, and builds no tensor: it compares what each would
    take with what is there.

    The unpickler in C makes a table as long as the largest number that a pickle gives a value, up
    to 64 GB. This one, as torch.load's, is in Python and has a dict. It would make a bytearray of
    any length, which torch.load refuses.
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
        raise ArchiveError(f"it holds a {module}.{name}, and not only tensors and plain values")

    def persistent_load(self, saved: Any) -> "_Storage":
        """A storage that has the size of its record."""
        kind, itemsize, key, _, count = saved
        there = self._sizes.get(f"{self._folder}{key}")
        if kind != "storage" or type(count) is not int or there != count * itemsize:
            raise ArchiveError(f"its tensor {key!r:.60} does not have the size of its record")
        return _Storage(count)


class _Storage:
    """In the place of one."""

    def __init__(self, count: int):
        self.count = count


def _check_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> None:
    """In the place of torch._utils._rebuild_tensor_v2."""
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise ArchiveError("it holds a tensor of a size that is none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= storage.count or count > storage.count):
        raise ArchiveError("it holds a tensor that is larger than its record")
