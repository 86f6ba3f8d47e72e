"""Local copies of the shards of a dataset in object storage, for jobs that read each row many times."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from unidiff_sdk._internal.files import atomic_file, remove_unfinished
from unidiff_sdk._internal.memory import free_space
from unidiff_sdk.errors import DataError

from .remote import folder_at, remote_layout

__all__ = ["copy_shards"]

_COPIED = (".tar", ".parquet")  # files that hold their images
_LOCK = ".lock"


def copy_shards(url: str, folder: Path) -> Path:
    """Copy the shards or parquet files of a dataset in object storage into a folder below `folder`, and return that.

    Copies of an earlier call are used again if size and time of modification have not changed. Several processes of a
    machine can call it at once: the first one copies, and the others wait. The folder holds these files and no others.

    Raises:
        DataError: there is nothing that can be copied, the folder has too little space, or it holds other files.
        StoreError: the object storage cannot be read, or a copy cannot be written.
    """
    root, files = _files(url)
    # Datasets of one name have different folders.
    place = folder / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:8] / _name(url)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with open(place / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _require_no_others(place, files)
            missing = {file: facts for file, facts in files.items() if not _is_copied(place / file, facts)}
            _require_space(place, sum(size for size, _ in missing.values()))
            for file, (_, modified) in missing.items():
                _copy(root, file, place / file, modified)
    except OSError as error:
        raise DataError(f"{place}: cannot copy {url} ({error.strerror}). Choose another folder.") from error
    return place


def _files(url: str) -> tuple[str, Mapping[Path, tuple[int, float]]]:
    """The URL of the folder of a dataset, and size and modification of its files."""
    root, layout, facts = remote_layout(url)
    files = layout.shards or tuple(table for table, _ in layout.tables)
    if not files or any(file.suffix.lower() not in _COPIED for file in files):
        raise DataError(
            f"{url}: the images are files of their own. Only {' and '.join(_COPIED)} files, which hold their images, "
            "are copied. Write shards, or copy the dataset to a file system."
        )
    return root, {file: facts[file] for file in files}


def _name(url: str) -> str:
    path = PurePosixPath(url.rstrip("/"))
    return path.stem if path.suffix.lower() in _COPIED else path.name


def _is_copied(copy: Path, facts: tuple[int, float]) -> bool:
    return copy.is_file() and (copy.stat().st_size, copy.stat().st_mtime) == facts


def _copy(root: str, file: Path, target: Path, modified: float) -> None:
    with atomic_file(target) as temporary:
        if not folder_at(root).copy(file.as_posix(), temporary):
            raise DataError(f"{root}/{file.as_posix()}: the file was deleted")
        os.utime(temporary, (modified, modified))


def _require_no_others(place: Path, files: Mapping[Path, object]) -> None:
    for parent, _, names in os.walk(place):
        remove_unfinished(Path(parent))  # of killed processes
        for file in (Path(parent, name) for name in names if name != _LOCK):
            if file.is_file() and file.relative_to(place) not in files:
                raise DataError(f"{file} is not in the dataset. Remove it, or choose another folder for the copies.")


def _require_space(place: Path, needed: int) -> None:
    if needed > (free := free_space(place)):
        raise DataError(
            f"{place} has {free / 1e9:.1f} GB of free space, but {needed / 1e9:.1f} GB are to be copied. Choose "
            "another folder, or give the URL of fewer shards."
        )
