"""How long a recording is by the bytes of its file, which libsndfile does not check.

libsndfile stops where a header says so, or where the rest can not be decoded, and reports neither:
of an MP3 without a Xing header it reads as much as an estimate says, of a torn wav file what there
is. :func:`examine` compares what a container claims with what the file holds. Where the header is
at fault and the samples are there it says how to correct the header; everything else is an
:class:`Incomplete`.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

#: Containers whose length is checked, by the name that libsndfile has for them.
READABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
SUFFIXES = (
    *(".wav", ".wave", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
    *(".flac", ".ogg", ".oga", ".opus", ".mp1", ".mp2", ".mp3", ".nist", ".sph"),
)


class Incomplete(ValueError):
    """The file does not hold what its container claims; reads "kind: what"."""


@dataclass(frozen=True)
class Extent:
    """``frames`` that the file is known to hold, where its container says so better than
    libsndfile does; bytes that a reader should see in place of the file's (``patches``, by offset)
    and besides them (``inserted`` at an offset)."""

    frames: int | None = None
    patches: dict[int, bytes] = field(default_factory=dict)
    inserted: tuple[int, bytes] = (0, b"")

    def view(self, file: BinaryIO) -> "BinaryIO | _View":
        """The file as it should be read; the file itself where nothing is to be corrected."""
        return _View(file, self) if self.patches or self.inserted[1] else file


def examine(file: BinaryIO) -> Extent | None:
    """What is known of a recording's length, or None for a container that is not READABLE.

    Raises Incomplete where samples are missing, or would be passed over.
    """
    try:
        return _examine(file)
    except (IndexError, struct.error) as error:  # of a header that ends too early
        raise Incomplete(f"damaged: its header cannot be read ({error})") from None


def _examine(file: BinaryIO) -> Extent | None:
    start = _skip_id3(file, 0)
    head = _at(file, start, 16)
    size = file.seek(0, io.SEEK_END)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _chunks(file, start + 12, size, "<")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _chunks(file, start + 12, size, ">")
    if head[:4] == b"riff":
        return _wave64(file, size)
    if head[:4] in (b".snd", b"dns."):
        return _au(head, size)
    if head[:4] == b"caff":
        return Extent()  # libsndfile refuses what is torn
    if head[:7] == b"NIST_1A":
        return _nist(_at(file, start, 1024))
    if head[:4] == b"fLaC":
        return _flac(file, start, size)
    if head[:4] == b"OggS":
        return _ogg(file, start)
    return _mpeg(file, start, size)


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
        """Bytes of the file, the replaced ones among them."""
        if start >= end:
            return b""
        content = bytearray(_at(self._file, start, end - start))
        for offset, new in self._patches.items():
            for place, byte in enumerate(new, start=offset - start):
                if 0 <= place < len(content):
                    content[place] = byte
        return bytes(content)


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _skip_id3(file: BinaryIO, start: int) -> int:
    """Where the ID3v2 tags that begin there end."""
    while (head := _at(file, start, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:]
        footer = 10 if head[5] & 0x10 else 0
        start += 10 + footer + (a << 21 | b << 14 | c << 7 | d)
    return start


def _cut_off(claimed: int, there: int, unit: str = "bytes of samples") -> Incomplete:
    return Incomplete(
        f"cut off: its header claims {claimed} {unit} and the file has {there}, as after an "
        "interrupted copy or recording"
    )


def _goes_on(claimed: int, there: int, unit: str = "bytes of samples") -> Incomplete:
    return Incomplete(
        f"wrong length: its header claims {claimed} {unit} and the file has {there}, most of which "
        "would be passed over"
    )


# --- chunks: wav, RF64, aiff, W64; and headers of a fixed form ------------------------------------

_SLACK = 1024  # bytes of a last block, of padding
_STREAM = ((0x7FFFE000, 0x7FFFFFFF), (0xFFFFF000, 0xFFFFFFFF))  # sizes that say: not known yet


def _chunks(file: BinaryIO, position: int, size: int, order: str) -> Extent:
    long_size = None  # of an RF64: where it is, and what it says
    while len(head := _at(file, position, 8)) == 8:
        name, length = head[:4], struct.unpack(order + "I", head[4:])[0]
        position += 8
        if name == b"ds64":
            place = position + 8
            long_size = place, struct.unpack("<Q", _at(file, place, 8).ljust(8, b"\0"))[0]
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
    """Of a chunk of samples that begins at ``start``; ``field`` is where its size is, and how."""
    there = size - start
    if any(low <= claimed <= high for low, high in _STREAM) and there < claimed:
        return Extent()  # libsndfile reads on to the end
    if claimed > there + _slack(there):
        raise _cut_off(claimed, there)
    after = start + claimed + claimed % 2
    if size - after <= _slack(there) or _is_chunk(_at(file, after, 8)):
        return Extent()
    if claimed == 0:  # never filled in, as by a recorder that was killed, or into a pipe
        place, form = field
        return Extent(patches={place: struct.pack(form, min(there, 0xFFFFFFFE))})
    raise _goes_on(claimed, there)


def _slack(there: int) -> int:
    return min(_SLACK, there // 100)


def _is_chunk(head: bytes) -> bool:
    return len(head) == 8 and re.fullmatch(rb"[ -~]{4}", head[:4]) is not None


def _wave64(file: BinaryIO, size: int) -> Extent:
    claimed = struct.unpack("<Q", _at(file, 16, 8).ljust(8, b"\0"))[0]
    if size + _SLACK < claimed < 1 << 62:
        raise _cut_off(claimed, size, "bytes")
    if claimed + _SLACK < size:
        raise _goes_on(claimed, size, "bytes")
    return Extent()


def _au(head: bytes, size: int) -> Extent:
    if len(head) < 12:
        raise _cut_off(12, len(head), "bytes of header")
    start, claimed = struct.unpack((">" if head[:1] == b"." else "<") + "II", head[4:12])
    there = size - start
    if claimed != 0xFFFFFFFF and claimed > there + _slack(there):
        raise _cut_off(claimed, there)
    if claimed + _slack(there) < there:
        raise _goes_on(claimed, there)
    return Extent()


def _nist(header: bytes) -> Extent:
    count = re.search(rb"sample_count -i (\d{1,15})\s", header)
    return Extent(frames=int(count[1]) if count else None)


# --- FLAC -----------------------------------------------------------------------------------------

_FLAC_TAIL = 1 << 17  # bytes; a frame takes fewer
_FLAC_BLOCKS = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608} | {
    code: 256 << (code - 8) for code in range(8, 16)
}


def _flac(file: BinaryIO, start: int, size: int) -> Extent:
    """By the last frame, whose header numbers its samples."""
    info = _at(file, start + 8, 18)
    if len(info) < 18:
        return Extent()
    block = int.from_bytes(info[2:4], "big")
    claimed = int.from_bytes(info[13:18], "big") & 0xFFFFFFFFF
    tail = _at(file, max(start + 42, size - _FLAC_TAIL), _FLAC_TAIL)
    if b"fLaC\0" in tail:
        raise Incomplete("two recordings: another FLAC file is appended to it, which is not read")
    ends = (_flac_end(tail[found.start() :][:16], block) for found in _flac_syncs(tail))
    end = max((e for e in ends if e is not None), default=None)
    if end is not None and claimed and end > claimed:
        raise _goes_on(claimed, end, "samples")
    return Extent(frames=claimed or end)


def _flac_syncs(tail: bytes) -> Iterator[re.Match[bytes]]:
    return re.finditer(rb"\xff[\xf8\xf9]", tail)


def _flac_end(header: bytes, block: int) -> int | None:
    """The sample after the frame of this header; None for bytes that are none."""
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
    elif (samples := _FLAC_BLOCKS.get(code)) is None:
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


# --- Ogg: Vorbis, Opus, FLAC ----------------------------------------------------------------------

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg(file: BinaryIO, position: int) -> Extent:
    """Every page has its number and checksum, and the last one a mark."""
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
    rest = _at(file, position, 1 << 16)
    if not ended:
        what = f"damaged: byte {position} begins no page" if rest else "cut off: no page is marked"
        raise Incomplete(f"{what} as the last, as after an interrupted copy or recording")
    if b"OggS" in rest:
        raise Incomplete(f"damaged: byte {position} begins no page, and pages follow")
    return Extent()


def _page(file: BinaryIO, position: int) -> tuple[int, int, int, int] | None:
    """Flags, stream, number and length of the page there; None where there is no whole page."""
    head = _at(file, position, 27)
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
    """Ogg's CRC has the polynomial of zlib's, its bits in the other order, and begins with 0."""
    mirrored = zlib.crc32(content.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")


# --- MPEG audio -----------------------------------------------------------------------------------

_BITRATES = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAME = 0xFFFE0C00  # bits of a frame's header that are the same in all: version, layer, rate
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


def _mpeg(file: BinaryIO, start: int, size: int) -> Extent | None:
    """By its frames, each of which is a header with the length of the frame.

    A Xing tag that is wrong or missing is put right, for libsndfile reads no further than it says.
    """
    if (start := _first_frame(file, start)) is None:
        return None
    first = _frame(_at(file, start, 4))
    content = _at(file, start, first.size)
    tag = content[first.xing : first.xing + 12]
    tagged = len(tag) == 12 and tag[:4] in (b"Xing", b"Info")
    vbri = len(content) >= 36 + 18 and content[36:40] == b"VBRI"
    begin = start + first.size if tagged or vbri else start
    count = _count(file, begin, first, size, tells_length=tagged or vbri)
    # A tag is a frame too, in which no sound is.
    if (tagged and tag[7] & 1) or vbri:
        place = start + (36 + 14 if vbri else first.xing + 8)
        claimed = int.from_bytes(_at(file, place, 4), "big")
        if claimed > count + 1:
            raise _cut_off(claimed * first.samples, count * first.samples, "samples")
        if claimed + 1 >= count:
            return Extent()
        patches = {place: struct.pack(">I", count)}
        if tagged and tag[7] & 2:
            patches[place + 4] = struct.pack(">I", min(size - start, 0xFFFFFFFF))
        return Extent(frames=count * first.samples, patches=patches)
    if first.bits >> 17 & 3 != 1:  # layers I and II have no Xing tag, and frames of one size
        return Extent(frames=count * first.samples)
    # The bitrate of a frame that is long enough, without a checksum or padding.
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
    """Where a frame is that another one, or the end of the file, follows."""
    head = _at(file, start, _FIND_WITHIN)
    for found in re.finditer(rb"\xff[\xe0-\xff]", head):
        at = found.start()
        frame = _frame(head[at : at + 4])
        if frame is None:
            continue
        after = _at(file, start + at + frame.size, 4)
        following = _frame(after)
        if not after or (following and not (following.bits ^ frame.bits) & _SAME):
            return start + at
    return None


def _count(file: BinaryIO, position: int, first: _Frame, size: int, tells_length: bool) -> int:
    """Frames from there to the end.  Raises Incomplete where other bytes lie between them, and for
    a part of a frame at the end where no tag ``tells_length``: nothing else shows that it is torn.
    """
    count = 0
    while position < size:
        frame = _frame(_at(file, position, 4))
        if frame is not None and not (frame.bits ^ first.bits) & _SAME:
            if position + frame.size > size:
                if not tells_length:
                    raise _cut_off(frame.size, size - position, "bytes in its last frame")
                break  # the decoder needs a whole one
            count += 1
            position += frame.size
            continue
        after = _skip_tag(file, position)
        if after == position:
            again = _first_frame(file, position + 1)
            odd = (size if again is None else again) - position
            if again is not None or odd > _ODD_END:
                raise Incomplete(f"damaged: {odd} bytes at byte {position} are no frame of sound")
            break
        position = after
    return count


def _skip_tag(file: BinaryIO, position: int) -> int:
    """The end of a tag of ID3 or APE that begins there."""
    head = _at(file, position, 32)
    if head[:3] == b"TAG":
        return position + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return position + 32 + int.from_bytes(head[12:16], "little")
    return _skip_id3(file, position)
