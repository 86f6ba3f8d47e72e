"""Loading an image from any source as plain 8-bit RGB, safely.

Decoders cannot be interrupted, so all limits are checked before anything is decoded. Within them, the worst files that
we know of (64 million pixels of noise) take 1.1 GB and 2.3 s of one core. A process decodes large images one at a time,
and takes up to 340 MB for each thread that decodes others.
"""

from __future__ import annotations

import base64
import io
import threading
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from unidiff_sdk.errors import ImageError

from .files import read_regular_file

__all__ = ["MAX_FILE_SIZE", "MAX_PIXELS", "Fit", "HasImage", "ImageSource", "decoded_image", "load_image"]

Fit = Literal["crop", "pad"]
"""How an image becomes a square: "crop" keeps its center, "pad" keeps all of it on a white background."""

ImageSource = str | PathLike[str] | bytes | bytearray | memoryview | NDArray[Any] | Image.Image


@runtime_checkable
class HasImage(Protocol):
    """An object with a decoded image, such as `Generated`."""

    @property
    def image(self) -> Image.Image: ...


MAX_PIXELS = 64_000_000
"""The largest image that `load_image` decodes: 192 MB as RGB. A PNG of a few kilobytes can claim a far larger size."""

MAX_FILE_SIZE = 256 << 20
"""The largest image file in bytes."""

LARGE = 16_000_000
"""Pixels from which an image is large. Decoders need several copies of it, so large images are decoded one by one."""

MAX_PIXELS_PER_BYTE = 4096
"""The most pixels per byte in the file of a large image. Deflate, as in PNG, reaches at most 1,032 for one channel."""

MAX_SCANS = 100
"""The most scans of a progressive JPEG. Each one passes over all pixels again; libjpeg writes 10 by default."""

MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
"""The most pixels times scans of a JPEG: the largest image with twice the usual number of scans."""

MAX_EXIF_SEGMENTS = 16
"""The most EXIF segments of a JPEG, which has one. Pillow appends them to each other, in quadratic time."""

MAX_TILE_PIXELS = 1 << 24
"""The largest tile of a TIFF in pixels, unless the image is larger. A decoder allocates whole tiles."""

MAX_ASPECT_RATIO = 200
"""The largest ratio of the longer to the shorter side. The encoder scales the shorter side to its input size."""

TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of TIFF
_STRIP = 256  # rows that are converted at a time
_decoding_large = threading.Lock()

# Excluded on purpose: formats that run an interpreter (EPS), formats that are decoded on opening whatever their size
# (ICO), and formats that product catalogs do not contain.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, background: str = "white") -> Image.Image:
    """Decode an image to 8-bit RGB.

    The EXIF orientation is applied, transparency is composited over the background, and an animation
    gives its first frame.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array [height, width] or
            [height, width, channels] with 1 to 4 channels: uint8, uint16, bool, or floating point in [0, 1].
        max_pixels: the largest number of pixels (width x height) to decode.
        background: the color behind transparent pixels.

    Raises:
        ImageError: the image is missing, damaged, empty, too large, too elongated, or in an unsupported format.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given image", max_pixels, background)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the given array", max_pixels, background)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), f"image data of {len(source)} bytes", max_pixels, background)
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        if not path.is_file():
            raise ImageError(
                f"{path}: {'is a folder, not an image file' if path.is_dir() else 'there is no such file'}. "
                "Give the path of an image file."
            )
        return _decode(read_regular_file(path, MAX_FILE_SIZE, ImageError), str(path), max_pixels, background)
    raise ImageError(f"Cannot read an image from {type(source).__name__}. Give a path, bytes, an array or a PIL image.")


def decoded_image(name: str, data: str | None) -> bytes | None:
    """The image file in a base64 text (also URL-safe) or data: URL. None stays None.

    Raises ImageError, which calls the text `name`, if it is neither.
    """
    if data is None:
        return None
    if data.startswith("data:"):
        header, comma, data = data.partition(",")
        if not comma or not header.endswith(";base64"):
            raise ImageError(f"{name} is a data: URL without base64 data.")
    standard = "".join(data.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except ValueError as error:  # also a text that is not ASCII
        raise ImageError(f"{name} is not base64 ({error}).") from error


def _decode(data: bytes, name: str, max_pixels: int, background: str) -> Image.Image:
    try:
        if (segments := data.count(b"Exif\0\0")) > MAX_EXIF_SEGMENTS and data.startswith(b"\xff\xd8"):
            raise ImageError(
                f"{name}: a JPEG with {segments:,} EXIF segments; at most {MAX_EXIF_SEGMENTS} are read. Save the image "
                "again."
            )
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_cost(image, data, name, max_pixels)
            with _decoding_large if image.width * image.height > LARGE else nullcontext():
                return _to_rgb(image, name, max_pixels, background)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large to decode safely ({error}). Resize the image.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a supported format ({', '.join(_FORMATS)}). Convert it.") from error
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{name}: damaged or truncated ({error})") from error


def _check_cost(image: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    """Refuse a file that takes far more memory or time to decode than its size suggests. Nothing is decoded yet."""
    pixels = image.width * image.height
    if LARGE < pixels <= max_pixels and pixels > MAX_PIXELS_PER_BYTE * len(data):
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels in {len(data):,} bytes. At most {MAX_PIXELS_PER_BYTE:,} "
            "pixels a byte are decoded of a large image. Resize the image."
        )
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        tile = int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_HEIGHT, 0))
        if tile > max(MAX_TILE_PIXELS, pixels):
            raise ImageError(
                f"{name}: a TIFF with tiles of {tile:,} pixels for an image of {pixels:,}; at most {MAX_TILE_PIXELS:,} "
                "are allowed. Save the image again."
            )
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")  # in compressed data, 0 follows 0xff
        if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
            raise ImageError(
                f"{name}: a progressive JPEG of {scans:,} scans and {pixels:,} pixels. At most {MAX_SCANS} scans, and "
                f"{MAX_SCANNED_PIXELS:,} pixels in all of them, are decoded. Save the image again."
            )


def _to_rgb(image: Image.Image, name: str, max_pixels: int, background: str) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels exceed the limit of {max_pixels:,}. Resize the image, or raise "
            "max_pixels if you trust it."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} pixels exceed the aspect ratio of {MAX_ASPECT_RATIO}:1. Crop the image."
        )
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            return _from_array(_to_uint16(np.asarray(image))).convert("RGB")
        if image.has_transparency_data:
            return _composited(image.convert("RGBA"), background)
        return image.convert("RGB")
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{name}: damaged or truncated ({error})") from error


def _composited(image: Image.Image, background: str) -> Image.Image:
    """Composite over a color, a few rows at a time: whole images would take three times the memory."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        behind = Image.new("RGBA", strip.size, background)
        result.paste(Image.alpha_composite(behind, strip).convert("RGB"), (0, top))
    return result


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return image
    if orientation == 1:
        return image
    from PIL import ImageOps  # few images need it

    return ImageOps.exif_transpose(image)


def _from_array(array: NDArray[Any]) -> Image.Image:
    """Convert an array of any supported type to an 8-bit image."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))):
        raise ImageError(
            f"An array of shape {list(array.shape)} is not an image. Give [height, width] or [height, width, channels]."
        )
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"Floating-point pixels are in [{array.min()}, {array.max()}]. Scale them to [0, 1].")
        array = array * 255
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _to_uint8(array)
    elif array.dtype != np.uint8:
        raise ImageError(f"Pixels of type {array.dtype} are ambiguous. Give uint8, uint16 or floating point in [0, 1].")
    if array.dtype != np.uint8:
        array = np.rint(array).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The nearest 8-bit values of 16-bit pixels, a few rows at a time: floating point takes eight bytes a pixel."""
    result = np.empty(array.shape, np.uint8)
    for top in range(0, len(array), _STRIP):
        result[top : top + _STRIP] = (array[top : top + _STRIP].astype(np.uint32) + 128) // 257
    return result


def _to_uint16(array: NDArray[Any]) -> NDArray[Any]:
    """Convert the 32-bit integers that PIL uses for some 16-bit files."""
    if array.dtype.kind != "i":
        return array
    if array.min() < 0 or array.max() > 65535:
        raise ImageError(f"32-bit pixels are in [{array.min()}, {array.max()}]. Scale them to [0, 65535].")
    return array.astype(np.uint16)
