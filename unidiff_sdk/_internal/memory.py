"""How much memory a picture takes and how much there is, so that what cannot fit is refused before it is begun."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory", "readable_size"]


def available_memory() -> int | None:
    """Bytes that this process could take now, by the system's and its control group's account; None if unknown."""
    found = [value for value in (_of_system(), _of_group()) if value is not None]
    return min(found, default=None)


def readable_size(size: float) -> str:
    """1.5e9 as "1.4 GiB"."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _of_system() -> int | None:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_group() -> int | None:
    """What is left in the control group (version 2): its page cache counts as free, because it can be dropped."""
    own = next((line[3:] for line in _text("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    for folder in (f"/sys/fs/cgroup{own.rstrip('/')}", "/sys/fs/cgroup"):
        limit, used = _text(f"{folder}/memory.max").strip(), _text(f"{folder}/memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            cache = (line.split() for line in _text(f"{folder}/memory.stat").splitlines())
            return max(0, int(limit) - int(used) + sum(int(n) for name, n in cache if name == "inactive_file"))
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # another system than Linux, or no control groups
        return ""
