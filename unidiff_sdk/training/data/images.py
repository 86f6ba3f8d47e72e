"""The pictures of a catalog as squares of one size: in memory while they fit, else decoded when they are wanted."""

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
from unidiff_sdk.datasets.reader import Row
from unidiff_sdk.errors import UniDiffError
from unidiff_sdk.inference.preprocessing import preprocess

__all__ = ["Pictures", "in_threads", "to_square"]

T = TypeVar("T")
R = TypeVar("R")

_ZERO, _ONE = np.zeros(3, np.float32), np.ones(3, np.float32)
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without the interpreter's lock
_AHEAD = 8 * _THREADS


def to_square(image: Image.Image, size: int, fit: Fit) -> Tensor:
    """uint8[3, size, size], made as the runtime makes it."""
    return torch.from_numpy(np.rint(preprocess(image, size, _ZERO, _ONE, fit) * 255).astype(np.uint8))


def in_threads(act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`act` of each item, in order, a few of them at a time; no more are taken than will soon be needed.

    If taking an item fails, those before it come first.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while True:
            ahead: list[T] = []
            failure: UniDiffError | None = None
            try:
                ahead.extend(islice(iterator, _AHEAD))
            except UniDiffError as error:
                failure = error
            yield from pool.map(act, ahead)
            if failure:
                raise failure
            if not ahead:
                return


class Pictures:
    """n pictures, read by row: `pictures[rows]` is uint8[len(rows), 3, size, size], `pictures[2:5]` likewise.

    rows: where each is. kept: all of them decoded, uint8[n, 3, size, size], or None where they are too many for the
    memory; then every access decodes what it asks for.
    """

    def __init__(self, rows: Sequence[Row], size: int, fit: Fit, kept: Tensor | None, mirrored: bool = False) -> None:
        self.rows, self.size, self.fit, self.kept, self._mirrored = rows, size, fit, kept, mirrored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if self.kept is not None:
            chosen = self.kept[rows]
        else:
            numbers = range(len(self.rows))[rows] if isinstance(rows, slice) else rows.tolist()
            squares = list(in_threads(partial(_read, size=self.size, fit=self.fit), [self.rows[n] for n in numbers]))
            chosen = torch.stack(squares) if squares else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return chosen.flip(-1) if self._mirrored else chosen

    def split(self, n: int) -> Iterator[Tensor]:
        """All pictures in order, n at a time."""
        return (self[start : start + n] for start in range(0, len(self), n))

    def first(self, n: int) -> Pictures:
        """The first n of them."""
        kept = None if self.kept is None else self.kept[:n]
        return Pictures(self.rows[:n], self.size, self.fit, kept, self._mirrored)

    def mirrored(self) -> Pictures:
        """The same pictures, left and right exchanged."""
        return Pictures(self.rows, self.size, self.fit, self.kept, not self._mirrored)


def _read(row: Row, size: int, fit: Fit) -> Tensor:
    return to_square(load_image(row.image()), size, fit)
