"""File modes under a umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the umask of this process."""
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def modes_below(folder: Path) -> tuple[set[int], set[int]]:
    """The modes of all files below a folder, and of all folders with itself."""
    entries = [folder, *folder.rglob("*")]
    files = {stat.S_IMODE(entry.stat().st_mode) for entry in entries if entry.is_file()}
    return files, {stat.S_IMODE(entry.stat().st_mode) for entry in entries if entry.is_dir()}
