"""One comparison of a filter as a condition of qdrant-client."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from qdrant_client import models

from unidiff_sdk.store.filters import Box, Circle, Compare, range_bounds

__all__ = ["condition"]


def condition(test: Compare) -> Any:
    """The condition for one comparison; "empty" is Qdrant's opposite of "exists"."""
    key, op, value = test.key, test.op, test.value
    if op == "empty":
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
    if op == "null":
        return models.IsNullCondition(is_null=models.PayloadField(key=key))
    match value:
        case bool():
            return models.FieldCondition(key=key, match=models.MatchValue(value=value))
        case str():
            match = models.MatchText(text=value) if op == "contains" else models.MatchValue(value=value)
            return models.FieldCondition(key=key, match=match)
        case tuple():
            return models.FieldCondition(key=key, match=models.MatchAny(any=list(value)))
        case datetime():
            return models.FieldCondition(key=key, range=models.DatetimeRange(**dict.fromkeys(range_bounds(op), value)))
        case Circle(lat, lon, radius):
            center = models.GeoPoint(lat=lat, lon=lon)
            return models.FieldCondition(key=key, geo_radius=models.GeoRadius(center=center, radius=radius))
        case Box(west, east, south, north):
            box = models.GeoBoundingBox(
                top_left=models.GeoPoint(lat=north, lon=west), bottom_right=models.GeoPoint(lat=south, lon=east)
            )
            return models.FieldCondition(key=key, geo_bounding_box=box)
        case _:
            limits = dict.fromkeys(range_bounds(op), float(value))
            return models.FieldCondition(key=key, range=models.Range(**limits))
