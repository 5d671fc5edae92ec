"""Where a decoder's weights lie: in large pieces of memory, which the system may back with huge pages.

A weight is read once for every token. With pages of 4 KB the processor looks up an address for every 64 lines it reads;
with pages of 2 MB hardly ever, which makes decoding 12 % faster (SmolLM2-135M at 4 bits, one thread). The system gives
them where it is asked (Linux, ``madvise``) and only to whole 2 MB, so that many small tensors are put together here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page
PIECE = 16 * HUGE  # bytes that are asked for at a time
ALIGNMENT = 64  # bytes: what the engine reads at a time begins at a multiple


class Arena:
    """Memory for tensors that stay as long as the model.

    >>> arena = Arena()
    >>> torch.equal(arena.place(torch.arange(5)), torch.arange(5))
    True
    """

    def __init__(self) -> None:
        self.piece = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def take(self, size: int) -> Tensor:
        """Memory for ``size`` bytes, from a multiple of 64 on; uint8."""
        if self.used + size > len(self.piece):
            give_back()  # what the conversion of earlier weights took, before there is more
            self.piece, self.used = huge_memory(max(size, PIECE)), 0
        start, self.used = self.used, self.used + size + -size % ALIGNMENT
        return self.piece[start : start + size]

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the arena."""
        if not tensor.numel():
            return tensor
        return self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def huge_memory(size: int) -> Tensor:
    """At least ``size`` bytes from a multiple of 2 MB on, which take no memory until they are written; uint8."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return torch.empty(size, dtype=torch.uint8)
    size = -(-size // HUGE) * HUGE
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]


@contextlib.contextmanager
def vocabulary_reading() -> Iterator[None]:
    """Around the reading of a vocabulary, which makes a million small objects and forgets most of them.

    Without the collection of garbage: it would look through them again and again, which doubles the time. At the end
    the system gets back what was forgotten (40 MB where there are 50,000 tokens); weights need other memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        give_back()


def give_back() -> None:
    """Return free memory of the heap to the system, where its C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
