"""RGB images to the pixel values that the image encoder takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import Fit

from .manifest import Resize

__all__ = ["preprocess"]


def preprocess(
    image: Image.Image,
    size: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    fit: Fit = "crop",
    resize: Resize | None = None,
) -> NDArray[np.float32]:
    """An RGB image as the image encoder takes it: float32[3, size, size], normalized by `mean` and `std` (each [3]).

    "crop" is the same as transformers' image processors with the backend of Pillow: resize as `resize` states (default:
    the shorter edge to `size`, bicubic), center crop, normalize. A side that is shorter than the crop is padded with
    black. "pad" brings the longer edge to `size` instead and centers the image on white.
    """
    square = _cropped(image, size, resize or Resize(size)) if fit == "crop" else _padded(image, size)
    pixels = np.asarray(square, np.float32).transpose(2, 0, 1) / np.float32(255)
    normalized: NDArray[np.float32] = (pixels - mean[:, None, None]) / std[:, None, None]
    return normalized


def _cropped(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    if resize.squash:
        width = height = resize.side
    else:
        width, height = int(resize.side * width / shorter), int(resize.side * height / shorter)
    left, top = (width - size) // 2, (height - size) // 2
    interpolation = Image.Resampling[resize.interpolation.upper()]
    return image.resize((width, height), interpolation).crop((left, top, left + size, top + size))


def _padded(image: Image.Image, size: int) -> Image.Image:
    longer = max(image.size)
    width, height = (max(1, round(size * edge / longer)) for edge in image.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square
