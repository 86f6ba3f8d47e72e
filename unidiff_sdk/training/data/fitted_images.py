"""The images of a catalog at one size, usually square: in memory if they fit, else decoded at each access."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff_sdk._internal.images import Fit, load_image
from unidiff_sdk._internal.parallel import BATCH_BYTES
from unidiff_sdk.datasets.reader import Row
from unidiff_sdk.errors import UniDiffError
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.inference.preprocessing import preprocess

from .buckets import Size

__all__ = ["FittedImages", "fit_to", "map_in_threads", "size_conditions"]

T = TypeVar("T")
R = TypeVar("R")

_ZERO, _ONE = np.zeros(3, np.float32), np.ones(3, np.float32)
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter lock
_READ_AHEAD = 8 * _THREADS


def fit_to(image: Image.Image, size: Size, fit: Fit, resize: Resize | None = None) -> Tensor:
    """Bring an image to a size: uint8[3, height, width].

    Squares are made by the runtime's own preprocessing. For other sizes, "crop" does the same: it resizes the image
    until it covers the size, and crops the center.
    """
    width, height = size
    if width == height:
        return torch.from_numpy(np.rint(preprocess(image, width, _ZERO, _ONE, fit, resize) * 255).astype(np.uint8))
    wide, high = _covering(image.size, size)
    left, top = (wide - width) // 2, (high - height) // 2
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    cropped = np.array(resized.crop((left, top, left + width, top + height)))
    return torch.from_numpy(cropped).permute(2, 0, 1).contiguous()


def _covering(original: Size, size: Size) -> Size:
    """The smallest size with the aspect ratio of an image that covers another size."""
    (wide, high), (width, height) = original, size
    if wide * height < width * high:
        return width, int(width * high / wide)
    return int(height * wide / high), height


def size_conditions(original: Size, size: Size, fit: Fit, *, mirrored: bool = False) -> list[int]:
    """The sizes that condition Stable Diffusion XL on an image that `fit_to` brought to a size.

    Podell et al. 2023, "SDXL", section 2.2. The crop is counted from the corner of the resized image. "pad" keeps the
    whole image, so the padded square counts as the original.

    Args:
        original: (width, height) of the image.
        size: (width, height) that it was brought to.
        mirrored: Whether left and right are exchanged before the crop.

    Returns:
        Height and width of the original image, top and left of the crop, height and width of the crop.
    """
    width, height = size
    if fit == "pad":
        return [max(original), max(original), 0, 0, height, width]
    wide, high = _covering(original, size)
    left, top = (wide - width) // 2, (high - height) // 2
    return [original[1], original[0], top, wide - width - left if mirrored else left, height, width]


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], weight: Callable[[T], int] = lambda item: 0
) -> Iterator[R]:
    """Apply `function` to each item in parallel. Yields results in order and reads only a few items ahead.

    At most `BATCH_BYTES` and one item are read ahead, by the `weight` of the items in bytes.

    If reading an item raises, the results of the items before it come first.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while True:
            ahead: list[T] = []
            size = 0
            failure: UniDiffError | None = None
            try:
                for item in islice(iterator, _READ_AHEAD):
                    ahead.append(item)
                    size += weight(item)
                    if size >= BATCH_BYTES:
                        break
            except UniDiffError as error:
                failure = error
            yield from pool.map(function, ahead)
            if failure:
                raise failure
            if not ahead:
                return


class FittedImages:
    """n images of one size, indexed by row: `images[rows]` and `images[2:5]` are uint8[k, 3, height, width].

    Args:
        rows: The catalog rows that the images come from.
        size: (width, height) in pixels.
        fit: How images are brought to the size.
        decoded: All images, uint8[n, 3, height, width]; None if they do not fit in memory. Then each access decodes.
        mirrored: Whether left and right are exchanged.
        resize: How images are resized before the crop, see `preprocess`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        size: Size,
        fit: Fit,
        decoded: Tensor | None,
        mirrored: bool = False,
        resize: Resize | None = None,
    ) -> None:
        self.rows, self.size, self.fit, self.decoded, self._mirrored = rows, size, fit, decoded, mirrored
        self.resize = resize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if self.decoded is not None:
            chosen = self.decoded[rows]
        else:
            numbers = range(len(self.rows))[rows] if isinstance(rows, slice) else rows.tolist()
            read = partial(_read, size=self.size, fit=self.fit, resize=self.resize)
            found = list(map_in_threads(read, [self.rows[number] for number in numbers]))
            chosen = torch.stack(found) if found else torch.zeros(0, 3, *self.size[::-1], dtype=torch.uint8)
        return chosen.flip(-1) if self._mirrored else chosen

    def split(self, n: int) -> Iterator[Tensor]:
        """All images in order, n at a time."""
        return (self[start : start + n] for start in range(0, len(self), n))

    def first(self, n: int) -> FittedImages:
        """The first n images."""
        decoded = None if self.decoded is None else self.decoded[:n]
        return FittedImages(self.rows[:n], self.size, self.fit, decoded, self._mirrored, self.resize)

    def mirrored(self) -> FittedImages:
        """The same images with left and right exchanged."""
        return FittedImages(self.rows, self.size, self.fit, self.decoded, not self._mirrored, self.resize)


def _read(row: Row, size: Size, fit: Fit, resize: Resize | None) -> Tensor:
    return fit_to(load_image(row.image()), size, fit, resize)
