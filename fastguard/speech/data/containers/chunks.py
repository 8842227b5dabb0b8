"""Containers of chunks (WAV, RF64, AIFF, W64), and headers of a fixed form (AU, NIST)."""

import re
import struct
from typing import BinaryIO

from .extent import Extent, cut_off, goes_on, read_at

_SLACK = 1024  # bytes; of a last block, or of padding
_STREAM = ((0x7FFFE000, 0x7FFFFFFF), (0xFFFFF000, 0xFFFFFFFF))  # sizes that mean: not known yet


def chunks_extent(file: BinaryIO, position: int, size: int, order: str) -> Extent:
    """The extent of WAV, RF64 or AIFF, whose chunks begin at ``position``."""
    long_size = None  # of RF64: its offset and its value
    while len(head := read_at(file, position, 8)) == 8:
        name, length = head[:4], struct.unpack(order + "I", head[4:])[0]
        position += 8
        if name == b"ds64":
            place = position + 8
            long_size = place, struct.unpack("<Q", read_at(file, place, 8).ljust(8, b"\0"))[0]
        if name in (b"data", b"SSND"):
            field = position - 4, order + "I"
            if length == 0xFFFFFFFF and long_size:
                field, length = (long_size[0], "<Q"), long_size[1]
            return _data_chunk(file, position, length, size, field)
        position += length + length % 2
    return Extent()


def _data_chunk(
    file: BinaryIO, start: int, claimed: int, size: int, field: tuple[int, str]
) -> Extent:
    """The extent of a chunk of samples at ``start``; ``field``: offset and format of its size."""
    there = size - start
    if any(low <= claimed <= high for low, high in _STREAM) and there < claimed:
        return Extent()  # libsndfile reads to the end
    if claimed > there + _slack(there):
        raise cut_off(claimed, there)
    after = start + claimed + claimed % 2
    if size - after <= _slack(there) or _is_chunk(read_at(file, after, 8)):
        return Extent()
    if claimed == 0:  # never filled in: the recorder was killed, or wrote to a pipe
        place, form = field
        return Extent(patches={place: struct.pack(form, min(there, 0xFFFFFFFE))})
    raise goes_on(claimed, there)


def _slack(there: int) -> int:
    return min(_SLACK, there // 100)


def _is_chunk(head: bytes) -> bool:
    return len(head) == 8 and re.fullmatch(rb"[ -~]{4}", head[:4]) is not None


def wave64_extent(file: BinaryIO, size: int) -> Extent:
    """The extent of W64."""
    claimed = struct.unpack("<Q", read_at(file, 16, 8).ljust(8, b"\0"))[0]
    if size + _SLACK < claimed < 1 << 62:
        raise cut_off(claimed, size, "bytes")
    if claimed + _SLACK < size:
        raise goes_on(claimed, size, "bytes")
    return Extent()


def au_extent(head: bytes, size: int) -> Extent:
    """The extent of AU, by its first 12 bytes."""
    if len(head) < 12:
        raise cut_off(12, len(head), "bytes of header")
    start, claimed = struct.unpack((">" if head[:1] == b"." else "<") + "II", head[4:12])
    there = size - start
    if claimed != 0xFFFFFFFF and claimed > there + _slack(there):
        raise cut_off(claimed, there)
    if claimed + _slack(there) < there:
        raise goes_on(claimed, there)
    return Extent()


def nist_extent(header: bytes) -> Extent:
    """The extent of NIST SPHERE, by its first 1024 bytes."""
    count = re.search(rb"sample_count -i (\d{1,15})\s", header)
    return Extent(frames=int(count[1]) if count else None)
