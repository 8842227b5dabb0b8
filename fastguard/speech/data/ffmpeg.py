"""Decodes what libsndfile does not read through the program ffmpeg, if it is on the PATH: AAC, WMA,
AMR and others, and the sound of videos."""

import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np

#: Suffixes of files that ffmpeg decodes here; other files are recognised by :func:`knows`.
SUFFIXES = (
    *(".3g2", ".3gp", ".aac", ".ac3", ".amr", ".ape", ".asf", ".avi", ".awb", ".dts", ".eac3"),
    *(".flv", ".gsm", ".m2ts", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ra", ".rm", ".spx", ".tta", ".voc", ".weba", ".webm", ".wma", ".wmv"),
    ".wv",
)
# Containers that hold samples themselves. Others, such as playlists (hls, concat), name further
# files and addresses, which a recording from a stranger must not make this machine open.
_DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,dtshd,eac3,flac,flv,gsm,matroska,mov,mp3,"
    "mpeg,mpegts,ogg,rm,tta,voc,w64,wav,wv"
)
#: How the program is installed.
INSTALL = "install it (apt-get install ffmpeg, brew install ffmpeg, winget install ffmpeg)"
_LIMIT = 60.0  # seconds that ffmpeg may take for one block of samples
_LARGEST = 256 << 20  # bytes that ffmpeg may allocate at once
_ERRORS = 4  # lines that are kept
_LINE = re.compile(r"(?:\[[^]]* @ \w+\] )*\[(\w+)\] (.*)")
_DURATION = re.compile(r"\s*Duration: (\d+):(\d\d):(\d\d\.\d+)")


class FfmpegError(ValueError):
    """ffmpeg is absent, or cannot decode a file; ``kind`` and the message say which."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def knows(head: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is one for ffmpeg."""
    return (
        head[4:8] == b"ftyp"  # mp4, m4a, mov, 3gp
        or head.startswith((b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR", b"FLV\x01"))
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (head[:1] == b"\xff" and head[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9"))  # ADTS
    )


def named(path: Path | str) -> bool:
    """Whether the suffix is that of a format for ffmpeg."""
    return Path(path).suffix.lower() in SUFFIXES


def available() -> bool:
    """Whether the program is on the PATH."""
    return shutil.which("ffmpeg") is not None


class Decoding:
    """The first audio stream of a file, read from start to end with the methods of
    soundfile.SoundFile that are needed here.

    ffmpeg ends with status 0 also where it has lost samples. So any error that it reports, and any
    packet that it calls corrupt, is an error here.

    Attributes:
        samplerate: in Hz.
        channels: their number.

    Raises:
        FfmpegError: ffmpeg is not on the PATH, or finds no sound in the file.
    """

    def __init__(self, path: Path | str) -> None:
        program = shutil.which("ffmpeg")
        if program is None:
            raise FfmpegError(
                "needs ffmpeg",
                f"the program ffmpeg, which reads it, is not on the PATH: {INSTALL}",
            )
        # The protocol is named, so that no name is taken for an option or for an address.
        self._address = f"file:{path}"
        self._process = subprocess.Popen(
            [
                *(program, "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"),
                *("-max_alloc", str(_LARGEST), "-threads", "1"),
                *("-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS),
                *("-i", self._address, "-map", "0:a:0"),
                *("-c:a", "pcm_f32be", "-f", "au", "pipe:1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._messages = _Messages(self._process.stderr)
        self._late = False
        self.samplerate = self.channels = 0
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        # An AU file: magic, offset of the samples, their size, encoding, rate, channels.
        header = self._bytes(24)
        if len(header) < 24:
            raise FfmpegError("unreadable audio", f"ffmpeg: {self._failure() or 'no samples'}")
        _, offset, _, _, self.samplerate, self.channels = struct.unpack(">6I", header)
        self._bytes(offset - 24)

    @property
    def duration(self) -> float | None:
        """Seconds that the container claims, or ffmpeg estimates; None if neither knows."""
        return self._messages.duration(_LIMIT)

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """The next samples (n, channels) float32, n <= ``frames``; empty at the end.

        Raises:
            FfmpegError: the file is damaged, or decoding takes too long.
        """
        data = self._bytes(4 * self.channels * frames)
        if len(data) < 4 * self.channels * frames and (failure := self._failure()):
            raise FfmpegError("incomplete audio", f"ffmpeg: {failure}")
        whole = len(data) // (4 * self.channels) * self.channels
        return np.frombuffer(data, ">f4", whole).reshape(-1, self.channels).astype(np.float32)

    def _bytes(self, count: int) -> bytes:
        """The next bytes of the output; fewer at its end."""
        watch = threading.Timer(_LIMIT, self._stop)
        watch.daemon = True
        watch.start()
        try:
            return self._process.stdout.read(count)
        finally:
            watch.cancel()

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def _failure(self) -> str | None:
        """What went wrong, after the end of the output; None if nothing did."""
        try:
            status = self._process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            self._stop()
            status = self._process.wait()
        if self._late:
            return f"no samples for {_LIMIT:g} s"
        errors = self._messages.errors()
        if errors:
            return errors[0].removeprefix(f"{self._address}: ").rstrip(". ")
        return f"exit status {status}" if status else None

    def close(self) -> None:
        """End the program, wherever it is."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Messages:
    """Reads what ffmpeg says, so that its pipe is never full; keeps the first errors."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self._errors: list[str] = []
        self._duration: float | None = None
        self._described = threading.Event()  # the input is; nothing more is said of its duration
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while line := self._stream.readline(4096):
            text = "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace"))
            if match := _LINE.match(text.rstrip("?")):
                self._note(*match.groups())
        self._described.set()

    def _note(self, level: str, message: str) -> None:
        failed = level in ("error", "fatal", "panic") or "orrupt" in message
        if failed and level != "info" and len(self._errors) < _ERRORS:
            self._errors.append(message[:200])
        elif level == "info" and not self._described.is_set():
            if length := _DURATION.match(message):
                hours, minutes, seconds = map(float, length.groups())
                self._duration = 3600 * hours + 60 * minutes + seconds
            # Metadata comes before the duration, and may look like it; the last one counts.
            if message.startswith("Output #0"):
                self._described.set()

    def duration(self, limit: float) -> float | None:
        self._described.wait(limit)
        return self._duration

    def errors(self) -> list[str]:
        """The first errors, after the end of the program."""
        self._thread.join()
        return self._errors

    def close(self) -> None:
        self._thread.join()
        self._stream.close()
