"""The image store in object storage, with the names of a store in a folder: either can be copied to the other."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from unidiff_sdk._internal.images import load_image
from unidiff_sdk.errors import ForbiddenError, ImageError, OptionError, StoredImageError, StoreError

from .file_cache import FileCache
from .image_store import (
    ImageStore,
    ItemImage,
    StoredFile,
    copy_uri,
    derived_hash,
    is_copy,
    thumbnail_name,
    thumbnail_of,
)
from .object_storage import ObjectFolder, ObjectStorage, user_cache

__all__ = ["RemoteImageStore"]

_TRUSTED_SECONDS = 60.0
"""For how long an image that this process wrote is not looked for again. The writer adds each image three times.

One that was there already is looked for each time: another machine may be deleting it, because no item uses it yet.
"""


class RemoteImageStore(ImageStore):
    """Images by content hash below a URL. Safe to use from several threads, processes and machines.

    Images that were read are kept in a folder of bounded size on this machine.

    Args:
        root: a folder on this machine for everything that is not an image.
        storage: where the images are.

    Raises:
        OptionError, StoreError: as for `ObjectFolder`.
    """

    def __init__(self, root: Path, storage: ObjectStorage) -> None:
        super().__init__(root)
        self.objects = ObjectFolder(storage)
        cache = Path(storage.cache) if storage.cache is not None else user_cache("images", storage.url) / "cache"
        self._cache = FileCache(cache, storage.cache_size)
        self._stored: dict[str, float] = {}  # hash of an image -> when this process wrote it

    def add(self, image: ItemImage, *, copy: bool = True) -> str:
        if image.path is not None and not copy:
            raise OptionError(
                f"copy=False references a file of this machine, and others that read {self.objects.url} do not have "
                "it. Omit copy=False."
            )
        uri, thumbnail = copy_uri(image), thumbnail_name(image.sha256)
        is_trusted = time.monotonic() - self._stored.get(image.sha256, float("-inf")) < _TRUSTED_SECONDS
        if not is_trusted and not (self.objects.has(thumbnail) and self.objects.has(uri)):
            small = thumbnail_of(image.decoded)
            self.objects.write(uri, image.encoded())
            self.objects.write(thumbnail, small)  # last: where it is, the image is complete
            self._remember(image.sha256)
        return uri

    def read(self, uri: str) -> bytes:
        self._require_copy(uri)
        data = self._fetch(uri)
        if data is None:
            raise StoredImageError(
                f"{self.objects.url}/{uri}: the image is missing or empty. Add its item again, or delete the item."
            )
        return data

    def load(self, uri: str) -> Image.Image:
        try:
            return load_image(self.read(uri))
        except StoredImageError:
            raise
        except ImageError:
            self._cache.remove(uri)  # the copy may be what is damaged
        try:
            return load_image(self.read(uri))
        except ImageError as error:
            raise StoredImageError(f"{self.objects.url}/{uri}: {error}") from error

    def path(self, uri: str) -> Path:
        """A copy of the image on this machine, which is deleted when the cache is full."""
        data = self.read(uri)
        return self._cache.get(uri) or self._cache.put(uri, data)

    def signed_url(self, uri: str, expires: int) -> str:
        self._require_copy(uri)
        return self.objects.sign(uri, expires)

    def thumbnail(self, sha256: str, uri: str) -> bytes:
        name = thumbnail_name(sha256)
        if (stored := self._fetch(name)) is not None:
            return stored
        data = thumbnail_of(self.load(uri))
        with suppress(ForbiddenError):  # who may only read makes it again each time
            self.objects.write(name, data)
        return data

    def remove(self, sha256: str, uri: str) -> None:
        if not derived_hash(f"images/{sha256[:2]}/{sha256}.png"):
            return
        for name in (thumbnail_name(sha256), *([uri] if is_copy(uri, sha256) else [])):
            self.delete(name)

    def stored_files(self) -> Iterator[StoredFile]:
        yield from super().stored_files()  # latents
        for folder in ("images", "thumbnails"):
            for name, size, modified in self.objects.list(folder):
                if sha256 := derived_hash(name):
                    yield StoredFile(sha256, name, size, modified)

    def now(self) -> float:
        name = f"images/{secrets.token_hex(8)}.time"
        self.objects.write(name, b"time")
        try:
            return (self.objects.facts(name) or (0, 0.0))[1]
        finally:
            self.objects.delete(name)

    def exists(self, name: str) -> bool:
        return super().exists(name) or self.objects.has(name)

    def delete(self, name: str) -> None:
        self._stored.pop(derived_hash(name), None)
        super().delete(name)
        self.objects.delete(name)
        self._cache.remove(name)

    def has(self, uri: str) -> bool:
        return is_copy(uri) and self.objects.has(uri)

    def reference(self, path: Path) -> str:
        return path.resolve().as_uri()

    def _fetch(self, name: str) -> bytes | None:
        """A file from the cache, or else from the storage; None if it is missing or empty."""
        if (path := self._cache.get(name)) is not None:
            with suppress(OSError):  # another process deleted it from the cache
                return path.read_bytes()
        data = self.objects.read(name)
        if not data:
            return None
        with suppress(StoreError):  # a full disk costs time, not the image
            self._cache.put(name, data)
        return data

    def _require_copy(self, uri: str) -> None:
        if not is_copy(uri):
            raise StoredImageError(
                f"The URI {uri!r:.200} leads out of {self.objects.url}. Index its image again without copy=False."
            )

    def _remember(self, sha256: str) -> None:
        now = time.monotonic()
        if len(self._stored) > 100_000:
            self._stored = {key: then for key, then in self._stored.items() if now - then < _TRUSTED_SECONDS}
        self._stored[sha256] = now
