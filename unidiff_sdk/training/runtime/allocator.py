"""The heap of training and export: freed memory that is reused by the next step, or returned to the system."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory", "return_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER_TRIM = 2**31 - 1  # bytes: the largest value that mallopt accepts
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes: the largest value of M_MMAP_THRESHOLD, where glibc's own adjustment ends


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within the block, glibc keeps freed heap memory instead of returning it to the system.

    A training step frees hundreds of megabytes of activations and allocates them again in the next step. Returned
    memory costs a page fault for each page that is allocated again. The memory is returned when the block ends. The
    setting applies to the whole process. It has no effect with another allocator than glibc's.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Collect garbage, and return all freed memory to the system, so that another allocator can use it.

    glibc returns only the memory at the end of its heap: one small block there keeps gigabytes of freed weights.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
