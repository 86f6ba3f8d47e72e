"""A folder of bounded size for local copies of files, shared by several processes."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from unidiff_sdk._internal.files import remove_unfinished, write_atomically

__all__ = ["FileCache"]

_CHECKS = 16  # how often the size is measured while as much is written as the cache may hold
_FILL = 0.9  # how full the cache is after files were deleted


class FileCache:
    """Copies of files by name. The time of the last use is the modification time of a copy.

    Several processes may write at once, so the folder can exceed `max_size` by a sixteenth for each of them.

    Args:
        root: the folder; created with the first file.
        max_size: bytes; the files used least recently are deleted first.
    """

    def __init__(self, root: Path, max_size: int) -> None:
        self._root, self._max_size = root, max_size
        self._unmeasured = max_size  # measure at the first write: an earlier process may have left more
        self._lock = threading.Lock()

    def get(self, name: str) -> Path | None:
        """The copy of a file, which another process may delete at any time; None if there is none."""
        path = self._root / name
        try:
            os.utime(path)
            return path if path.stat().st_size else None  # a power cut can leave an empty file behind
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> Path:
        """Store a copy. Raises StoreError, for example on a full disk."""
        path = self._root / name
        write_atomically(path, data)
        with self._lock:
            self._unmeasured += len(data)
            is_due = self._unmeasured > self._max_size / _CHECKS
            if is_due:
                self._unmeasured = 0
        if is_due:
            self._shrink(path)
        return path

    def remove(self, name: str) -> None:
        """Delete a copy, if there is one."""
        with suppress(OSError):
            (self._root / name).unlink()

    def _shrink(self, newest: Path) -> None:
        """Delete the files used least recently, except the newest.

        One process at a time, and the others wait: who went on writing meanwhile could fill the folder without bound.
        """
        with self._locked():
            found = []
            for folder, _, names in os.walk(self._root):
                remove_unfinished(Path(folder))
                for path in (Path(folder, name) for name in names if not name.endswith((".lock", ".part"))):
                    with suppress(OSError):
                        status = path.stat()
                        found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            if total <= self._max_size:
                return
            for _, size, path in sorted(found):
                if total <= self._max_size * _FILL:
                    return
                if path != newest:
                    with suppress(OSError):
                        path.unlink()
                        total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder. Some network file systems have none: several processes may shrink it then."""
        with ExitStack() as stack:
            with suppress(OSError):
                # Reading suffices: users who share a folder may not write each other's files.
                lock = os.open(self._root / "cache.lock", os.O_RDONLY | os.O_CREAT, 0o666)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
