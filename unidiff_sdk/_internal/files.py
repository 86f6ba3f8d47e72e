"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unidiff_sdk.errors import StoreError

__all__ = ["atomic_file", "write_atomically"]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`. It replaces `path` if the block succeeds and is deleted if not.

    Raises:
        StoreError: the file cannot be written, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        os.close(handle)
        try:
            yield Path(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_atomically(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Write a file atomically.

    Args:
        path: the file; its folder is created.
        data: the content.
        fsync: also survive a power cut. This waits for the disk.

    Raises:
        StoreError: the file cannot be written, for example because the disk is full.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
