"""The available memory and disk space, so that work that cannot fit is refused before it starts.

Qdrant Edge maps sparse files of 1 to 32 MiB into memory. The operating system allocates a page of them when it is first
written. If the disk is full then, it ends the process with SIGBUS, which no code can handle. So each write is checked
beforehand. Images and archives leave the last `RESERVE` bytes to the engine, which can then always finish and be opened
again. The checks know nothing of disk quotas, and another process can fill the disk between a check and a write.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from unidiff_sdk.errors import StoreError

__all__ = [
    "RESERVE",
    "DiskFullError",
    "PeakMemory",
    "available_memory",
    "free_space",
    "peak_memory",
    "readable_size",
    "require_free_space",
]

RESERVE = 32 << 20
"""Bytes that remain free on the disk of a catalog: a few times what a batch of writes, a new shard or closing needs."""


class DiskFullError(StoreError):
    """A disk has too little room for an operation, which was not started."""


def available_memory() -> int | None:
    """Bytes that this process can allocate now, within the limits of the system and of its control group.

    None if the operating system does not report it.
    """
    found = [value for value in (_memory_in("/proc/meminfo", "MemAvailable"), _cgroup_available()) if value is not None]
    return min(found, default=None)


@dataclass
class PeakMemory:
    """The result of `peak_memory`.

    Attributes:
        growth: the most memory in use during the block, less that before it, in bytes. None if the operating system
            does not report it.
    """

    growth: int | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure by how many bytes the memory of this process grows at most during a block."""
    peak = PeakMemory()
    with suppress(OSError):  # then the peak is that since the process started, and the growth too small
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    before = _memory_in("/proc/self/status", "VmRSS")
    yield peak
    most = _memory_in("/proc/self/status", "VmHWM")
    peak.growth = None if before is None or most is None else max(0, most - before)


def readable_size(size: float) -> str:
    """A number of bytes in binary units: 1.5e9 is "1.4 GiB"."""
    size = min(size, sys.float_info.max)  # an integer can be larger
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def free_space(folder: Path) -> int:
    """The free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_free_space(folder: Path, size: int, purpose: str, *, reserve: int = RESERVE) -> None:
    """Check that a disk has room.

    Args:
        folder: a folder on the disk.
        size: bytes that will be written.
        purpose: what is written, as the subject of a sentence.
        reserve: bytes that must remain free afterwards.

    Raises:
        DiskFullError: the disk has less room.
    """
    free = free_space(folder)
    if free < size + reserve:
        raise DiskFullError(
            f"The disk is too full: {purpose} needs {_mebibytes(size + reserve)} of free space, and the disk of "
            f"{folder} has {_mebibytes(free)}. Nothing that was stored is lost. Free some space, or move the catalog "
            "to another disk, and try again."
        )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _memory_in(file: str, name: str) -> int | None:
    """A line of /proc/meminfo or of a process's status, in bytes."""
    for line in _read_text(file).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """What is left in the control group (version 2). Its inactive page cache counts as free: the kernel can drop it."""
    own = next((line[3:] for line in _read_text("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    for folder in (f"/sys/fs/cgroup{own.rstrip('/')}", "/sys/fs/cgroup"):
        limit, used = _read_text(f"{folder}/memory.max").strip(), _read_text(f"{folder}/memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            statistics = (line.split() for line in _read_text(f"{folder}/memory.stat").splitlines())
            cache = sum(int(value) for name, value in statistics if name == "inactive_file")
            return max(0, int(limit) - int(used) + cache)
    return None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux, or no control groups
        return ""
