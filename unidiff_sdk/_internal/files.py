"""Files and folders: atomic replacement, reads of limited size, and stored paths, which may not leave their folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path

from unidiff_sdk.errors import StoreError, UniDiffError

__all__ = [
    "atomic_file",
    "cache_folder",
    "checked_path",
    "folder_hint",
    "folder_kind",
    "is_plain_path",
    "open_regular_file",
    "read_regular_file",
    "recover_folder",
    "remove_unfinished",
    "replacement_folder",
    "resolve_stored",
    "unfinished_files",
    "write_atomically",
]

# Opening a FIFO or a device waits for its other end unless this flag is set. Windows has neither.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


_PART = re.compile(r"\.[0-9a-f]{16}\.part", re.ASCII)  # the temporary names of `atomic_file`


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`. It replaces `path` if the block succeeds and is deleted if not.

    Raises:
        StoreError: the file cannot be written, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _new_part(path.parent)
        with lock:
            try:
                yield temporary
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error


def _new_part(folder: Path) -> tuple[Path, BufferedWriter]:
    """A new file with a temporary name, which is locked until it is closed."""
    while True:
        path = folder / f".{secrets.token_hex(8)}.part"
        file = path.open("xb")  # `tempfile` would make it private, whatever the umask is
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # else `remove_unfinished` was faster than the lock
            return path, file
        file.close()


def remove_unfinished(folder: Path) -> int:
    """Delete the files in a folder that a killed process had not finished, and return their number.

    A file of `atomic_file` is locked while it is written, by any process. Files in subfolders stay.
    """
    removed = 0
    for path in unfinished_files(folder):
        with suppress(OSError):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def unfinished_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that a killed process had not finished. Each is locked until the next one."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _PART.fullmatch(path.name) or path.is_symlink():
            continue
        with suppress(OSError, StoreError), open_regular_file(path, StoreError) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path


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


def cache_folder(kind: str) -> Path:
    """The folder in the cache of this user for one kind of content, such as "tensorrt". It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unidiff-sdk" / kind


def checked_path(path: str | os.PathLike[str], error: type[UniDiffError]) -> Path:
    """A path that the caller gave, if the operating system accepts it. Nothing needs to exist there.

    Raises:
        error: the path has a NUL byte or a name that is too long, or one of its folders may not be read.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Path(path)
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte
        text = getattr(reason, "strerror", None) or reason
        raise error(f"{str(path)!r:.100}: not a path that can be used ({text}). Check it.") from None
    return Path(path)


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


# The file that tells what a folder is, and what it contains -> what it is, and the command that takes it.
_FOLDERS = {
    ("catalog.json", b'"unidiff-catalog"'): ("a catalog", "unidiff search {path} TEXT"),
    ("manifest.json", b'"unidiff-bundle"'): ("a bundle", "unidiff index FOLDER CATALOG --bundle {path}"),
    ("unidiff.json", b""): ("a training checkpoint", "unidiff-export {path} -o BUNDLE"),
    ("metadata.jsonl", b""): ("a dataset", "unidiff index {path} CATALOG"),
    ("metadata.csv", b""): ("a dataset", "unidiff index {path} CATALOG"),
    ("metadata.parquet", b""): ("a dataset", "unidiff index {path} CATALOG"),
    ("model_index.json", b""): ("a diffusers pipeline", "unidiff-export {path} --clip MODEL -o BUNDLE"),
    ("preprocessor_config.json", b""): ("a transformers model", "unidiff-export --clip {path} -o BUNDLE"),
}
_HEAD = 4096  # bytes; the format is one of the first values of a file


def folder_kind(path: Path) -> tuple[str, str]:
    """What a folder is, such as "a bundle", and the command that takes it; two empty texts if that is unknown."""
    for (name, content), (kind, command) in _FOLDERS.items():
        try:
            with open_regular_file(path / name, StoreError) as file:
                if content in file.read(_HEAD):
                    return kind, command.format(path=path)
        except (StoreError, OSError):
            continue
    return "", ""


def folder_hint(path: Path) -> str:
    """A sentence that says what a folder is that was given for something else; "" if that is unknown."""
    kind, command = folder_kind(path)
    return f" It is {kind}, for: {command}." if kind else ""


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


# ------------------------------------------------------------------------------------------------ replacing a folder

# The names next to a folder that is being replaced. Only folders with these exact names are restored or deleted.
_NEW, _PREVIOUS = ".{}.partial-save.tmp", ".{}.partial-save.old"
# Version 0.1.0 had the number of the process in these names.
_FROM_0_1 = r"\.{}\.(?:(\d+)\.(old|tmp)|(?:old|partial)-(\d+))"


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacement_folder(
    path: Path, error: type[UniDiffError], *, retire: Callable[[Path], None] = _remove_folder
) -> Iterator[Path]:
    """Yield a new folder next to `path`. It replaces `path` if the block succeeds and is deleted if not.

    Whatever ends the process, `path` is the old or the new folder, or `recover_folder` makes it one of them. The folder
    is locked while it is written, so that a second process does not take it for a leftover.

    Args:
        path: the folder to create or replace.
        error: the class of the error that is raised.
        retire: called with the previous folder, which has another name then, once `path` is the new one.

    Raises:
        error: another process is writing `path`.
        OSError: a folder cannot be created or renamed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    new = path.with_name(_NEW.format(path.name))
    busy = error(f"Another process is writing {path}. Wait for it, or choose another folder.")
    try:
        new.mkdir()
    except FileExistsError:
        raise busy from None
    with _folder_lock(new) as is_locked:
        if not is_locked:  # another process took it for a leftover, in the instant before it was locked
            raise busy
        try:
            yield new
            _swap(new, path, retire)
        finally:
            _remove_folder(new)


def recover_folder(path: Path) -> None:
    """Finish what a process that was killed in `replacement_folder` left: restore the previous folder, or delete it.

    Folders that a running process is writing are left alone.
    """
    path = Path(os.path.realpath(path))
    new, previous = path.with_name(_NEW.format(path.name)), path.with_name(_PREVIOUS.format(path.name))
    _recover_from_0_1(path)
    if not _is_folder(new) and not _is_folder(previous):
        return
    with _folder_lock(new) as is_new_free, _folder_lock(path) as is_path_free:  # a writer holds one or the other
        if (_is_folder(new) and not is_new_free) or (_is_folder(path) and not is_path_free):
            return
        if _is_folder(previous) and not path.exists():
            previous.rename(path)
        for leftover in (new, previous):
            if _is_folder(leftover):
                _remove_folder(leftover)


def _swap(new: Path, path: Path, retire: Callable[[Path], None]) -> None:
    """Rename `new` to `path`. What is there is set aside first and retired last."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    previous = path.with_name(_PREVIOUS.format(path.name))
    path.rename(previous)
    try:
        new.rename(path)
    except BaseException:
        previous.rename(path)
        raise
    retire(previous)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder against other processes. Yields False if another one has locked or replaced it, or it is missing.

    The lock ends with the process, whatever ends it. It follows the folder when that is renamed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    is_locked = _try_lock(descriptor)
    try:
        yield is_locked and _is_at(descriptor, folder)
    finally:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have a copy of the open file
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else the file system has no locks
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except FileNotFoundError:
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _recover_from_0_1(path: Path) -> None:
    """As `recover_folder`, for the names of version 0.1.0. A number may have been given to another process since."""
    if not path.parent.is_dir():
        return
    pattern = re.compile(_FROM_0_1.format(re.escape(path.name)), re.ASCII)
    leftovers = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and _is_folder(entry)]
    for leftover in sorted(leftovers, key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
        is_previous = leftover.name.endswith(".old") or leftover.name.removeprefix(f".{path.name}.").startswith("old-")
        if is_previous and not path.exists():
            leftover.rename(path)
        elif not _is_running(int(re.findall(r"\d+", leftover.name)[-1])):
            _remove_folder(leftover)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()
