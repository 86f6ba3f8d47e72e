"""Retrieval by CLIP embeddings: recall of images by captions and of captions by images.

An image is relevant to a caption if both have the same meaning: equal attributes on the synthetic catalogs, equal
normalized captions on all other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unidiff_sdk.datasets.synthetic import ATTRIBUTES
from unidiff_sdk.training.checkpoints.encoders.search_model import TrainableModel
from unidiff_sdk.training.data.captions import group_keys, tokenize
from unidiff_sdk.training.data.pairs import Pairs
from unidiff_sdk.training.objective.encoder_model import EncoderModel

from . import metrics

__all__ = [
    "Embeddings",
    "distinct_rows",
    "embed_pairs",
    "equal_keys",
    "meaning_keys",
    "retrieval_figures",
    "synthetic_attributes",
]

CHUNK = 64  # images or texts per forward pass
RECALL_AT = (1, 5, 10)

Embeddings = NDArray[np.float32]


@torch.no_grad()
def embed_pairs(model: EncoderModel, checkpoint: TrainableModel, pairs: Pairs) -> tuple[Embeddings, Embeddings]:
    """Embed n images and n captions by CLIP: (float32[n, d], float32[n, d]), unit rows."""
    device = model.device
    images = [model.f(model.to_clip(chunk.to(device).float() / 255)).cpu() for chunk in pairs.clip_images.split(CHUNK)]
    texts = [
        model.text_embeds(model.pool_text(ids.to(device))).cpu()
        for ids in tokenize(checkpoint.clip_tokenizer, pairs.captions).split(CHUNK)
    ]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


def retrieval_figures(u: Embeddings, v: Embeddings, keys: Sequence[tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """R@1, R@5, R@10 in [0, 1] and median rank, for "text_to_image" and "image_to_text".

    Args:
        u: float32[n, d], image embeddings.
        v: float32[n, d], caption embeddings.
        keys: n keys of the pairs' meanings, see `meaning_keys`.
    """
    relevant, similarity = equal_keys(keys), u @ v.T
    return {
        direction: {f"R@{k}": share for k, share in metrics.recall_at_k(scores, relevant, RECALL_AT).items()}
        | {"median_rank": metrics.median_rank(scores, relevant)}
        for direction, scores in {"text_to_image": similarity.T, "image_to_text": similarity}.items()
    }


def equal_keys(keys: Sequence[tuple[Any, ...]]) -> NDArray[np.bool_]:
    """Which of n keys are equal: bool[n, n]."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    group = np.array([numbers[key] for key in keys])
    return np.asarray(group[:, None] == group[None, :])


def synthetic_attributes(pairs: Pairs) -> list[dict[str, str]] | None:
    """Attributes of each product, if all rows come from the synthetic catalogs. Else None."""
    columns = [ATTRIBUTES.get(str(payload.get("catalog")), {}) for payload in pairs.payloads]
    if not all(names and set(names) <= set(row) for names, row in zip(columns, pairs.payloads, strict=True)):
        return None
    return [{name: str(row[name]) for name in names} for names, row in zip(columns, pairs.payloads, strict=True)]


def meaning_keys(pairs: Pairs, attributes: list[dict[str, str]] | None) -> list[tuple[Any, ...]]:
    """Key of each pair's meaning: its attributes if given, else its normalized caption."""
    return [tuple(values.items()) for values in attributes] if attributes else group_keys(pairs)


def distinct_rows(keys: Sequence[tuple[Any, ...]], n: int) -> list[int]:
    """The first n rows with different keys."""
    first: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())[:n]
