"""Object storage: files below a URL that fsspec opens, such as s3://bucket/prefix.

Each file is written at once under its final name, so that readers see the whole file or none. fsspec and the packages
behind it repeat failed requests with growing pauses.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from unidiff_sdk._internal.files import cache_folder
from unidiff_sdk._internal.json_values import whole_number
from unidiff_sdk._internal.text import redact_url, shorten
from unidiff_sdk.errors import ForbiddenError, OptionError, StoreError

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

__all__ = ["ObjectFolder", "ObjectStorage", "image_place", "is_object_storage", "user_cache"]

DEFAULT_CACHE_SIZE = 1 << 30
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)", re.IGNORECASE | re.DOTALL)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# A write under a name of these is complete or absent. Elsewhere a file is written under another name and moved.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "memory"}
_REASON_LENGTH = 300  # characters of a failure in a message


@dataclass(frozen=True)
class ObjectStorage:
    """Object storage for the images of a catalog: `Catalog(location, images=ObjectStorage("s3://bucket/prefix", …))`.

    `images="s3://bucket/prefix"` is the same with the defaults.

    Args:
        url: a URL that fsspec opens, such as s3://bucket/prefix or gs://bucket/prefix. No other catalog may use it.
        options: of the fsspec file system, such as `{"endpoint_url": "http://localhost:9000"}`. They may hold
            credentials: they are neither shown nor stored. Default: the environment and the files that it reads.
        cache: the folder for local copies of images, which several processes may share. Default: a folder below
            `XDG_CACHE_HOME` or ~/.cache.
        cache_size: bytes in it, at least 1; the images used least recently are deleted first.

    Raises:
        OptionError: a value is invalid, or the URL has a user name, a password or a query.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cache: str | Path | None = None
    cache_size: int = DEFAULT_CACHE_SIZE

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not _URL.fullmatch(self.url) or "\0" in self.url:
            raise OptionError(
                f"{self.url!r:.200} is not the URL of object storage. Give one such as s3://bucket/prefix."
            )
        if (shown := redact_url(self.url)) != self.url:
            object.__setattr__(self, "url", shown)
            raise OptionError(f"The URL {shown} has a user name, a password or a query. Give credentials in options=.")
        if not isinstance(self.cache, str | os.PathLike | None):
            raise OptionError(f"cache is {self.cache!r:.60}. Give a folder for local copies of images.")
        object.__setattr__(self, "url", self.url.rstrip("/"))
        object.__setattr__(self, "cache_size", whole_number("cache_size", self.cache_size, at_least=1))

    @property
    def scheme(self) -> str:
        """The protocol, such as "s3"."""
        return self.url.partition("://")[0].lower()


def image_place(images: str | Path | ObjectStorage, name: str = "images") -> Path | ObjectStorage:
    """A folder, or object storage for a URL other than file://. Raises OptionError for an invalid URL.

    `name` is the argument that gives it, for messages.
    """
    if isinstance(images, ObjectStorage):
        return images
    text = os.fspath(images) if isinstance(images, str | os.PathLike) else ""
    if not text or "\0" in text:
        raise OptionError(f"{name} is {images!r:.60}. Give a folder, or a URL such as s3://bucket/prefix.")
    if isinstance(images, str) and is_object_storage(images):
        return ObjectStorage(images)
    return Path(unquote(urlsplit(text).path)) if text.lower().startswith("file://") else Path(text)


def is_object_storage(images: str | None) -> bool:
    """Whether images are at a URL other than file://."""
    return images is not None and (url := _URL.match(images)) is not None and url[1].lower() != "file"


def user_cache(kind: str, key: str) -> Path:
    """The place in the cache of this user for what belongs to a key, such as a URL."""
    return cache_folder(kind) / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class ObjectFolder:
    """The files below a URL, or in a folder of a file system. Safe to use from several threads.

    Raises:
        OptionError: nothing opens URLs of this kind, or an option is invalid.
        StoreError: a package is missing.
    """

    def __init__(self, place: ObjectStorage | Path) -> None:
        self._files, self._root = _open(place)
        self.url = place.url if isinstance(place, ObjectStorage) else self._root
        self._is_atomic = isinstance(place, ObjectStorage) and place.scheme in _ATOMIC

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none. Raises StoreError."""
        with self._failures("read", name):
            try:
                content: bytes = self._files.cat_file(self._path(name))
            except (FileNotFoundError, IsADirectoryError):
                return None
            return content

    def write(self, name: str, data: bytes) -> None:
        """Write a file, complete or not at all. Raises StoreError."""
        path = self._path(name)
        with self._failures("write", name):
            if self._is_atomic:
                self._files.pipe_file(path, data)
                return
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            part = f"{path}.{secrets.token_hex(8)}.part"
            self._files.pipe_file(part, data)
            self._files.mv(part, path)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one. Returns whether it was written. Raises StoreError."""
        with self._failures("write", name):
            if not self._is_atomic:
                self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def read_several(self, names: Sequence[str], limit: int) -> list[bytes | None]:
        """The first `limit` bytes of files, None for those that do not exist. Raises StoreError.

        The packages for S3 and Google Cloud Storage fetch them at the same time.
        """
        with self._failures("read", ""):
            found = self._files.cat_ranges([self._path(name) for name in names], 0, limit)
        return [self._range(name, content) for name, content in zip(names, found, strict=True)]

    def _range(self, name: str, content: bytes | Exception) -> bytes | None:
        if isinstance(content, bytes):
            return content
        with self._failures("read", name):
            if isinstance(content, FileNotFoundError | IsADirectoryError):
                return None
            if (facts := self.facts(name)) is not None and facts[0] == 0:
                return b""  # no range of an empty file is valid
            raise content

    def copy(self, name: str, path: Path) -> bool:
        """Copy a file to this machine, a block at a time. Returns whether there is one. Raises StoreError."""
        with self._failures("read", name):
            try:
                self._files.get_file(self._path(name), str(path))
            except (FileNotFoundError, IsADirectoryError):
                return False
            return path.is_file()

    def has(self, name: str) -> bool:
        """Whether there is a file that is not empty. Raises StoreError."""
        facts = self.facts(name)
        return facts is not None and facts[0] > 0

    def facts(self, name: str) -> tuple[int, float] | None:
        """(size in bytes, modification in seconds since 1970) of a file; None if there is none. Raises StoreError."""
        with self._failures("read", name):
            try:
                found = self._files.info(self._path(name))
            except FileNotFoundError:
                return None
        return None if found.get("type") == "directory" else (found.get("size") or 0, _modified(found))

    def delete(self, name: str) -> None:
        """Delete a file, if there is one. Raises StoreError."""
        with self._failures("delete", name):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def list(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """Yield (name, size in bytes, modification in seconds since 1970) of all files below a folder."""
        with self._failures("list", folder):
            found = self._files.find(self._path(folder), detail=True)
        for path, facts in found.items():
            yield path.removeprefix(self._root).lstrip("/"), facts.get("size") or 0, _modified(facts)

    def sign(self, name: str, expires: int) -> str:
        """A URL by which anyone may read a file for a number of seconds. Raises StoreError."""
        with self._failures("sign", name):
            try:
                return str(self._files.sign(self._path(name), expiration=expires))
            except (NotImplementedError, AttributeError):
                raise StoreError(
                    f"{self.url}: this kind of storage has no signed URLs; s3:// and gs:// have. Read the image with "
                    "image_bytes(), or serve it with `unidiff serve`."
                ) from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _failures(self, action: str, name: str) -> Iterator[None]:
        """Convert every failure of the storage to a StoreError on one line."""
        try:
            yield
        except StoreError:
            raise
        except PermissionError as error:
            raise ForbiddenError(
                f"{self.url}/{name}: no permission to {action} ({_reason(error)}). Check the credentials."
            ) from error
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.url}/{name}: cannot {action} ({_reason(error)}). Check the bucket and the prefix."
            ) from error
        except Exception as error:  # each back end has its own hierarchy
            raise StoreError(
                f"{self.url}/{name}: cannot {action} ({_reason(error)}). Check the network and the storage, and retry."
            ) from error


def _open(storage: ObjectStorage | Path) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL or folder, and the path in it."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem
    except ImportError as error:
        place = storage if isinstance(storage, Path) else storage.url
        raise StoreError(f"{place} needs fsspec: pip install fsspec") from error
    if isinstance(storage, Path):  # not as a URL: a path can have any character
        return LocalFileSystem(), os.path.abspath(storage)
    try:
        # Listings are not kept: other machines write meanwhile.
        files, root = url_to_fs(storage.url, **{"use_listings_cache": False, **storage.options})
    except ImportError as error:
        extra = _EXTRAS.get(storage.scheme)
        install = f"pip install 'unidiff-sdk[{extra}]'" if extra else _reason(error)
        raise StoreError(f"{storage.url}: the package for {storage.scheme}:// is not installed. {install}") from error
    except ValueError as error:
        raise OptionError(
            f"{storage.url}: {_reason(error)}. Give a URL that fsspec opens, such as s3://bucket/prefix."
        ) from error
    except Exception as error:
        raise StoreError(f"{storage.url} cannot be opened ({_reason(error)}). Check options=.") from error
    return files, str(root).rstrip("/")


def _modified(facts: Mapping[str, Any]) -> float:
    """The time of modification in the facts about a file, whose name depends on the back end."""
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        match facts.get(name):
            case datetime() as time:
                return time.timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                return datetime.fromisoformat(text).timestamp()
    return 0.0


def _reason(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], _REASON_LENGTH)
