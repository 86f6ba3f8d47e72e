"""Where pixels live: files named by the hash of their content, a thumbnail beside each.

    root/images/3f/3fa9….png          the original, byte for byte (an array or a PIL image as PNG)
    root/thumbnails/3f/3fa9….webp     at most 128 px on the longer side

A picture is found again by its URI: `images/3f/3fa9….png`, relative to the root, so that the whole folder can move. A
file that is referenced instead of copied has a relative URI too if it lies beside the root, and else a `file://` one.
"""

from __future__ import annotations

import hashlib
import io
import os
from functools import cached_property
from os import PathLike
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from PIL import Image

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk._internal.images import ImageSource, load_image
from unidiff_sdk.errors import ImageError

__all__ = ["THUMBNAIL_SIZE", "ImageStore", "ItemImage"]

THUMBNAIL_SIZE = 128
_COPIES = "images/"


class ItemImage:
    """A picture on its way into a store: read and hashed at once, decoded when `image` is asked for.

    A path or bytes are hashed as the file they are; an array or a PIL image by its pixels.

    Raises:
        ImageError: there is no such file; on `image`, it cannot be decoded.
    """

    def __init__(self, source: ImageSource) -> None:
        self.path: Path | None = None
        self._data: bytes | None = None
        if isinstance(source, (str, PathLike)):
            self.path = Path(source)
            self._data = _read(self.path)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self._data = bytes(source)
        else:
            self.decoded = load_image(source)
        content = self._pixels() if self._data is None else self._data
        self.sha256 = hashlib.sha256(content).hexdigest()

    @cached_property
    def decoded(self) -> Image.Image:
        """The decoded picture, RGB."""
        data = self._original()
        try:
            return load_image(data)
        except ImageError as error:
            if self.path is None:
                raise
            raise ImageError(f"{self.path}: {str(error).removeprefix(f'image data of {len(data)} bytes: ')}") from error

    @cached_property
    def suffix(self) -> str:
        """What the original's file name ends with, told from its content."""
        if self.path is None and self._data is None:
            return ".png"
        with Image.open(io.BytesIO(self._original())) as header:
            kind = (header.format or "bin").lower()
        return {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")

    def encoded(self) -> bytes:
        """The original as an image file."""
        if self.path is not None or self._data is not None:
            return self._original()
        buffer = io.BytesIO()
        self.decoded.save(buffer, "PNG")
        return buffer.getvalue()

    def release(self) -> None:
        """Give back the memory of what can be had again: a file's bytes, and the pixels that they decode to."""
        if self.path is not None:
            self._data = None
        if self.path is not None or self._data is not None:
            self.__dict__.pop("decoded", None)

    def _original(self) -> bytes:
        if self._data is None:
            assert self.path is not None
            data = _read(self.path)
            if hashlib.sha256(data).hexdigest() != self.sha256:
                raise ImageError(f"{self.path}: the file changed while it was being added; add it again")
            self._data = data
        return self._data

    def _pixels(self) -> bytes:
        width, height = self.decoded.size
        return b"RGB %d %d\n" % (width, height) + self.decoded.tobytes()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: the image cannot be read ({reason})") from error


class ImageStore:
    """Pictures by content under one root folder, which may move. Safe to use from several threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, picture: ItemImage, *, copy: bool = True) -> str:
        """Keep a picture and its thumbnail; returns its URI. Adding the same content again costs two look-ups.

        Args:
            picture: what to keep.
            copy: whether a file is copied, or only referenced where it is; what is no file is always copied.
        """
        thumbnail = self._thumbnail_path(picture.sha256)
        if not _is_there(thumbnail):
            write_atomically(thumbnail, _thumbnail(picture.decoded))
        if picture.path is not None and not copy:
            return self.reference(picture.path)
        uri = f"{_COPIES}{picture.sha256[:2]}/{picture.sha256}{picture.suffix}"
        if not _is_there(self.root / uri):
            write_atomically(self.root / uri, picture.encoded())
        return uri

    def expected_uri(self, picture: ItemImage, uri: str, *, copy: bool) -> str:
        """What `add` would return for a picture that it once returned `uri` for; "" if it would copy it anew."""
        if picture.path is not None and not copy:
            return self.reference(picture.path)
        return uri if uri.startswith(_COPIES) else ""

    def load(self, uri: str) -> Image.Image:
        """The original, RGB. Raises ImageError if it is gone or damaged."""
        return load_image(self.path(uri))

    def path(self, uri: str) -> Path:
        """The file that a URI stands for."""
        parts = urlsplit(uri)
        if parts.scheme == "file":
            return Path(unquote(parts.path))
        return Path(os.path.normpath(self.root.resolve() / unquote(uri)))

    def thumbnail(self, sha256: str, uri: str) -> bytes:
        """The thumbnail as a WebP file; made anew from the original if it was lost."""
        path = self._thumbnail_path(sha256)
        if not _is_there(path):
            write_atomically(path, _thumbnail(self.load(uri)))
        return path.read_bytes()

    def remove(self, sha256: str, uri: str) -> None:
        """Delete a picture's thumbnail and, if it was copied, the copy. A referenced file is never touched."""
        self._thumbnail_path(sha256).unlink(missing_ok=True)
        if uri.startswith(_COPIES):
            self.path(uri).unlink(missing_ok=True)

    def _thumbnail_path(self, sha256: str) -> Path:
        return self.root / "thumbnails" / sha256[:2] / f"{sha256}.webp"

    def reference(self, path: Path) -> str:
        """The URI of a file or folder outside: relative to the root if it lies beside it, so that both can move."""
        path, root = path.resolve(), self.root.resolve()
        if not path.is_relative_to(root.parent):
            return path.as_uri()
        return quote(Path(os.path.relpath(path, root)).as_posix())


def _is_there(path: Path) -> bool:
    """Whether a file is there and holds something: after a power cut, one that was just written may be empty."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
