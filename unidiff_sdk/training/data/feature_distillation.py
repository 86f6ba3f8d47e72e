"""The leash: what the base's CLIP made of every pair, once and for all, for the tuned one to stay near.

Feature distillation from the frozen base (as Li & Hoiem 2016, "Learning without forgetting", for features). The base's
embeddings do not change, so no second model is kept: two rows a pair are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from unidiff_sdk.training.objective.joint_model import JointModel

from .dataset_rows import empty_rows
from .images import Pictures

__all__ = ["embed_pictures", "embed_texts"]

AT_ONCE = 64


def embed_pictures(model: JointModel, clip_images: Pictures, scratch: Path | None) -> Tensor:
    """float[n, d] on the CPU, unit rows: f of n pictures. scratch: see `rows`."""
    device = model.alpha_bar.device
    with model.at_rest():
        found = (model.f(model.to_clip(chunk.to(device).float() / 255)) for chunk in clip_images.split(AT_ONCE))
        return _collect(found, len(clip_images), scratch)


def embed_texts(model: JointModel, clip_ids: Tensor, scratch: Path | None) -> Tensor:
    """float[n, d] on the CPU, unit rows: g of n captions. clip_ids: int64[n, tokens]."""
    device = model.alpha_bar.device
    with model.at_rest():
        pooled = (model.clip.text_model(ids.to(device)).pooler_output for ids in clip_ids.split(AT_ONCE))
        return _collect((model.text_embeds(state) for state in pooled), len(clip_ids), scratch)


def _collect(chunks: Iterator[Tensor], n: int, scratch: Path | None) -> Tensor:
    first = next(chunks)
    rows = empty_rows(n, (first.shape[1],), scratch)
    rows[: len(first)] = first.cpu()
    for number, chunk in enumerate(chunks, start=1):
        rows[number * AT_ONCE : number * AT_ONCE + len(chunk)] = chunk.cpu()
    return rows
