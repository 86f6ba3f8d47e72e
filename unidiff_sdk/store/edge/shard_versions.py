"""The folder of a store: one subfolder for each version of the shard, so that a rename replaces one by the next.

    vectors/lock       locked by the one process that has the store open
    vectors/current    a text file with the name of the current subfolder
    vectors/3/         the current shard

Other numbered folders and `.part` files are left over from a process that was killed while it built or replaced a
shard. They are deleted; entries with other names are not. Stores of earlier releases have their shard in `vectors/`
itself, which is the current shard as long as there is no file `current`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import IO

from unidiff_sdk._internal.files import read_regular_file, resolve_stored, write_atomically
from unidiff_sdk._internal.lifetimes import Owner, close_in_child
from unidiff_sdk.errors import InUseError, StoreError

__all__ = ["CONFIG", "ShardVersions"]

CURRENT, LOCK = "current", "lock"
CONFIG = "edge_config.json"  # every shard has one

_VERSION = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)  # the name of a subfolder
_SHARD_ENTRIES = (CONFIG, "segments", "wal")  # of a shard
_PART = re.compile(r"\..*\.part", re.ASCII)  # of `write_atomically`
_MAX_CURRENT = 64  # bytes of the file `current`
_REPAIR = "Copy the whole folder again while no process has the catalog open, or restore it from a backup."


class ShardVersions:
    """The versions of one store's shard, locked against other processes and other objects until `release`.

    The folder is validated before leftovers are deleted: what is damaged is refused, and nothing is deleted then.

    Args:
        root: the folder.
        create: whether the folder may be new. If False, a missing shard is an error.

    Raises:
        InUseError: the folder is in use.
        StoreError: it is not writable or damaged, or the shard is missing.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        self._owner = Owner(f"The store at {root}")
        if not create and not root.is_dir():
            raise StoreError(f"{root} is missing, so the vectors of this catalog are, too. {_REPAIR}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = resolve_stored(root, LOCK, StoreError)
            self._lock: IO[str] = lock.open("a")  # an open file, so that a store that is never closed releases it
            close_in_child(self._lock, root)
        except OSError as error:
            raise StoreError(f"{root} is not writable: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InUseError(
                f"{root.parent} is in use by another process or by another Catalog object. Close that one first. "
                "Several processes need a Qdrant server: Catalog('http://…')."
            ) from None
        try:
            self._validate(create)
            self._remove_leftovers()
        except StoreError:
            self.release()
            raise

    @property
    def current(self) -> Path:
        """The folder of the current shard, which a new store lacks. Raises StoreError if its name is invalid."""
        path = resolve_stored(self.root, CURRENT, StoreError)
        if path.exists():
            name = read_regular_file(path, _MAX_CURRENT, StoreError).decode("utf-8", "replace").strip()
            if not _VERSION.fullmatch(name):
                raise StoreError(f"{path} names {name!r}, which is not the number of a folder in {self.root}.")
            return resolve_stored(self.root, name, StoreError)
        return self.root if (self.root / CONFIG).is_file() else self.root / "0"

    def next_folder(self) -> Path:
        """A folder for the next version. It does not exist yet."""
        return self.root / str(
            1 + max((int(p.name) for p in self.root.iterdir() if _VERSION.fullmatch(p.name)), default=0)
        )

    def activate(self, folder: Path) -> None:
        """Make a complete shard the current one. The change survives a power cut."""
        is_recorded = folder == self.root or (self.root / CURRENT).is_file()
        if not is_recorded or self.current != folder:
            write_atomically(self.root / CURRENT, folder.name.encode(), fsync=True)

    def remove(self, folder: Path) -> None:
        """Delete a shard that is not the current one."""
        if folder != self.root:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._remove_leftovers()

    def release(self) -> None:
        """Unlock the store."""
        if not self._lock.closed and self._owner.is_current:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may have a copy of the open file
            self._lock.close()

    def _validate(self, create: bool) -> None:
        """Raise StoreError unless the current shard is complete, or nothing contradicts that the store is new."""
        complete = sorted(int(p.name) for p in self.root.iterdir() if _VERSION.fullmatch(p.name) and _is_shard(p))
        present = f"Complete shards in {self.root}: {', '.join(map(str, complete)) or 'none'}."
        current = self.current
        if _is_shard(current):
            # Without a file `current`, folder 0 is the only shard that there can be.
            if current != self.root and not (self.root / CURRENT).exists() and len(complete) > 1:
                raise StoreError(
                    f"{self.root / CURRENT} is missing. {present} Write the right number into it. {_REPAIR}"
                )
            _check_no_links(current)
        elif (self.root / CURRENT).exists():
            raise StoreError(
                f"{self.root / CURRENT} names {current.name}, which is not a complete shard. {present} {_REPAIR}"
            )
        elif complete:
            raise StoreError(f"{self.root / CURRENT} is missing. {present} Write the right number into it. {_REPAIR}")
        elif not create:
            raise StoreError(f"{self.root} has no shard, so the vectors of this catalog are missing. {_REPAIR}")

    def _remove_leftovers(self) -> None:
        """Delete the shards that are not the current one, and files that were never completed."""
        current = self.current
        if current == self.root:
            return
        for entry in self.root.iterdir():
            is_shard = _VERSION.fullmatch(entry.name) or entry.name in _SHARD_ENTRIES
            if entry.is_symlink() or entry.name == current.name or not (is_shard or _PART.fullmatch(entry.name)):
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_shard(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / "segments").is_dir()


def _check_no_links(shard: Path) -> None:
    """Raise StoreError if a shard has a symbolic link, through which the engine would write outside the folder."""
    for folder, names, files in os.walk(shard):
        for name in (*names, *files):
            path = Path(folder) / name
            if path.is_symlink():
                raise StoreError(f"{path} is a symbolic link. Replace it by the file that it refers to.")
