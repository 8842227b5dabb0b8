"""Tensors whose memory begins or ends at an inaccessible page."""

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _READ_WRITE = 0, 3
_PRIVATE_ANONYMOUS = 0x22


class Plain:
    """Ordinary memory, for copies of the tensors between guard pages."""

    def __init__(self):
        #: All placed tensors, one-dimensional, in order.
        self.placed = []

    def place(self, values: torch.Tensor, at_end: bool) -> torch.Tensor:
        """A copy of one-dimensional values in separate memory."""
        self.placed.append(self._room(values, at_end))
        return self.placed[-1]

    def _room(self, values, at_end):
        return values.clone()

    def bytes(self) -> list[bytes]:
        return [t.view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in self.placed]

    def free(self) -> None:
        self.placed.clear()


class Guarded(Plain):
    """Memory with an inaccessible page on either side; Linux only. It must outlive its tensors."""

    def __init__(self):
        super().__init__()
        self._mappings = []

    def _room(self, values, at_end):
        size = values.numel() * values.element_size()
        if size == 0:
            return values.clone()
        inner = -(-size // PAGE) * PAGE
        first = _libc.mmap(None, inner + 2 * PAGE, _NONE, _PRIVATE_ANONYMOUS, -1, 0)
        if first in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"mmap: errno {ctypes.get_errno()}")
        self._mappings.append((first, inner + 2 * PAGE))
        if _libc.mprotect(first + PAGE, inner, _READ_WRITE) != 0:
            raise MemoryError(f"mprotect: errno {ctypes.get_errno()}")
        at = first + PAGE + (inner - size if at_end else 0)
        room = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=values.dtype)
        return room.copy_(values)

    def free(self):
        super().free()
        for first, size in self._mappings:
            _libc.munmap(first, size)
        self._mappings.clear()
