"""MPEG audio (MP1, MP2, MP3): its frames are counted."""

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from .extent import Extent, Incomplete, cut_off, read_at, skip_id3

_BITRATES = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAME = 0xFFFE0C00  # bits of a frame's header that are equal in all frames: version, layer, rate
_FIND_WITHIN = 1 << 16  # bytes before the first frame
_ODD_END = 4096  # bytes of padding after the last one


@dataclass(frozen=True)
class _Frame:
    bits: int
    size: int
    samples: int
    xing: int  # offset of a Xing tag in the frame


def _frame(head: bytes) -> _Frame | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    bits = int.from_bytes(head[:4], "big")
    version, layer = bits >> 19 & 3, 4 - (bits >> 17 & 3)
    rate, code = bits >> 10 & 3, bits >> 12 & 15
    if version == 1 or layer == 4 or rate == 3 or code in (0, 15):
        return None
    first = version == 3
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bitrate, padding = 1000 * _BITRATES[first, layer][code - 1], bits >> 9 & 1
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    size = 4 * (12 * bitrate // hertz + padding)
    if layer > 1:
        size = samples // 8 * bitrate // hertz + padding
    mono = bits >> 6 & 3 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Frame(bits, size, samples, 4 + side)


def mpeg_extent(file: BinaryIO, start: int, size: int) -> Extent | None:
    """Count the frames; the header of each gives its length.

    A wrong or missing Xing tag is corrected, because libsndfile reads no further than it says.
    """
    if (start := _first_frame(file, start)) is None:
        return None
    first = _frame(read_at(file, start, 4))
    content = read_at(file, start, first.size)
    tag = content[first.xing : first.xing + 12]
    tagged = len(tag) == 12 and tag[:4] in (b"Xing", b"Info")
    vbri = len(content) >= 36 + 18 and content[36:40] == b"VBRI"
    begin = start + first.size if tagged or vbri else start
    count = _count(file, begin, first, size, tells_length=tagged or vbri)
    # A tag is a frame without sound.
    if (tagged and tag[7] & 1) or vbri:
        place = start + (36 + 14 if vbri else first.xing + 8)
        claimed = int.from_bytes(read_at(file, place, 4), "big")
        if claimed > count + 1:
            raise cut_off(claimed * first.samples, count * first.samples, "samples")
        if claimed + 1 >= count:
            return Extent()
        patches = {place: struct.pack(">I", count)}
        if tagged and tag[7] & 2:
            patches[place + 4] = struct.pack(">I", min(size - start, 0xFFFFFFFF))
        return Extent(frames=count * first.samples, patches=patches)
    if first.bits >> 17 & 3 != 1:  # layers I and II have no Xing tag, and frames of one size
        return Extent(frames=count * first.samples)
    # Find a bitrate whose frame, without checksum and padding, has room for the tag.
    for code in range(1, 15):
        bits = first.bits & ~(0xF << 12 | 1 << 9) | code << 12 | 1 << 16
        frame = _frame(bits.to_bytes(4, "big"))
        if frame.size >= frame.xing + 12:
            break
    made = bytearray(frame.size)
    made[:4] = bits.to_bytes(4, "big")
    made[frame.xing : frame.xing + 12] = b"Xing" + struct.pack(">II", 1, count)
    return Extent(count * first.samples, inserted=(start, bytes(made)))


def _first_frame(file: BinaryIO, start: int) -> int | None:
    """The offset of the first frame that another frame, or the end of the file, follows."""
    head = read_at(file, start, _FIND_WITHIN)
    for found in re.finditer(rb"\xff[\xe0-\xff]", head):
        at = found.start()
        frame = _frame(head[at : at + 4])
        if frame is None:
            continue
        after = read_at(file, start + at + frame.size, 4)
        following = _frame(after)
        if not after or (following and not (following.bits ^ frame.bits) & _SAME):
            return start + at
    return None


def _count(file: BinaryIO, position: int, first: _Frame, size: int, tells_length: bool) -> int:
    """The number of frames from ``position`` to the end.

    Raises Incomplete for other bytes between the frames, and for an incomplete frame at the end if
    no tag ``tells_length``: nothing else shows then that the file is cut off.
    """
    count = 0
    while position < size:
        frame = _frame(read_at(file, position, 4))
        if frame is not None and not (frame.bits ^ first.bits) & _SAME:
            if position + frame.size > size:
                if not tells_length:
                    raise cut_off(frame.size, size - position, "bytes in its last frame")
                break  # the decoder needs a whole frame
            count += 1
            position += frame.size
            continue
        after = _skip_tag(file, position)
        if after == position:
            again = _first_frame(file, position + 1)
            odd = (size if again is None else again) - position
            if again is not None or odd > _ODD_END:
                raise Incomplete(f"damaged: {odd} bytes at byte {position} are not an audio frame")
            break
        position = after
    return count


def _skip_tag(file: BinaryIO, position: int) -> int:
    """The offset behind an ID3 or APE tag that begins at ``position``."""
    head = read_at(file, position, 32)
    if head[:3] == b"TAG":
        return position + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return position + 32 + int.from_bytes(head[12:16], "little")
    return skip_id3(file, position)
