"""Files: atomic writes, reads of regular files of limited size, and stored paths, which may not leave their folder."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from unidiff_sdk.errors import StoreError, UniDiffError

__all__ = [
    "atomic_file",
    "is_plain_path",
    "open_regular_file",
    "read_regular_file",
    "resolve_stored",
    "write_atomically",
]

# Opening a FIFO or a device waits for its other end unless this flag is set. Windows has neither.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


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


def open_regular_file(path: Path, error: type[UniDiffError]) -> BufferedReader:
    """Open a file for reading bytes, if it is a regular one.

    Raises:
        error: the file is missing, cannot be read, or is a folder, a FIFO, a socket or a device.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT))  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError) as reason:
        raise error(f"{path}: cannot be read, because there is no such file. Check the path.") from reason
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte in the name
        raise error(f"{path}: cannot be read ({getattr(reason, 'strerror', None) or reason})") from reason
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise error(f"{path}: not a regular file. Give a file on disk, not a pipe or a device.")
    return file


def read_regular_file(path: Path, max_size: int, error: type[UniDiffError]) -> bytes:
    """Read a regular file. Its size is checked before memory is allocated: a sparse file can claim any.

    Raises:
        error: as `open_regular_file`, or the file has more than `max_size` bytes.
    """
    with open_regular_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_size:
            raise error(f"{path}: has {size:,} bytes; at most {max_size:,} are allowed")
        try:
            return file.read(max_size)
        except OSError as reason:
            raise error(f"{path}: cannot be read ({reason.strerror})") from reason


def is_plain_path(name: str) -> bool:
    """Whether a stored name is a relative path with forward slashes, without a part such as `..`."""
    return not ("\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")))


def resolve_stored(folder: Path, name: str, error: type[UniDiffError]) -> Path:
    """The absolute path of a file or folder that is stored in `folder`.

    Args:
        folder: the folder. It may be a symbolic link itself.
        name: a relative path with forward slashes. Nothing needs to exist there.
        error: the class of the error that is raised.

    Raises:
        error: the name is empty, absolute or has a part such as `..`, or a part of it is a symbolic link.
    """
    if not is_plain_path(name):
        raise error(f"{folder} names {name!r:.200}, which is not a plain path inside it. Restore it from a backup.")
    path = os.path.abspath(folder)
    for part in name.split("/"):
        path = f"{path}/{part}"
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            break  # nothing is there yet
        except OSError as reason:
            raise error(
                f"{path:.300} cannot be resolved ({reason.strerror}). Restore {folder} from a backup."
            ) from reason
        if is_link:
            raise error(f"{path} is a symbolic link. Replace the link by the files that it refers to.")
    return Path(os.path.abspath(folder), name)
