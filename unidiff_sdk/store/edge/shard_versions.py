"""The folder of a store: one subfolder for each version of the shard, so that a rename replaces one by the next.

    vectors/lock       locked by the one process that has the store open
    vectors/current    a text file with the name of the current subfolder
    vectors/3/         the current shard

Any other entry is left over from a process that was killed while it built or replaced a shard. Stores of earlier
releases have their shard in `vectors/` itself, which is the current shard as long as there is no file `current`.
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
    """The versions of one store's shard, locked against other processes and other objects until `release`.

    Raises:
        StoreError: the folder is in use or not writable.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / LOCK).open("a")  # an open file, so that a store that is never closed releases it
        except OSError as error:
            raise StoreError(f"{root} is not writable: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(
                f"{root.parent} is in use by another process or by another Catalog object. Close that one first. "
                "Several processes need a Qdrant server: Catalog('http://…')."
            ) from None
        self._remove_leftovers()

    @property
    def current(self) -> Path:
        """The folder of the current shard. It does not exist in a new store."""
        if (self.root / CURRENT).is_file():
            return self.root / (self.root / CURRENT).read_text(encoding="utf-8").strip()
        return self.root if (self.root / "edge_config.json").is_file() else self.root / "0"

    def next_folder(self) -> Path:
        """A folder for the next version. It does not exist yet."""
        return self.root / str(1 + max((int(p.name) for p in self.root.iterdir() if p.name.isdecimal()), default=0))

    def activate(self, folder: Path) -> None:
        """Make a complete shard the current one. The change survives a power cut."""
        write_atomically(self.root / CURRENT, folder.name.encode(), fsync=True)

    def remove(self, folder: Path) -> None:
        """Delete a shard that is not the current one."""
        if folder != self.root:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._remove_leftovers()

    def release(self) -> None:
        """Unlock the store."""
        self._lock.close()

    def _remove_leftovers(self) -> None:
        """Delete everything except the current shard."""
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
