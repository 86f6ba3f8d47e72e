"""Aspect-ratio buckets: sizes for images that are not square, and batches of images of one size.

The idea is NovelAI's (2022, "NovelAI improvements on Stable Diffusion", section "Aspect ratio bucketing"). SDXL was
trained so as well (Podell et al. 2023, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator

__all__ = ["MAX_ASPECT_RATIO", "BucketBatches", "Size", "bucket_sizes", "nearest_bucket"]

MAX_ASPECT_RATIO = 2  # of the most elongated bucket
STEPS = 16  # in the side of the square bucket, as 64 pixels are in 1,024

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(side: int, block: int) -> list[Size]:
    """The sizes of all buckets, from the widest to the highest.

    Each has about as many pixels as the square, and at most as many, so that no batch needs more memory.

    Args:
        side: Side of the square images that the model generates.
        block: Sides must be multiples of this many pixels.
    """
    step = block * max(1, round(side / STEPS / block))
    wide = [(width, side * side // width // step * step) for width in range(side, MAX_ASPECT_RATIO * side, step)]
    wide = [(width, height) for width, height in wide if 0 < width <= MAX_ASPECT_RATIO * height]
    largest: dict[float, Size] = {}
    for width, height in [*wide, *((height, width) for width, height in wide)]:
        ratio = width / height
        largest[ratio] = max(largest.get(ratio, (0, 0)), (width, height))
    largest[1.0] = side, side
    return [largest[ratio] for ratio in sorted(largest, reverse=True)]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of an image: that of the nearest aspect ratio, by the logarithm. The first one, if two are as near.

    size: (width, height) of the image.
    """
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect))


class BucketBatches:
    """Batches of one bucket each. Every epoch passes over every pair once, in a new order.

    A bucket is divided into as few batches as possible, of nearly equal sizes. The batch of a step follows from the
    seed and its number.

    Args:
        buckets: int64, the rows of each bucket.
        size: Largest number of pairs in a batch.
        seed: Seed of the order.
    """

    def __init__(self, buckets: Sequence[Tensor], size: int, seed: int) -> None:
        self.buckets, self.size, self.seed = buckets, size, seed

    @property
    def smallest(self) -> int:
        """Pairs in the smallest batch."""
        return min(len(batch) for batch in self._batches(0))

    def rows(self, step: int) -> Tensor:
        """The rows of a step's batch, counted from 0."""
        epoch, place = divmod(step, self.batches_per_epoch)
        return self._batches(epoch)[place]

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return sum(-(-len(rows) // self.size) for rows in self.buckets)

    def _batches(self, epoch: int) -> list[Tensor]:
        batches: list[Tensor] = []
        for number, rows in enumerate(self.buckets):
            order = torch.randperm(len(rows), generator=seeded_generator(self.seed, Purpose.ORDER, epoch, number))
            batches += rows[order].tensor_split(-(-len(rows) // self.size))
        order = torch.randperm(len(batches), generator=seeded_generator(self.seed, Purpose.ORDER, epoch))
        return [batches[place] for place in order.tolist()]
