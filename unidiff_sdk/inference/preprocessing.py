"""RGB images to the pixel values that the image encoder takes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import Fit

from .manifest import Patches, Resize

__all__ = ["patch_grid", "preprocess", "preprocess_patches"]

SCALE_STEP = 1e-5  # where the search for the scale of an image ends


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


def preprocess_patches(
    image: Image.Image, mean: NDArray[np.float32], std: NDArray[np.float32], patches: Patches
) -> NDArray[np.float32]:
    """An RGB image as a NaFlex image encoder takes it: float32[count, values of a patch + 2].

    The image is resized to as many patches as fit, about in its aspect ratio, as transformers' `Siglip2ImageProcessor`
    does with Pillow. A row is a patch, from left to right and top to bottom, with the channels of a pixel next to each
    other. Its last two values are the height and the width of the image in patches; both are 0 in rows of padding.
    """
    rows, columns = patch_grid(*image.size, patches)
    side = patches.side
    size = (columns * side, rows * side)
    resized = image.resize(size, Image.Resampling[patches.interpolation.upper()])
    pixels = (np.asarray(resized, np.float32) / np.float32(255) - mean) / std
    values = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    packed = np.zeros((patches.count, patches.width + 2), np.float32)
    packed[: len(values), :-2], packed[: len(values), -2:] = values, (rows, columns)
    return packed


def patch_grid(width: int, height: int, patches: Patches) -> tuple[int, int]:
    """Rows and columns of patches of an image: the scale is found by bisection, as in `Siglip2ImageProcessor`."""

    def side(scale: float, pixels: int) -> int:
        return max(1, math.ceil(pixels * scale / patches.side))

    least, most = SCALE_STEP / 10, 100.0
    while most - least >= SCALE_STEP:
        scale = (least + most) / 2
        if side(scale, height) * side(scale, width) <= patches.count:
            least = scale
        else:
            most = scale
    return side(least, height), side(least, width)


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
