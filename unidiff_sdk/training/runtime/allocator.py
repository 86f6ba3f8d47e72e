"""Memory between steps: what one step frees, the next one needs again."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
ALL = 2**31 - 1  # bytes: the most that mallopt takes
LARGEST_THRESHOLD = 32 << 20  # bytes: the most that M_MMAP_THRESHOLD takes, where glibc's own adjustment ends


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block, glibc keeps what is freed at the heap's end instead of giving it back to the system.

    A training step frees hundreds of megabytes of activations and asks for them again in the next: given back, every
    page of them is faulted in anew. Afterwards the memory is given back. Of the whole process, and without effect where
    memory is managed otherwise.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, ALL)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
