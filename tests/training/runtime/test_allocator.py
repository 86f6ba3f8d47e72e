"""The heap: freed memory is returned to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from unidiff_sdk.training.runtime.allocator import return_freed_memory

BLOCK = 64 << 10  # bytes: small enough for glibc's heap


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is managed by another allocator")
def test_memory_below_a_block_in_use_is_returned() -> None:
    blocks = [bytearray(b"x") * BLOCK for _ in range(1600)]  # 100 MiB
    last = blocks[-1]
    filled = resident()
    del blocks
    kept = resident()
    return_freed_memory()
    assert len(last) == BLOCK
    assert kept > filled - (16 << 20), "glibc returns it by itself, so nothing was tested"
    assert resident() < filled - (64 << 20)
