"""What is known about a recording's length, and the file as it should be read."""

import io
from dataclasses import dataclass, field
from typing import BinaryIO


class Incomplete(ValueError):
    """The file does not have what its container claims; the message reads "kind: what"."""


@dataclass(frozen=True)
class Extent:
    """The length of a recording, and corrections of its header.

    Attributes:
        frames: samples per channel, where the container gives them better than libsndfile.
        patches: bytes that replace those of the file, by offset.
        inserted: an offset, and bytes to insert there.
    """

    frames: int | None = None
    patches: dict[int, bytes] = field(default_factory=dict)
    inserted: tuple[int, bytes] = (0, b"")

    def view(self, file: BinaryIO) -> "BinaryIO | _View":
        """The file as it should be read; the file itself if nothing is to be corrected."""
        return _View(file, self) if self.patches or self.inserted[1] else file


class _View(io.RawIOBase):
    """A file with some bytes replaced and some inserted."""

    def __init__(self, file: BinaryIO, extent: Extent) -> None:
        self._file = file
        self._patches = extent.patches
        self._at, self._inserted = extent.inserted
        self._size = file.seek(0, io.SEEK_END) + len(self._inserted)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        end = self._position + len(buffer)
        content = bytearray()
        inserted_end = self._at + len(self._inserted)
        content += self._plain(self._position, min(end, self._at))
        content += self._inserted[
            max(0, self._position - self._at) : max(0, min(end, inserted_end) - self._at)
        ]
        shift = len(self._inserted)
        content += self._plain(max(self._position, inserted_end) - shift, end - shift)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _plain(self, start: int, end: int) -> bytes:
        """Bytes of the file with the patches applied."""
        if start >= end:
            return b""
        content = bytearray(read_at(self._file, start, end - start))
        for offset, new in self._patches.items():
            for place, byte in enumerate(new, start=offset - start):
                if 0 <= place < len(content):
                    content[place] = byte
        return bytes(content)


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Up to ``size`` bytes from ``offset``."""
    file.seek(offset)
    return file.read(size)


def skip_id3(file: BinaryIO, start: int) -> int:
    """The offset behind the ID3v2 tags that begin at ``start``."""
    while (head := read_at(file, start, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:]
        footer = 10 if head[5] & 0x10 else 0
        start += 10 + footer + (a << 21 | b << 14 | c << 7 | d)
    return start


def cut_off(claimed: int, there: int, unit: str = "bytes of samples") -> Incomplete:
    """The error for a file that is shorter than it claims."""
    return Incomplete(
        f"cut off: its header claims {claimed} {unit} and the file has {there}, as after an "
        "interrupted copy or recording"
    )


def goes_on(claimed: int, there: int, unit: str = "bytes of samples") -> Incomplete:
    """The error for a file that is longer than it claims."""
    return Incomplete(
        f"wrong length: its header claims {claimed} {unit} and the file has {there}, most of which "
        "would be skipped"
    )
