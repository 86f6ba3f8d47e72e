"""Payload indexes: which columns are indexed, and creating an index when a query first needs one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import ForbiddenError

__all__ = ["Indexable", "PayloadIndexes"]


class Indexable(Protocol):
    """A store whose payload columns can be indexed."""

    def create_index(self, column: str, kind: str) -> None:
        """Create an index of a kind on a column (JSON path), replacing the existing one."""

    def drop_index(self, column: str) -> None:
        """Remove the index of a column."""

    def has_column(self, column: str) -> bool:
        """Whether any item has a value in a column."""


class PayloadIndexes:
    """The payload indexes of one store. The engine keeps at most one per column. Safe to use from several threads.

    Filters give the right result without an index, or with one of another kind, only more slowly. Ranges are the
    exception: an index of numbers hides the dates of the column from a range of dates, and the reverse.

    Args:
        existing: column (JSON path) -> kind: "keyword", "float", "bool", "datetime", "geo" or "text".
    """

    def __init__(self, existing: Mapping[str, str]) -> None:
        # None: filters use no index. The column holds, or is compared with, both numbers and dates, or the API key may
        # not create an index.
        self._kinds: dict[str, str | None] = dict(existing)
        self._lock = threading.Lock()

    def ensure_for_filter(self, wanted: Mapping[str, str | None], store: Indexable) -> None:
        """Index the columns of a filter that have no index, and drop an index that would hide values.

        With 20,000 items, an index makes a filter ten times faster and is built in 60 ms. A column that no item has
        gets none: whoever may search could otherwise create indexes, which are files and memory, without end.

        Args:
            wanted: column -> kind (`filters.index_kinds`).
            store: the store that is indexed.
        """
        changed = {
            column: kind
            for column, kind in wanted.items()
            if (store.has_column(column) if column not in self._kinds else self._hides_values(column, kind))
        }
        if not changed:
            return
        with self._lock:
            for column, kind in changed.items():
                if self._hides_values(column, kind):
                    store.drop_index(column)
                    self._kinds[column] = None
                elif column not in self._kinds:
                    self._kinds[column] = kind if kind and _is_created(store, column, kind) else None

    def ensure(self, column: str, kind: str, store: Indexable) -> None:
        """Create the index that a facet, a sort or a text ranking requires. It replaces one of another kind."""
        if self._kinds.get(column) == kind:
            return
        with self._lock:
            if self._kinds.get(column) != kind:  # another thread may have created it meanwhile
                store.create_index(column, kind)
                self._kinds[column] = kind

    def _hides_values(self, column: str, wanted: str | None) -> bool:
        existing = self._kinds.get(column)
        if existing not in ("float", "datetime"):
            return False
        return wanted is None or (wanted in ("float", "datetime") and wanted != existing)


def _is_created(store: Indexable, column: str, kind: str) -> bool:
    """Create an index for a filter. Returns False, with a warning, if the API key may not: filters only get slower."""
    try:
        store.create_index(column, kind)
    except ForbiddenError as error:
        warn(f"Filters on {column!r:.100} are slow, because they have no index. {error}")
        return False
    return True
