"""Hard negatives: batches in which each caption meets the images that it is most easily confused with.

Random batches of a small catalog contain few confusable pairs, so ITC soon has nothing left to learn from them. Mining
hard negatives with the model that is being trained: Xiong et al. 2021, "Approximate nearest neighbor negative
contrastive learning for dense text retrieval" (ANCE).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff_sdk.errors import CheckpointError

__all__ = ["HardNegatives"]

FILE = "hard_negatives.safetensors"
POOL_FACTOR = 4  # nearest images kept per wanted negative, because some are in the batch already
MIN_REFRESH = 20  # steps; embedding all pairs more often costs more than the steps between
CHUNK = 256  # captions compared with all images at once


class HardNegatives:
    """The images of other meaning that are nearest to each caption, found anew once per epoch.

    Args:
        per_pair: K, negatives per pair, above 0.
        size: Pairs per step.
        pairs: n, pairs of the catalog.
    """

    def __init__(self, per_pair: int, size: int, pairs: int) -> None:
        self.per_pair = per_pair
        self.size = size
        self.anchors = max(1, size // (per_pair + 1))  # pairs per step that bring their negatives
        self.interval = max(MIN_REFRESH, pairs // self.anchors)
        self.shape = (pairs, min(POOL_FACTOR * per_pair, pairs - 1))
        self.nearest: Tensor | None = None  # int64[shape], rows of images, nearest first; -1 where there are no more

    def due(self, step: int) -> bool:
        """Whether to refresh before a step, counted from 0."""
        return self.nearest is None or step % self.interval == 0

    def find(self, u: Tensor, v: Tensor, groups: Tensor) -> Tensor:
        """The nearest images of other meaning of each caption: int64[shape], as in `nearest`.

        u, v: float[n, d], image and text embeddings, unit rows. groups: int64[n], see `Batch`.
        """
        rows = []
        for texts, own in zip(v.split(CHUNK), groups.split(CHUNK), strict=True):
            similarity = (texts @ u.T).masked_fill(own[:, None] == groups[None, :], -torch.inf)
            values, nearest = similarity.topk(self.shape[1], dim=1)
            rows.append(nearest.where(values > -torch.inf, -1))
        return torch.cat(rows)

    def rows(self, anchors: Tensor, others: Tensor) -> Tensor:
        """The rows of a batch: each anchor is followed by its negatives, as far as the batch lacks them.

        anchors: int64[a]. others: int64[n], all rows in random order; they fill the batch. Returns int64[size].
        """
        assert self.nearest is not None
        chosen: dict[int, None] = {}
        for anchor in anchors.tolist():
            chosen[anchor] = None
            fresh = (row for row in self.nearest[anchor].tolist() if row >= 0 and row not in chosen)
            chosen |= dict.fromkeys(_first(fresh, self.per_pair))
        missing = (row for row in others.tolist() if row not in chosen)
        chosen |= dict.fromkeys(_first(missing, self.size - len(chosen)))
        return torch.tensor(list(chosen)[: self.size])

    def save(self, folder: Path) -> None:
        """Write the state into `folder`, so that a resumed run sees the same batches."""
        if self.nearest is not None:
            save_file({"nearest": self.nearest}, folder / FILE)

    def restore(self, folder: Path) -> None:
        """Restore a state that `save` wrote. Raises CheckpointError if it does not fit or cannot be read."""
        try:
            self.nearest = load_file(folder / FILE)["nearest"]
        except Exception as error:  # safetensors raises any error of its parser
            raise CheckpointError(f"Cannot resume from {folder}: {error!r}. Remove it to start again.") from error


def _first(items: Iterator[int], count: int) -> list[int]:
    return [item for _, item in zip(range(count), items, strict=False)]
