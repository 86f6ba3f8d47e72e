"""A store's folder: one shard at a time, in a subfolder of its own, so that a new one takes its place in one rename.

    vectors/lock       held by the one process that has the store open
    vectors/current    the name of the subfolder that counts: a text file
    vectors/3/         the shard

Whatever else lies there is a shard that was being built, or that was replaced, when its process was killed. Stores of
earlier versions have their shard in `vectors/` itself, which is where it is looked for if there is no `current`.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk.errors import StoreError

__all__ = ["ShardVersions"]

CURRENT, LOCK = "current", "lock"


class ShardVersions:
    """The subfolders of one store, locked against every other process (and every other object) until `release`.

    Raises:
        StoreError: the folder is in use, or cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / LOCK).open("a")  # as an object, so that a forgotten store lets go
        except OSError as error:
            raise StoreError(f"{root} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(
                f"{root.parent} is in use by another process or by another Catalog object: close that one first. "
                "(Several processes at once need a Qdrant server: Catalog('http://…').)"
            ) from None
        self._sweep()

    @property
    def current(self) -> Path:
        """The folder of the shard that counts; it does not exist in a new store."""
        if (self.root / CURRENT).is_file():
            return self.root / (self.root / CURRENT).read_text(encoding="utf-8").strip()
        return self.root if (self.root / "edge_config.json").is_file() else self.root / "0"

    def following(self) -> Path:
        """A folder for the next shard; it does not exist yet."""
        return self.root / str(1 + max((int(p.name) for p in self.root.iterdir() if p.name.isdecimal()), default=0))

    def switch(self, folder: Path) -> None:
        """Make a complete shard the one that counts."""
        write_atomically(self.root / CURRENT, folder.name.encode(), durably=True)

    def remove(self, folder: Path) -> None:
        """Delete a shard that does not count (any more)."""
        if folder != self.root:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._sweep()

    def release(self) -> None:
        self._lock.close()

    def _sweep(self) -> None:
        """Delete what a killed process left: everything but the shard that counts."""
        current = self.current
        if current == self.root:
            return
        for entry in self.root.iterdir():
            if entry.name in (CURRENT, LOCK, current.name):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
