"""Points of a collection as records. Points that this SDK did not store are skipped and counted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import numpy as np

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.store.protocol import VECTOR, Record, ScoredRecord, Vector, VectorQuery

from .retries import ServerFault

__all__ = ["MAX_FOREIGN", "Points", "check_progress"]

MAX_FOREIGN = 1000
"""The most points of others that are skipped. Requests exclude them by id, so that pages are complete."""

_SHOWN = 3  # ids in a warning


class Points:
    """Reads points. Safe to use from several threads.

    Args:
        collection: the name of the collection, for messages.
        dim: the length of the vectors.
        is_record: (id, payload) to whether this SDK stored that point.

    Attributes:
        foreign: ids of the points that others stored, as far as they were met.
    """

    def __init__(self, collection: str, dim: int, is_record: Callable[[str, Any], bool]) -> None:
        self._collection, self._dim, self._is_record = collection, dim, is_record
        self.foreign: tuple[Any, ...] = ()
        self._reported = 0
        self._lock = threading.Lock()

    def records(self, points: Sequence[Any]) -> list[Record]:
        """The records among retrieved points. Raises ServerFault if too many points are others'."""
        records = []
        for point in points:
            id, payload, vector = str(point.id), point.payload or {}, self._vector(point)
            if vector is not None and _is_uuid(id) and self._is_record(id, payload):
                records.append(Record(id, vector, payload))
            else:
                self._note(point.id)
        return records

    def scored_records(self, points: Sequence[Any], search: VectorQuery) -> list[ScoredRecord]:
        """The records among the points of a search. Raises ServerFault if too many points are others'."""
        scored = []
        for point in points:
            id, payload = str(point.id), point.payload or {}
            vector = self._vector(point) if search.with_vectors else None
            if not math.isfinite(point.score):
                raise ValueError(f"the score of the point {id} is {point.score}")
            is_complete = vector is not None or not search.with_vectors
            if is_complete and _is_uuid(id) and (not search.with_payload or self._is_record(id, payload)):
                scored.append(ScoredRecord(id, point.score, payload, vector))
            else:
                self._note(point.id)
        return scored

    def warn_about_foreign(self) -> None:
        """Warn once about the points of others that were met since the last call."""
        with self._lock:
            new = self.foreign[self._reported :]
            self._reported = len(self.foreign)
        if new:
            more = ", …" if len(new) > _SHOWN else ""
            warn(
                f'{len(new):,} points of the collection "{self._collection}" are skipped, because this SDK did not '
                f"store them: {', '.join(repr(str(id)) for id in new[:_SHOWN])}{more}. Delete them, or move them to "
                "another collection."
            )

    def _note(self, id: Any) -> None:
        with self._lock:
            if id in self.foreign:
                return
            self.foreign = (*self.foreign, id)
            if len(self.foreign) > MAX_FOREIGN:
                raise ServerFault(
                    f"more than {MAX_FOREIGN:,} points were not stored by this SDK. Choose a collection of its own "
                    "for the catalog: Catalog(url, collection=…)"
                )

    def _vector(self, point: Any) -> Vector | None:
        """The vector of a point; None if it has none of the right name and shape."""
        value = point.vector.get(VECTOR) if isinstance(point.vector, dict) else None
        try:
            vector = np.asarray(value, np.float32)
        except (TypeError, ValueError, OverflowError):
            return None
        return vector if vector.shape == (self._dim,) and np.isfinite(vector).all() else None


def check_progress(ids: Sequence[Any], offset: Any, following: Any) -> None:
    """Raise ServerFault if a page of a scroll, which is ordered by id, does not lead to its end.

    Args:
        ids: the ids of the page.
        offset: the id that the page was requested from; None for the first page.
        following: the id that the next page starts with; None for the last page.
    """
    repeats = offset is not None and ids and _order(ids[0]) < _order(offset)
    stands_still = following is not None and not (ids and _order(ids[-1]) < _order(following))
    if repeats or stands_still:
        raise ServerFault(
            f"the server does not finish listing the points: after {str(offset)!r} it returned {len(ids)} points and "
            f"continues at {str(following)!r}. Check the server, and proxies that cache its responses"
        )


def _order(id: Any) -> tuple[bool, int]:
    """The position of a point in a scroll: numbers first. Raises ValueError for what is no id."""
    return (False, id) if isinstance(id, int) else (True, UUID(str(id)).int)


def _is_uuid(id: str) -> bool:
    return len(id) == 36
