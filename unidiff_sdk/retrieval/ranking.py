"""What happens to hits after the store has ranked them: variety, and one of each group."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from unidiff_sdk.store import Vector
from unidiff_sdk.store.filters import column_names

__all__ = ["diversify", "elements", "group_of", "kind_of", "value_at"]


def diversify(relevance: Vector, vectors: Vector, diversity: float, count: int) -> list[int]:
    """Pick items that are relevant and unlike one another: maximal marginal relevance (Carbonell and Goldstein 1998).

    Each pick maximizes (1 - diversity) * relevance - diversity * (greatest cosine to what is picked). Both are first
    stretched to the range 0 to 1 over these items, because cosines with a text lie far below those between pictures.

    Args:
        relevance: float32[n], the scores.
        vectors: unit vectors, float32[n, dim].
        diversity: 0 picks in the order of relevance, 1 for variety alone (after the most relevant one).
        count: how many to pick.

    Returns:
        Their indices, in the order of picking.
    """
    wanted = _stretched(relevance)
    likeness = _stretched(vectors @ vectors.T)
    picked: list[int] = []
    closest = np.zeros_like(wanted)
    remaining = np.ones(len(wanted), bool)
    while len(picked) < min(count, len(wanted)):
        gain = (1 - diversity) * wanted - diversity * closest
        best = int(np.argmax(np.where(remaining, gain, -np.inf) if picked else wanted))
        picked.append(best)
        remaining[best] = False
        closest = np.maximum(closest, likeness[best])
    return picked


def _stretched(values: Vector) -> Vector:
    if not values.size:
        return values
    low, high = values.min(), values.max()
    return cast(Vector, (values - low) / (high - low)) if high > low else np.zeros_like(values)


def value_at(payload: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None if there is none; dots and quotes as in a filter."""
    value: Any = payload
    for name in column_names(column):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def group_of(payload: Mapping[str, Any], column: str) -> str | None:
    """What two items of one group have in common; None for an item that stands alone, lacking the column."""
    value = value_at(payload, column)
    return None if value is None else json.dumps(value, sort_keys=True)


def elements(value: Any) -> list[Any]:
    """The values that a column of one item holds: its list, itself, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def kind_of(value: Any) -> str:
    """What a column holds, by the value of one item: "string", "number", "boolean", "date", "place" or "object"."""
    first = next((element for element in elements(value) if element is not None), None)
    match first:
        case None:
            return ""
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "date" if _DATE.match(first) else "string"
        case {"lat": _, "lon": _}:
            return "place"
        case _:
            return "object"


# What the engine reads as a moment: without seconds, it takes no time zone.
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)?)?)?$")
