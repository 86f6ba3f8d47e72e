"""The image store: files named by the hash of their content, each with a thumbnail.

    root/images/3f/3fa9….png          the original, byte for byte (an array or a PIL image is stored as PNG)
    root/thumbnails/3f/3fa9….webp     at most 128 pixels on the longer side

The URI of an image is relative to the root (`images/3f/3fa9….png`), so that the whole folder can be moved. A file that
is referenced instead of copied has a relative URI if it is below the parent of the root, and a `file://` URI otherwise.
URIs and hashes come from payloads, which may be a stranger's: a URI leads out of the root only into folders that the
caller named, and only files with the names above are deleted.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from PIL import Image

from unidiff_sdk._internal.files import read_regular_file, resolve_stored, write_atomically
from unidiff_sdk._internal.images import MAX_FILE_SIZE, ImageSource, load_image
from unidiff_sdk._internal.memory import require_free_space
from unidiff_sdk.errors import ImageError, StoredImageError, StoreError

__all__ = [
    "THUMBNAIL_SIZE",
    "ImageStore",
    "ItemImage",
    "StoredFile",
    "copy_uri",
    "derived_hash",
    "is_copy",
    "thumbnail_name",
    "thumbnail_of",
]

THUMBNAIL_SIZE = 128  # pixels on the longer side
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# All files that are named by the hash of an image; `retrieval.reranking.latents` writes the last kind.
_DERIVED = re.compile(
    r"(images/../[0-9a-f]{64}\.[a-z0-9]{1,16}|thumbnails/../[0-9a-f]{64}\.webp|latents-[0-9a-f]{12}/../[0-9a-f]{64}\.bin)",
    re.ASCII,
)
_KIND = re.compile(r"images|thumbnails|latents-[0-9a-f]{12}", re.ASCII)
_PREFIX = re.compile(r"[0-9a-f]{2}", re.ASCII)
_COPY = re.compile(r"images/([0-9a-f]{2})/(\1[0-9a-f]{62})\.[a-z0-9]{1,16}", re.ASCII)  # the URI of a copy


class ItemImage:
    """The image of an item, before it is stored. It is read and hashed at once, and decoded on first use.

    A file or bytes are hashed as they are. An array or a PIL image is hashed by its pixels.

    Args:
        source: a path, the bytes of an image file, a PIL image or an array.
        error: the error for a file that cannot be used.

    Attributes:
        path: the file, if the source is a path.
        sha256: the hash of the content, in hexadecimal.

    Raises:
        ImageError: the file cannot be read, or the PIL image or array is not a valid image.
    """

    def __init__(self, source: ImageSource, error: type[ImageError] = ImageError) -> None:
        self._error = error
        self.path: Path | None = None
        self._data: bytes | None = None
        if isinstance(source, (str, PathLike)):
            self.path = Path(source)
            self._data = self._read(self.path)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self._data = bytes(source)
        else:
            self.decoded = load_image(source)
        content = self._pixels() if self._data is None else self._data
        self.sha256 = hashlib.sha256(content).hexdigest()

    @cached_property
    def decoded(self) -> Image.Image:
        """The image, RGB. Raises ImageError if it cannot be decoded."""
        data = self._original()
        try:
            return load_image(data)
        except ImageError as error:
            if self.path is None:
                raise
            raise self._error(
                f"{self.path}: {str(error).removeprefix(f'image data of {len(data)} bytes: ')}"
            ) from error

    @cached_property
    def suffix(self) -> str:
        """The file name extension that matches the content, such as ".jpg"."""
        if self.path is None and self._data is None:
            return ".png"
        with Image.open(io.BytesIO(self._original())) as header:
            kind = (header.format or "bin").lower()
        return {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")

    def encoded(self) -> bytes:
        """The image as the bytes of an image file: the original, or a PNG of an array or a PIL image."""
        if self.path is not None or self._data is not None:
            return self._original()
        buffer = io.BytesIO()
        self.decoded.save(buffer, "PNG")
        return buffer.getvalue()

    def release(self) -> None:
        """Free the memory that can be filled again: the bytes of a file and the pixels decoded from bytes."""
        if self.path is not None:
            self._data = None
        if self.path is not None or self._data is not None:
            self.__dict__.pop("decoded", None)

    def _original(self) -> bytes:
        if self._data is None:
            assert self.path is not None
            data = self._read(self.path)
            if hashlib.sha256(data).hexdigest() != self.sha256:
                raise self._error(f"{self.path}: the file changed while it was being added. Add it again.")
            self._data = data
        return self._data

    def _read(self, path: Path) -> bytes:
        return read_regular_file(path, MAX_FILE_SIZE, self._error)

    def _pixels(self) -> bytes:
        width, height = self.decoded.size
        return b"RGB %d %d\n" % (width, height) + self.decoded.tobytes()


@dataclass(frozen=True)
class StoredFile:
    """A file that is named by the hash of an image: a copy, a thumbnail or latents.

    Attributes:
        sha256: the hash of the image.
        name: the path relative to the store, with forward slashes.
        size: in bytes.
        modified: in seconds since 1970.
    """

    sha256: str
    name: str
    size: int
    modified: float


class ImageStore:
    """Images by content hash in one folder. Safe to use from several threads and processes.

    Args:
        root: the folder; created with the first image. It can be moved.
        references: a folder whose files may be referenced. Files that `add` references may be, too.
    """

    def __init__(self, root: Path, references: Path | None = None) -> None:
        self.root = root
        self._references = set() if references is None else {references.resolve()}

    def add(self, image: ItemImage, *, copy: bool = True) -> str:
        """Store an image and its thumbnail. Adding the same content again only checks that the files exist.

        Args:
            image: the image.
            copy: False references a file where it is instead of copying it. Bytes, arrays and PIL images are always
                copied.

        Returns:
            The URI of the image.

        Raises:
            ImageError: the image cannot be decoded, or its file changed.
            StoreError: the disk is full or not writable.
        """
        thumbnail = self._thumbnail_path(image.sha256)
        if not _exists_with_content(thumbnail):
            self._write(thumbnail, thumbnail_of(image.decoded))
        if image.path is not None and not copy:
            return self._allowed_reference(image.path)
        uri = copy_uri(image)
        path = resolve_stored(self.root, uri, StoreError)
        if not _exists_with_content(path):
            self._write(path, image.encoded())
        return uri

    def expected_uri(self, image: ItemImage, stored_uri: str, *, copy: bool) -> str:
        """The URI that `add` would return for an image whose stored URI is known; "" if `add` would copy it."""
        if image.path is not None and not copy:
            return self._allowed_reference(image.path)
        return stored_uri if is_copy(stored_uri) else ""

    def read(self, uri: str) -> bytes:
        """The file of an image. Raises StoredImageError if it is missing."""
        return read_regular_file(self.path(uri), MAX_FILE_SIZE, StoredImageError)

    def signed_url(self, uri: str, expires: int) -> str:
        """A URL by which anyone may read an image for a number of seconds. Raises StoreError: a folder has none."""
        raise StoreError(
            f"The images are in the folder {self.root}, which has no signed URLs; s3:// and gs:// have. Read the image "
            "with image_bytes(), or serve it with `unidiff serve`."
        )

    def load(self, uri: str) -> Image.Image:
        """Decode an image, RGB. Raises StoredImageError if it is missing or damaged."""
        path = self.path(uri)
        try:
            return load_image(path)
        except ImageError as error:
            raise StoredImageError(str(error)) from error

    def path(self, uri: str) -> Path:
        """The file that a URI refers to.

        Raises:
            StoredImageError: it is not in this store, and not below a folder that the caller named in `references`.
        """
        if is_copy(uri):
            return resolve_stored(self.root, uri, StoredImageError)
        target = self.locate(uri)
        try:
            resolved = target.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise StoredImageError(
                f"The URI {uri!r:.200} cannot be resolved ({error}). Index its image again."
            ) from error
        if not self._references.isdisjoint(resolved.parents):
            return resolved
        root = self.root.resolve()
        if target.is_relative_to(root) and ".." not in unquote(uri).split("/"):
            return resolve_stored(root, target.relative_to(root).as_posix(), StoredImageError)
        raise StoredImageError(
            f"The URI {uri!r:.200} leads out of the catalog. Files elsewhere are read only below a folder that you "
            "name: Catalog(location, references=FOLDER)."
        )

    def locate(self, uri: str) -> Path:
        """Where a URI leads, which may be anywhere: for comparisons and messages, not to open.

        Raises:
            StoredImageError: it is not a URI.
        """
        try:
            parts = urlsplit(uri)
            if parts.scheme == "file":
                return Path(unquote(parts.path))
            return Path(os.path.normpath(self.root.resolve() / unquote(uri)))
        except (AttributeError, TypeError, ValueError) as error:
            raise StoredImageError(
                f"{uri!r:.200} is not the URI of an image ({error}). Index its image again."
            ) from error

    def thumbnail(self, sha256: str, uri: str) -> bytes:
        """The thumbnail of an image as a WebP file. A missing one is made again from the original."""
        path = self._thumbnail_path(sha256)
        if not _exists_with_content(path):
            write_atomically(path, thumbnail_of(self.load(uri)))
        return path.read_bytes()

    def remove(self, sha256: str, uri: str) -> None:
        """Delete the thumbnail of an image and its copy, which have names that `add` gives. Nothing else is deleted.

        Raises:
            StoredImageError: the path of the thumbnail or the copy has a symbolic link.
        """
        if not _SHA256.fullmatch(sha256):
            return
        self._thumbnail_path(sha256).unlink(missing_ok=True)
        if is_copy(uri, sha256):
            self.path(uri).unlink(missing_ok=True)

    def stored_files(self) -> Iterator[StoredFile]:
        """Yield all files that are named by the hash of an image."""
        for folder in self.folders():
            for path in folder.iterdir():
                name = path.relative_to(self.root).as_posix()
                if (sha256 := derived_hash(name)) and _is_real(path, stat.S_ISREG):
                    with suppress(OSError):  # deleted meanwhile
                        status = path.stat()
                        yield StoredFile(sha256, name, status.st_size, status.st_mtime)

    def now(self) -> float:
        """The time by the clock of the storage, in seconds since 1970. It can differ from that of this machine.

        Raises:
            StoreError: nothing can be written there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".", suffix=".part") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError as error:
            raise StoreError(f"{self.root} cannot be written: {error.strerror or error}.") from error

    def exists(self, name: str) -> bool:
        """Whether there is a file with a name that `stored_files` yielded."""
        return os.path.lexists(self.root / name)

    def delete(self, name: str) -> None:
        """Delete a file with a name that `stored_files` yielded. Raises StoreError."""
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.root / name} cannot be deleted: {error.strerror or error}.") from error

    def folders(self) -> Iterator[Path]:
        """Yield the folders of the files named by the hash of an image."""
        for parent in self.root.iterdir() if self.root.is_dir() else ():
            if _KIND.fullmatch(parent.name) and _is_real(parent, stat.S_ISDIR):
                for folder in parent.iterdir():
                    if _PREFIX.fullmatch(folder.name) and _is_real(folder, stat.S_ISDIR):
                        yield folder

    def has(self, uri: str) -> bool:
        """Whether the file that a URI refers to exists and is not empty. It may be anywhere: it is not opened."""
        try:
            return _exists_with_content(self.path(uri) if is_copy(uri) else self.locate(uri))
        except StoredImageError:
            return False

    def reference(self, path: Path) -> str:
        """The URI of a file or folder outside the store: relative if it is below the parent of the root."""
        path, root = path.resolve(), self.root.resolve()
        if not path.is_relative_to(root.parent):
            return path.as_uri()
        return quote(Path(os.path.relpath(path, root)).as_posix())

    def _allowed_reference(self, path: Path) -> str:
        """The URI of a file that the caller adds by reference, and may therefore be read."""
        self._references.add(path.resolve().parent)
        return self.reference(path)

    def _write(self, path: Path, data: bytes) -> None:
        require_free_space(self.root, len(data), f"the image {path.name}")
        write_atomically(path, data)

    def _thumbnail_path(self, sha256: str) -> Path:
        return resolve_stored(self.root, thumbnail_name(sha256), StoredImageError)


def copy_uri(image: ItemImage) -> str:
    """The URI of a copy of an image."""
    return f"images/{image.sha256[:2]}/{image.sha256}{image.suffix}"


def is_copy(uri: object, sha256: str | None = None) -> bool:
    """Whether a URI is that of a copy; with a hash, of the image with this hash."""
    match = _COPY.fullmatch(uri) if isinstance(uri, str) else None
    return match is not None and sha256 in (None, match[2])


def thumbnail_name(sha256: str) -> str:
    """The name of the thumbnail of an image. Raises StoredImageError for what is not a hash."""
    if not _SHA256.fullmatch(sha256):
        raise StoredImageError(f"{sha256!r:.200} is not the hash of an image: 64 hexadecimal digits. Index it again.")
    return f"thumbnails/{sha256[:2]}/{sha256}.webp"


def derived_hash(name: str) -> str:
    """The hash of the image that a file belongs to, by its name relative to the store; "" for another file."""
    stem = name.rpartition("/")[2].partition(".")[0]
    return stem if _DERIVED.fullmatch(name) and stem.startswith(name.split("/")[1]) else ""


def _is_real(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a path is of a kind, and no symbolic link."""
    try:
        return is_kind(path.lstat().st_mode)
    except OSError:  # deleted meanwhile
        return False


def _exists_with_content(path: Path) -> bool:
    """Whether a file exists and is not empty: a power cut can leave an empty file behind."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def thumbnail_of(image: Image.Image) -> bytes:
    """The thumbnail of an image as a WebP file."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
