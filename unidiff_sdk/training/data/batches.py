"""The batches of a run: which pairs each step uses, and their model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.training.objective.batch import Batch
from unidiff_sdk.training.objective.encoder_model import EncoderModel
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator

from .buckets import BucketBatches
from .feature_distillation import embed_images, embed_texts
from .fitted_images import FittedImages, size_conditions
from .hard_negatives import HardNegatives
from .latents import LatentCache, encode_latents
from .mapped_tensor import MEMORY_LIMIT
from .pairs import Pairs

__all__ = ["BatchIndices", "BatchLoader"]


@dataclass(frozen=True)
class BatchIndices:
    """The pairs of a step or of a micro-batch.

    Attributes:
        rows: int64[m], rows of the data.
        mirror: bool[m], which images are mirrored.
    """

    rows: Tensor
    mirror: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, positions: Tensor) -> BatchIndices:
        """Some of the pairs. positions: int64[k]."""
        return BatchIndices(self.rows[positions], self.mirror[positions])


class BatchLoader:
    """The pairs of every step, in a new order each epoch. The batch of a step follows from the seed and its number.

    With several buckets, the images of a batch have one size.

    Each image passes through the VAE once, when the loader is created.

    Args:
        model: The base model. If it has a generator, its VAE encodes the images.
        pairs: The data.
        input_ids: int64[n, tokens], captions for the UNet's text encoders, see `prompt_ids`.
        groups: n keys. Pairs with equal keys have the same meaning.
        size: Pairs per step, m. Smaller if the data has fewer.
        flip: Mirror half of the images.
        seed: Seed of order and mirroring.
        cache: Latents on disk.
        clip_ids: int64[n, tokens], captions for CLIP's text tower, if it has another tokenizer.
        hard_negatives: Negatives of each pair, see `HardNegatives`. 0: random batches.
        feature_distillation: Embed all pairs by the model as it is now, as targets of feature distillation.
        scratch: Folder for tensors that do not fit in memory, see `allocate_rows`.
        memory_limit: Size, in bytes, up to which a tensor of all pairs is in memory.
    """

    def __init__(
        self,
        model: EncoderModel,
        pairs: Pairs,
        input_ids: Tensor,
        groups: Sequence[Any],
        *,
        size: int,
        flip: bool,
        seed: int,
        cache: LatentCache | None = None,
        clip_ids: Tensor | None = None,
        hard_negatives: int = 0,
        feature_distillation: bool = False,
        scratch: Path | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.model = model
        self.original_sizes, self.bucket_sizes = pairs.original_sizes, [bucket.images.size for bucket in pairs.buckets]
        self.fit = pairs.clip_images.fit
        self.clip_images = pairs.clip_images
        self.storage: dict[str, Any] = {"scratch": scratch, "memory_limit": memory_limit}
        storage = self.storage
        # The latents of a mirrored image are not its mirrored latents, so both are encoded.
        views = [bucket.images for bucket in pairs.buckets]
        encode = partial(_encode, model, cache, storage)
        self.latents = [encode(images) for images in views]
        self.mirrored = [encode(images.mirrored()) for images in views if flip]
        self._bucket_of, self._place_of = _places(pairs)
        self.input_ids = input_ids
        self.clip_ids = clip_ids
        numbers = {key: number for number, key in enumerate(dict.fromkeys(groups))}
        self.groups = torch.tensor([numbers[key] for key in groups])
        self.size = min(size, len(pairs))
        self.seed = seed
        rows = [bucket.rows for bucket in pairs.buckets]
        self.buckets = BucketBatches(rows, self.size, seed) if len(rows) > 1 else None
        self.negatives = HardNegatives(hard_negatives, self.size, len(pairs)) if hard_negatives else None
        self.base_embeddings: dict[str, Tensor] = {}
        if feature_distillation:
            self.base_embeddings = {
                "u": embed_images(model, pairs.clip_images, **storage),
                "v": embed_texts(model, input_ids if clip_ids is None else clip_ids, **storage),
            }
            if flip:
                self.base_embeddings["u mirrored"] = embed_images(model, pairs.clip_images.mirrored(), **storage)

    def latent_shape(self, indices: BatchIndices) -> tuple[int, ...]:
        """(c, h, w) of the latents of these pairs, which are of one bucket."""
        return tuple(self.latents[self._bucket(indices)].shape[1:])

    def indices(self, step: int) -> BatchIndices:
        """The pairs of a step, counted from 0.

        Without buckets, pairs left over at the end of an epoch are skipped in that epoch. With hard negatives, an epoch
        passes over the pairs that bring them, and `refresh_negatives` comes first.
        """
        rows = self.buckets.rows(step) if self.buckets else self._rows(step)
        if not self.mirrored:
            return BatchIndices(rows, torch.zeros(len(rows), dtype=torch.bool))
        random = torch.rand(len(rows), generator=seeded_generator(self.seed, Purpose.MIRROR, step))
        return BatchIndices(rows, random < 0.5)

    def load(self, indices: BatchIndices, samples: int) -> Batch:
        """The model inputs of these pairs, on the model's device. The first `samples` pairs have latents."""
        device = self.model.device
        rows, mirror = indices.rows, indices.mirror[:, None, None, None]
        pixels = self.clip_images[rows]
        if self.mirrored:
            pixels = torch.where(mirror, pixels.flip(-1), pixels)
        first = indices.select(torch.arange(samples))
        return Batch(
            clip_pixels=self.model.to_clip(pixels.to(device).float() / 255),
            latents=self.load_latents(first),
            input_ids=self.input_ids[rows].to(device),
            groups=self.groups[rows].to(device),
            clip_ids=None if self.clip_ids is None else self.clip_ids[rows].to(device),
            sizes=self.load_sizes(first),
            base_embeddings={name: rows.to(device) for name, rows in self._base_embeddings(indices).items()},
        )

    def load_latents(self, indices: BatchIndices) -> Tensor:
        """The latents of these pairs, which are of one bucket: float[m, c, h, w], on the model's device."""
        bucket, places = self._bucket(indices), self._place_of[indices.rows]
        latents = self.latents[bucket][places]
        if self.mirrored:
            latents = torch.where(indices.mirror[:, None, None, None], self.mirrored[bucket][places], latents)
        return latents.to(self.model.device)

    def load_sizes(self, indices: BatchIndices) -> Tensor:
        """The sizes of the images of these pairs, see `size_conditions`: float[m, 6], on the model's device."""
        size = self.bucket_sizes[self._bucket(indices)]
        sizes = [
            size_conditions(self.original_sizes[row], size, self.fit, mirrored=mirrored)
            for row, mirrored in zip(indices.rows.tolist(), indices.mirror.tolist(), strict=True)
        ]
        return torch.tensor(sizes, dtype=torch.float32, device=self.model.device).view(-1, 6)

    def refresh_negatives(self, step: int, processes: Processes, *, together: bool = False) -> None:
        """Find the hard negatives anew with the model as it is, if that is due before a step. All processes call it.

        together: All processes run the model, because each holds a share of its weights.
        """
        if self.negatives is None or not self.negatives.due(step):
            return
        nearest = torch.zeros(self.negatives.shape, dtype=torch.int64)
        if processes.is_main or together:
            u = embed_images(self.model, self.clip_images, **self.storage)
            v = embed_texts(self.model, self.input_ids if self.clip_ids is None else self.clip_ids, **self.storage)
        if processes.is_main:
            nearest = self.negatives.find(u, v, self.groups)
        self.negatives.nearest = processes.sum(nearest.to(processes.device)).cpu()

    def _rows(self, step: int) -> Tensor:
        """The rows of a step without buckets."""
        n, own = len(self.input_ids), self.negatives.anchors if self.negatives else self.size
        epoch, place = divmod(step, n // own)
        order = torch.randperm(n, generator=seeded_generator(self.seed, Purpose.ORDER, epoch))
        rows = order[place * own : (place + 1) * own]
        if self.negatives is None:
            return rows
        others = torch.randperm(n, generator=seeded_generator(self.seed, Purpose.NEGATIVES, step))
        return self.negatives.rows(rows, others)

    def _bucket(self, indices: BatchIndices) -> int:
        """The bucket of these pairs. That of no pair is the first."""
        return int(self._bucket_of[indices.rows[0]]) if len(indices) else 0

    def _base_embeddings(self, indices: BatchIndices) -> dict[str, Tensor]:
        found = {name: embeddings[indices.rows] for name, embeddings in self.base_embeddings.items()}
        if (mirrored := found.pop("u mirrored", None)) is not None:
            found["u"] = torch.where(indices.mirror[:, None], mirrored, found["u"])
        return found


def _encode(model: EncoderModel, cache: LatentCache | None, storage: Mapping[str, Any], images: FittedImages) -> Tensor:
    """The latents of images: float[n, c, h, w]. Empty, without a generator."""
    if isinstance(model, JointModel):
        return encode_latents(model, images, cache, **storage)
    return torch.zeros(len(images), 0, 0, 0)


def _places(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Of each pair: the number of its bucket, and its place there. Both int64[n]."""
    bucket_of, place_of = torch.empty(len(pairs), dtype=torch.int64), torch.empty(len(pairs), dtype=torch.int64)
    for number, bucket in enumerate(pairs.buckets):
        bucket_of[bucket.rows] = number
        place_of[bucket.rows] = torch.arange(len(bucket.rows))
    return bucket_of, place_of
