"""Ogg (Vorbis, Opus, FLAC): each page has a number and a checksum, and the last one is marked."""

import struct
import zlib
from typing import BinaryIO

from .extent import Extent, Incomplete, read_at

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_extent(file: BinaryIO, position: int) -> Extent:
    """Check the pages one after the other (RFC 3533)."""
    numbers: dict[int, int] = {}
    ended: set[int] = set()
    while (page := _page(file, position)) is not None:
        flags, serial, number, length = page
        if ended and (flags & 2 or serial not in numbers):
            raise Incomplete("two recordings: another Ogg stream follows, which is not read")
        if number != numbers.get(serial, number - 1) + 1:
            raise Incomplete(f"damaged: pages are missing before byte {position}")
        numbers[serial] = number
        if flags & 4:
            ended.add(serial)
        position += length
    rest = read_at(file, position, 1 << 16)
    if not ended:
        what = (
            f"damaged: no page begins at byte {position}" if rest else "cut off: no page is marked"
        )
        raise Incomplete(f"{what} as the last, as after an interrupted copy or recording")
    if b"OggS" in rest:
        raise Incomplete(f"damaged: no page begins at byte {position}, and pages follow")
    return Extent()


def _page(file: BinaryIO, position: int) -> tuple[int, int, int, int] | None:
    """Flags, stream, number and length of the page at an offset; None if no whole page is there."""
    head = read_at(file, position, 27)
    if len(head) < 27 or head[:5] != b"OggS\0":
        return None
    lengths = file.read(head[26])
    content = file.read(sum(lengths))
    if len(lengths) < head[26] or len(content) < sum(lengths):
        return None
    serial, number, checksum = struct.unpack("<III", head[14:26])
    if checksum != _crc32_ogg(head[:22] + bytes(4) + head[26:] + lengths + content):
        raise Incomplete(f"damaged: the page at byte {position} does not match its checksum")
    return head[5], serial, number, 27 + len(lengths) + len(content)


def _crc32_ogg(content: bytes) -> int:
    """Ogg's CRC: zlib's polynomial with the bits in the other order, starting with 0."""
    mirrored = zlib.crc32(content.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")
