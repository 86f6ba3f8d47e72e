"""The files of a bundle. Only those that its manifest lists are used, and only with the content that it states."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import open_regular_file, read_regular_file
from unidiff_sdk._internal.json_values import MAX_DOCUMENT
from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.manifest import parse_object

__all__ = ["BundleFiles", "hash_folder"]

MAX_FILE = 1 << 38
"""The largest file of a bundle in bytes: 256 GiB. A sparse file can claim any size, and all of it would be hashed."""


class BundleFiles:
    """The files in the folder of a bundle, or in a part of it.

    Args:
        folder: the folder.
        hashes: the SHA-256 of each file that may be used, by its relative POSIX path. None: any file, unchecked.
        verify: whether the content must have the SHA-256 that `hashes` states.
    """

    def __init__(self, folder: Path, hashes: Mapping[str, str] | None = None, *, verify: bool = False) -> None:
        self.folder, self.verify = folder, verify and hashes is not None
        self._hashes = hashes
        self._checked: dict[str, tuple[int, ...]] = {}

    def part(self, folder: str) -> BundleFiles:
        """The files in a folder of this folder."""
        prefix = f"{folder}/"
        hashes = self._hashes and {
            name.removeprefix(prefix): sha256 for name, sha256 in self._hashes.items() if name.startswith(prefix)
        }
        return BundleFiles(self.folder / folder, hashes, verify=self.verify)

    def __contains__(self, name: str) -> bool:
        """Whether a file may be used. A file that the manifest does not list does not exist for the runtime."""
        return (self.folder / name).is_file() if self._hashes is None else name in self._hashes

    def check(self) -> None:
        """Check that all listed files exist and, with `verify`, that none was changed.

        Raises:
            BundleError: a file is missing, is not a regular file, or was changed.
        """
        for name in self._hashes or ():
            self._require(name)
            if self.verify:
                self._check_hash(name)

    def path(self, name: str) -> Path:
        """The path of a file, for a library that opens it by its path.

        With `verify`, a file that was replaced since `check` is hashed again. Its identity is compared, so that this
        takes no time for an unchanged file of any size.

        Raises:
            BundleError: the file is not listed, is missing or was changed.
        """
        self._require(name)
        if self.verify and self._checked.get(name) != _identity(os.stat(self.folder / name)):
            self._check_hash(name)
        return self.folder / name

    def read(self, name: str, max_size: int = MAX_DOCUMENT) -> bytes:
        """The content of a file. With `verify`, the bytes that are returned are those that were hashed.

        Raises:
            BundleError: the file is not listed, is missing, was changed, or has more than `max_size` bytes.
        """
        self._require(name)
        content = read_regular_file(self.folder / name, max_size, BundleError)
        if self.verify and hashlib.sha256(content).hexdigest() != self._expected(name):
            raise self._changed(name)
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises BundleError as `read`, or if the file holds something else."""
        return parse_object(self.read(name), self.folder / name)

    def _require(self, name: str) -> None:
        file = self.folder / name
        if self._hashes is not None and name not in self._hashes:
            raise BundleError(
                f"{file}: is not listed in the manifest of the bundle, so it is not used; export the bundle again"
            )
        if not file.is_file():
            raise BundleError(f"{file}: the file is missing; copy the whole folder, or export the bundle again")

    def _check_hash(self, name: str) -> None:
        with open_regular_file(self.folder / name, BundleError) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_FILE:
                raise BundleError(
                    f"{self.folder / name}: has {status.st_size:,} bytes; at most {MAX_FILE:,} are allowed"
                )
            if hashlib.file_digest(file, "sha256").hexdigest() != self._expected(name):
                raise self._changed(name)
            self._checked[name] = _identity(status)

    def _expected(self, name: str) -> str:
        assert self._hashes is not None  # `verify` is set only with hashes
        return self._hashes[name]

    def _changed(self, name: str) -> BundleError:
        return BundleError(
            f"{self.folder / name}: was changed after the export (its SHA-256 differs); export the bundle again"
        )


def hash_folder(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under `folder`, by its relative POSIX path. Raises BundleError if one is unreadable."""
    hashes: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open_regular_file(path, BundleError) as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
