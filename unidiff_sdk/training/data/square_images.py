"""The images of a catalog as squares of one size: in memory if they fit, else decoded at each access."""

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

__all__ = ["SquareImages", "map_in_threads", "size_conditions", "to_square"]

T = TypeVar("T")
R = TypeVar("R")

_ZERO, _ONE = np.zeros(3, np.float32), np.ones(3, np.float32)
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter lock
_READ_AHEAD = 8 * _THREADS


def to_square(image: Image.Image, size: int, fit: Fit, resize: Resize | None = None) -> Tensor:
    """Make an image square with the runtime's own preprocessing: uint8[3, size, size]."""
    return torch.from_numpy(np.rint(preprocess(image, size, _ZERO, _ONE, fit, resize) * 255).astype(np.uint8))


def size_conditions(original: tuple[int, int], size: int, fit: Fit, *, mirrored: bool = False) -> list[int]:
    """The sizes that condition Stable Diffusion XL on an image that `to_square` made square.

    Podell et al. 2023, "SDXL", section 2.2. The crop is counted from the corner of the resized image. "pad" keeps the
    whole image, so the padded square counts as the original.

    Args:
        original: (width, height) of the image.
        size: Side of the square.
        mirrored: Whether left and right are exchanged before the crop.

    Returns:
        Height and width of the original image, top and left of the crop, height and width of the crop.
    """
    width, height = original
    if fit == "pad":
        return [max(original), max(original), 0, 0, size, size]
    shorter = min(original)
    wide, high = (int(size * side / shorter) for side in original)
    left, top = (wide - size) // 2, (high - size) // 2
    return [height, width, top, wide - size - left if mirrored else left, size, size]


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


class SquareImages:
    """n square images, indexed by row: `images[rows]` and `images[2:5]` are uint8[k, 3, size, size].

    Args:
        rows: The catalog rows that the images come from.
        size: Side in pixels.
        fit: How images become square.
        decoded: All images, uint8[n, 3, size, size]; None if they do not fit in memory. Then each access decodes.
        mirrored: Whether left and right are exchanged.
        resize: How images are resized before the crop, see `preprocess`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        size: int,
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
            squares = list(map_in_threads(read, [self.rows[number] for number in numbers]))
            chosen = torch.stack(squares) if squares else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return chosen.flip(-1) if self._mirrored else chosen

    def split(self, n: int) -> Iterator[Tensor]:
        """All images in order, n at a time."""
        return (self[start : start + n] for start in range(0, len(self), n))

    def first(self, n: int) -> SquareImages:
        """The first n images."""
        decoded = None if self.decoded is None else self.decoded[:n]
        return SquareImages(self.rows[:n], self.size, self.fit, decoded, self._mirrored, self.resize)

    def mirrored(self) -> SquareImages:
        """The same images with left and right exchanged."""
        return SquareImages(self.rows, self.size, self.fit, self.decoded, not self._mirrored, self.resize)


def _read(row: Row, size: int, fit: Fit, resize: Resize | None) -> Tensor:
    return to_square(load_image(row.image()), size, fit, resize)
