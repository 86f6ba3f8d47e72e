"""Embeddings of all pairs by the base's CLIP, computed once, as the targets of feature distillation.

They never change, so no second model is kept: one image row and one text row per pair are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from unidiff_sdk.training.objective.encoder_model import EncoderModel

from .fitted_images import FittedImages
from .mapped_tensor import MEMORY_LIMIT, allocate_rows

__all__ = ["embed_images", "embed_texts"]

CHUNK = 64  # images or texts per forward pass


def embed_images(
    model: EncoderModel, clip_images: FittedImages, scratch: Path | None = None, *, memory_limit: int = MEMORY_LIMIT
) -> Tensor:
    """Embed n images: float[n, d] on the CPU, unit rows. scratch, memory_limit: see `allocate_rows`."""
    with model.evaluating():
        chunks = (model.f(model.to_clip(chunk.to(model.device).float() / 255)) for chunk in clip_images.split(CHUNK))
        return _collect(chunks, len(clip_images), scratch, memory_limit)


def embed_texts(
    model: EncoderModel, clip_ids: Tensor, scratch: Path | None = None, *, memory_limit: int = MEMORY_LIMIT
) -> Tensor:
    """Embed n captions, int64[n, tokens]: float[n, d] on the CPU, unit rows.

    scratch, memory_limit: see `allocate_rows`.
    """
    with model.evaluating():
        pooled = (model.pool_text(ids.to(model.device)) for ids in clip_ids.split(CHUNK))
        return _collect((model.text_embeds(states) for states in pooled), len(clip_ids), scratch, memory_limit)


def _collect(chunks: Iterator[Tensor], n: int, scratch: Path | None, memory_limit: int) -> Tensor:
    first = next(chunks)
    rows = allocate_rows(n, (first.shape[1],), scratch, memory_limit=memory_limit)
    rows[: len(first)] = first.cpu()
    for number, chunk in enumerate(chunks, start=1):
        rows[number * CHUNK : number * CHUNK + len(chunk)] = chunk.cpu()
    return rows
