"""FLAC: the header of the last frame numbers its samples."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from .extent import Extent, Incomplete, goes_on, read_at

_TAIL = 1 << 17  # bytes; a frame has fewer
_BLOCKS = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608} | {
    code: 256 << (code - 8) for code in range(8, 16)
}


def flac_extent(file: BinaryIO, start: int, size: int) -> Extent:
    """Take the length from the last frame, whose header numbers its samples."""
    info = read_at(file, start + 8, 18)
    if len(info) < 18:
        return Extent()
    block = int.from_bytes(info[2:4], "big")
    claimed = int.from_bytes(info[13:18], "big") & 0xFFFFFFFFF
    tail = read_at(file, max(start + 42, size - _TAIL), _TAIL)
    if b"fLaC\0" in tail:
        raise Incomplete("two recordings: another FLAC file is appended, which is not read")
    ends = (_end_of_frame(tail[found.start() :][:16], block) for found in _syncs(tail))
    end = max((e for e in ends if e is not None), default=None)
    if end is not None and claimed and end > claimed:
        raise goes_on(claimed, end, "samples")
    return Extent(frames=claimed or end)


def _syncs(tail: bytes) -> Iterator[re.Match[bytes]]:
    return re.finditer(rb"\xff[\xf8\xf9]", tail)


def _end_of_frame(header: bytes, block: int) -> int | None:
    """The number of the sample after the frame; None for bytes that are not a frame header."""
    if len(header) < 16 or header[3] & 1:
        return None
    lead = header[4]
    more = 0 if lead < 0x80 else 8 - (~lead & 0xFF).bit_length() - 1
    if more < 0 or more > 6:
        return None
    number = lead if more == 0 else lead & (0x3F >> more)
    for byte in header[5 : 5 + more]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 0x3F
    at, code = 5 + more, header[2] >> 4
    if code in (6, 7):
        width = code - 5
        samples = int.from_bytes(header[at : at + width], "big") + 1
        at += width
    elif (samples := _BLOCKS.get(code)) is None:
        return None
    at += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    return number + samples if header[1] & 1 else number * block + samples


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ (0x07 if value & 0x80 else 0)) & 0xFF
    return value
