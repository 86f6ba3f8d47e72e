"""The available memory, so that work that cannot fit is refused before it starts."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory", "readable_size"]


def available_memory() -> int | None:
    """Bytes that this process can allocate now, within the limits of the system and of its control group.

    None if the operating system does not report it.
    """
    found = [value for value in (_system_available(), _cgroup_available()) if value is not None]
    return min(found, default=None)


def readable_size(size: float) -> str:
    """A number of bytes in binary units: 1.5e9 is "1.4 GiB"."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _system_available() -> int | None:
    for line in _read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
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
