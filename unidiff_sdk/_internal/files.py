"""Files that are written whole or not at all."""

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
    """A new file beside `path` to write to, which takes its place when the block ends well and else is gone.

    Raises:
        StoreError: it cannot be written, as when the disk is full.
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


def write_atomically(path: Path, data: bytes, *, durably: bool = False) -> None:
    """Write a file so that it is there whole or not at all. Raises StoreError, as when the disk is full.

    durably: also after a power cut, which takes the disk's time: for what all else hangs on.
    """
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        if durably:
            file.flush()
            os.fsync(file.fileno())
