"""Reorder hits: maximal marginal relevance, and grouping by a column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from unidiff_sdk.retrieval.columns import value_at
from unidiff_sdk.store import Vector

__all__ = ["diversify", "group_of"]


def diversify(relevance: Vector, vectors: Vector, diversity: float, count: int) -> list[int]:
    """Select relevant and mutually different items: maximal marginal relevance (Carbonell and Goldstein 1998).

    Each step selects the item with the highest (1 - diversity) * relevance - diversity * (highest cosine to the
    selected items). Both terms are first scaled to the range 0 to 1 over these items, because cosines with a text are
    far smaller than those between images.

    Args:
        relevance: the scores, float32[n].
        vectors: unit vectors, float32[n, dim].
        diversity: 0 selects by relevance alone; 1 by variety alone, after the most relevant item.
        count: the number of items to select.

    Returns:
        Indices, in the order of selection.
    """
    scores = _scaled(relevance)
    similarity = _scaled(vectors @ vectors.T)
    selected: list[int] = []
    closest = np.zeros_like(scores)  # of each item, the highest similarity to a selected one
    remaining = np.ones(len(scores), bool)
    while len(selected) < min(count, len(scores)):
        gain = (1 - diversity) * scores - diversity * closest
        best = int(np.argmax(np.where(remaining, gain, -np.inf) if selected else scores))
        selected.append(best)
        remaining[best] = False
        closest = np.maximum(closest, similarity[best])
    return selected


def group_of(payload: Mapping[str, Any], column: str) -> str | None:
    """The key of an item's group; None for an item without the column, which is a group by itself."""
    value = value_at(payload, column)
    return None if value is None else json.dumps(value, sort_keys=True)


def _scaled(values: Vector) -> Vector:
    """Values scaled to the range 0 to 1."""
    if not values.size:
        return values
    low, high = values.min(), values.max()
    return cast(Vector, (values - low) / (high - low)) if high > low else np.zeros_like(values)
