"""How long a recording is, by the bytes of its file; libsndfile does not check this.

libsndfile stops where the header says so, or where the rest cannot be decoded, and reports neither.
It reads an MP3 without a Xing header up to an estimated length, and an incomplete WAV file up to
its end. :func:`examine` compares the length that a container claims with the file. If only the
header is wrong and the samples exist, it says how to correct the header. Otherwise it raises
:class:`Incomplete`.
"""

import io
import struct
from typing import BinaryIO

from .chunks import au_extent, chunks_extent, nist_extent, wave64_extent
from .extent import Extent, Incomplete, read_at, skip_id3
from .flac import flac_extent
from .mpeg import mpeg_extent
from .ogg import ogg_extent

__all__ = ["READABLE", "SUFFIXES", "Extent", "Incomplete", "examine"]

#: Containers whose length is checked, by the names of libsndfile.
READABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
SUFFIXES = (
    *(".wav", ".wave", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
    *(".flac", ".ogg", ".oga", ".opus", ".mp1", ".mp2", ".mp3", ".nist", ".sph"),
)


def examine(file: BinaryIO) -> Extent | None:
    """What is known about a recording's length; None for a container that is not READABLE.

    Raises:
        Incomplete: samples are missing, or a reader would skip some.
    """
    try:
        return _examine(file)
    except (IndexError, struct.error) as error:  # the header ends too early
        raise Incomplete(f"damaged: its header cannot be read ({error})") from None


def _examine(file: BinaryIO) -> Extent | None:
    start = skip_id3(file, 0)
    head = read_at(file, start, 16)
    size = file.seek(0, io.SEEK_END)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return chunks_extent(file, start + 12, size, "<")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return chunks_extent(file, start + 12, size, ">")
    if head[:4] == b"riff":
        return wave64_extent(file, size)
    if head[:4] in (b".snd", b"dns."):
        return au_extent(head, size)
    if head[:4] == b"caff":
        return Extent()  # libsndfile refuses an incomplete file
    if head[:7] == b"NIST_1A":
        return nist_extent(read_at(file, start, 1024))
    if head[:4] == b"fLaC":
        return flac_extent(file, start, size)
    if head[:4] == b"OggS":
        return ogg_extent(file, start)
    return mpeg_extent(file, start, size)
