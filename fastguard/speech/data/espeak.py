"""eSpeak NG as a program: ``python espeak.py LIBRARY DATA REQUESTS`` speaks a file of requests.

A request is a line of JSON: {"text", "voice", "rate" (words per minute), "pitch" (0 to 99)}. For
each request, standard output gets the number of bytes (4 bytes, little-endian) and the samples
(int16, mono, SAMPLE_RATE).

It runs as a program because the library keeps state between utterances that neither
espeak_Terminate nor a new seed resets. Only in a new process do the same requests in the same order
give the same bytes. It also keeps a GPL library out of the process that trains.
"""

import ctypes
import json
import sys

SAMPLE_RATE = 22_050

# espeak-ng/speak_lib.h, 1.52
AUDIO_OUTPUT_SYNCHRONOUS = 2
ESPEAK_RATE, ESPEAK_PITCH = 1, 3
ESPEAK_CHARS_UTF8 = 1
POS_CHARACTER = 1
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class Speaker:
    """The library, with one voice at a time."""

    def __init__(self, library: str, data: str) -> None:
        self._espeak = ctypes.CDLL(library)
        rate = self._espeak.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), 0)
        if rate != SAMPLE_RATE:
            sys.exit(
                f"espeak_Initialize gives {rate} Hz instead of {SAMPLE_RATE}: wrong data in {data}?"
            )
        # The breath of a voice is noise, which espeak_Initialize seeds with the time of day.
        self._espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._samples = bytearray()
        self._callback = CALLBACK(self._collect)  # kept: ctypes does not hold a reference
        self._espeak.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: int | None, count: int, events: int | None) -> int:
        if samples:
            self._samples += ctypes.string_at(samples, 2 * count)
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> bytes:
        """Samples of a text, int16 at SAMPLE_RATE."""
        self._samples.clear()
        if self._espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            sys.exit(f"eSpeak NG has no voice {voice!r}: reinstall espeakng-loader")
        self._espeak.espeak_SetParameter(ESPEAK_RATE, rate, 0)
        self._espeak.espeak_SetParameter(ESPEAK_PITCH, pitch, 0)
        line = text.encode() + b"\0"
        size = ctypes.c_size_t(len(line))
        self._espeak.espeak_Synth(line, size, 0, POS_CHARACTER, 0, ESPEAK_CHARS_UTF8, None, None)
        return bytes(self._samples)


def main(library: str, data: str, requests: str) -> None:
    """Speak each request of a file to standard output."""
    speaker = Speaker(library, data)
    with open(requests, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            samples = speaker.speak(*(request[key] for key in ("text", "voice", "rate", "pitch")))
            sys.stdout.buffer.write(len(samples).to_bytes(4, "little") + samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
