"""One comparison of a filter as a condition of Qdrant Edge."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import qdrant_edge as edge

from unidiff_sdk.store.filters import Box, Circle, Compare, range_bounds

__all__ = ["condition"]


def condition(test: Compare) -> Any:
    """The condition for one comparison; "empty" is Qdrant's opposite of "exists"."""
    key, op, value = test.key, test.op, test.value
    if op == "empty":
        return edge.IsEmptyCondition(key)
    if op == "null":
        return edge.IsNullCondition(key)
    match value:
        case bool():
            # The binding converts a Python bool to an integer, which matches nothing. It accepts numpy's bool.
            return edge.FieldCondition(key, match=edge.MatchValue(np.bool_(value)))  # type: ignore[arg-type]
        case str():
            match = edge.MatchText(value) if op == "contains" else edge.MatchValue(value)
            return edge.FieldCondition(key, match=match)
        case tuple():
            return edge.FieldCondition(key, match=edge.MatchAny(list(value)))
        case datetime():
            date = value.isoformat(timespec="microseconds")
            return edge.FieldCondition(key, range=edge.RangeDateTime(**dict.fromkeys(range_bounds(op), date)))
        case Circle(lat, lon, radius):
            return edge.FieldCondition(key, geo_radius=edge.GeoRadius(edge.GeoPoint(lon, lat), radius))
        case Box(west, east, south, north):
            corners = edge.GeoPoint(west, north), edge.GeoPoint(east, south)
            return edge.FieldCondition(key, geo_bounding_box=edge.GeoBoundingBox(*corners))
        case _:
            return edge.FieldCondition(key, range=edge.RangeFloat(**dict.fromkeys(range_bounds(op), float(value))))
