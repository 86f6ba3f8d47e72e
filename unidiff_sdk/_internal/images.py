"""Pictures in: any source to a plain RGB image, safely, and an RGB image to what the image encoder takes."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from unidiff_sdk.errors import ImageError

__all__ = ["MAX_PIXELS", "Fit", "HasImage", "ImageSource", "load_image"]

Fit = Literal["crop", "pad"]
"""How a picture becomes a square: its middle alone, or all of it on white."""

ImageSource = str | PathLike[str] | bytes | bytearray | memoryview | NDArray[Any] | Image.Image


@runtime_checkable
class HasImage(Protocol):
    """Anything that carries a decoded image, such as `Generated`."""

    @property
    def image(self) -> Image.Image: ...


MAX_PIXELS = 64_000_000
"""What `load_image` decodes at most: 192 MB as RGB. A few kilobytes of PNG can claim to be far larger."""

MAX_PROPORTION = 200
"""How many times as long as wide a picture may be. Its shorter edge is what is brought to the encoder's size."""

# Left out on purpose: formats that run an interpreter (EPS), that are decoded on opening, whatever their size (ICO), or
# that no product catalog holds.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to upright 8-bit RGB, transparency laid over white; of an animation the first frame.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array [height, width] or
            [height, width, channels] with 1 to 4 channels: uint8, uint16, bool, or floating point in [0, 1].
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ImageError: the picture is missing, damaged, empty, too large, too elongated, or of an unknown kind.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given image", max_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the given array", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"image data of {len(source)} bytes", max_pixels)
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        if not path.is_file():
            raise ImageError(
                f"{path}: {'is a folder, not an image file' if path.is_dir() else 'there is no such file'}"
            )
        return _decode(path, str(path), max_pixels)
    raise ImageError(f"cannot read an image from {type(source).__name__}; give a path, bytes, an array or a PIL image")


def _decode(file: Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            return _to_rgb(image, name, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: refused, because it is too large to decode safely ({error})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{name}: damaged or cut short ({error})") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than the {max_pixels:,} allowed; "
            "make it smaller, or raise max_pixels if you trust it"
        )
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than {MAX_PROPORTION} times as long as wide; crop it"
        )
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            return _from_array(_narrowed(np.asarray(image))).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{name}: damaged or cut short ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation tells."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _from_array(array: NDArray[Any]) -> Image.Image:
    """An 8-bit image from an array of any supported type; 16 bits are brought to 8."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))):
        raise ImageError(
            f"an array of shape {list(array.shape)} is not an image; give [height, width] or [height, width, channels]"
        )
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"floating-point pixels must lie in [0, 1]; these lie in [{array.min()}, {array.max()}]")
        array = array * 255
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = array / 257
    elif array.dtype != np.uint8:
        raise ImageError(f"pixels of type {array.dtype} are ambiguous; give uint8, uint16 or floating point in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(np.rint(array).astype(np.uint8)))


def _narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """PIL holds some 16-bit files as 32-bit integers."""
    if array.dtype.kind != "i":
        return array
    if array.min() < 0 or array.max() > 65535:
        raise ImageError(f"32-bit pixels must lie in [0, 65535]; these lie in [{array.min()}, {array.max()}]")
    return array.astype(np.uint16)
