"""The columns of stored items: their kinds, values, facets and order."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import UTC, datetime
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import (
    GEOHASH_EDGE,
    AllOf,
    AnyOf,
    Box,
    Clause,
    Compare,
    Not,
    column_path,
    path_steps,
    quoted_name,
    values_at,
)
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.protocol import CAPTION

__all__ = [
    "FacetCounts",
    "all_of_kind",
    "column_kinds",
    "count_cached",
    "elements",
    "facet_counts",
    "index_columns",
    "kind_of",
    "ordered",
    "value_at",
    "warn_about_missing_column",
]

_SAMPLE = 1024  # items that `column_kinds` reads
_COLUMN_SAMPLE = 16  # items with a column that decide its kind
_BATCH_SIZE = 1024
_ORDER_KINDS = {"number": "float", "date": "datetime"}  # kind of a column -> kind of its index
_FACET_KINDS = {"string": "keyword", "boolean": "bool"}
_INDEX_KINDS = {**_ORDER_KINDS, **_FACET_KINDS, "place": "geo"}

# The dates that the engine parses: a time zone needs seconds.
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)?)?)?$")


# ------------------------------------------------------------------------------------------------ one item


def value_at(payload: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None if the item lacks it. Dots, brackets and quotes as in a filter."""
    found = values_at(payload, column)
    if None in path_steps(column):
        return [element for value in found for element in elements(value)]
    return found[0] if found else None


def elements(value: Any) -> list[Any]:
    """The values of a column of one item: the elements of a list, a single value, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def kind_of(value: Any) -> str:
    """The kind of a value: "string", "number", "boolean", "date", "place" or "object"; "" for none.

    The kind of a list is that of its first element.
    """
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


# ------------------------------------------------------------------------------------------------ a store


def column_kinds(store: Store) -> dict[str, str]:
    """The columns of the store, sorted by name, and the kinds of each (`kind_of`), the most frequent first.

    They are those of 1,024 items, which are a random sample, because ids are hashed. A column of numbers and strings is
    "number, string".
    """
    kinds: dict[str, Counter[str]] = {}
    for record in next(store.scroll(_SAMPLE), []):
        for name, value in record.payload.items():
            if name != SYSTEM:
                kinds.setdefault(name, Counter()).update({kind_of(element) for element in elements(value)} - {""})
    return {
        name: ", ".join(sorted(counts, key=lambda kind: (-counts[kind], kind)))
        for name, counts in sorted(kinds.items())
        if counts
    }


class FacetCounts(dict[str | bool | int | float, int]):
    """The number of items with each value, most frequent first. True and 1 are different values, as in a filter.

    Args:
        counts: each value with its number of items.
    """

    def __init__(self, counts: Iterable[tuple[str | bool | int | float, int]]) -> None:
        self._entries = {_facet_key(value): (value, count) for value, count in counts}
        super().__init__(self._entries.values())

    def __getitem__(self, value: Any) -> int:
        try:
            return self._entries[_facet_key(value)][1]
        except KeyError:
            raise KeyError(value) from None

    def __contains__(self, value: Any) -> bool:
        return _facet_key(value) in self._entries

    def get(self, value: Any, default: Any = None) -> Any:
        return self._entries.get(_facet_key(value), (value, default))[1]

    def __iter__(self) -> Iterator[str | bool | int | float]:
        return (value for value, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return {_facet_key(value): count for value, count in self.items()} == {
            _facet_key(value): count for value, count in other.items()
        }

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{value!r}: {count}" for value, count in self.items()) + "}"


def _facet_key(value: Any) -> tuple[bool, Any]:
    """What identifies a value: Python takes True and 1 for the same key."""
    return isinstance(value, bool), value


def facet_counts(store: Store, column: str, where: Clause | None, limit: int) -> FacetCounts:
    """Count the items with each value of a column, most frequent first.

    A column of strings or booleans alone is counted by the engine. In every other column, and for captions, all values
    are read, because the engine keeps one index per column and counts only what that index holds.
    """
    path = column_path(column)
    kind = _FACET_KINDS.get(kind_of(_first_value(_items_with(store, column), column)))
    if kind and column != CAPTION and not _holds_other_values(store, path, kind):
        counts: Iterable[tuple[Any, int]] = store.facet(path, kind, limit=limit, where=where).items()
        return FacetCounts(sorted(counts, key=lambda entry: (-entry[1], str(entry[0]))))
    counter: Counter[tuple[bool, Any]] = Counter()
    for record in chain.from_iterable(store.scroll(_BATCH_SIZE, where)):
        values = elements(value_at(record.payload, column))
        counter.update({_facet_key(value) for value in values if isinstance(value, (str, int, float))})
    return FacetCounts((value, count) for (_, value), count in counter.most_common(limit))


def ordered(store: Store, order_by: str, where: Clause | None, limit: int, offset: int) -> list[Record]:
    """The items in the order of a column of numbers or dates; descending with "-" before its name.

    Of a column with numbers and dates, the kind with more items is ordered. A warning reports the items that are left
    out because their value is of another kind.

    Raises:
        OptionError: the column holds no numbers or dates, or holds lists.
        FilterError: `order_by` does not name a column.
    """
    column = order_by.removeprefix("-") if isinstance(order_by, str) else order_by
    records = _items_with(store, column)
    path = column_path(column)
    first = kind_of(_first_value(records, column))
    total = count_cached(store, Compare(path, "exists", True))
    counts: dict[str, int] = {}
    for kind in sorted(_ORDER_KINDS, key=lambda kind: kind != first):
        if sum(counts.values()) < total:
            counts[kind] = count_cached(store, all_of_kind(path, kind))
    kind = max(counts, key=lambda kind: counts[kind], default="")
    if not counts.get(kind) or any(isinstance(value_at(record.payload, column), list) for record in records):
        raise OptionError(f"order_by={order_by!r}: give a column of single numbers or dates")
    found = store.order_by(
        path, _ORDER_KINDS[kind], descending=order_by.startswith("-"), limit=limit, offset=offset, where=where
    )
    if any(isinstance(value_at(record.payload, column), list) for record in found):
        raise OptionError(f"order_by={order_by!r}: some items hold a list. Give a column of single numbers or dates.")
    if counts[kind] < total:
        warn(
            f"order_by={order_by!r}: {total - counts[kind]:,} of {total:,} items are left out, because their "
            f'"{column}" is not a {kind}. Correct their values to order them, too.'
        )
    return found


def index_columns(store: Store, columns: Sequence[str] | None) -> dict[str, str]:
    """Create the indexes of columns that searches would otherwise create. Captions get the index of hybrid searches.

    Args:
        store: the store.
        columns: names as in a filter. None: all columns of 1,024 random items.

    Returns:
        The kind of the index of each column: "keyword", "float", "bool", "datetime", "geo" or "text". Columns of
        objects, of numbers and dates, or without a value have none.

    Raises:
        FilterError: a name is not that of a column.
        ForbiddenError: the API key of a server may not create indexes.
    """
    if columns is None:
        columns = [quoted_name(name) for name in column_kinds(store)]
    created: dict[str, str] = {}
    for column in columns:
        path = column_path(column)
        values = chain.from_iterable(
            elements(value_at(record.payload, column)) for record in _items_with(store, column)
        )
        kinds = {"text"} if column == CAPTION else {_INDEX_KINDS.get(kind_of(value), "") for value in values} - {""}
        if kinds and not kinds >= {"float", "datetime"}:
            created[column] = min(kinds)
            store.index(path, created[column])
    return created


_EVERYWHERE = Box(-180.0, 180 - GEOHASH_EDGE, -90.0, 90 - GEOHASH_EDGE)
_ALL_OF_KIND: dict[str, tuple[tuple[str, Any], ...]] = {
    "number": (("gte", -sys.float_info.max),),
    "date": (("gte", datetime(1, 1, 1, tzinfo=UTC)),),
    "place": (("box", _EVERYWHERE),),
}
_BOOLEANS = (("eq", True), ("eq", False))


def all_of_kind(path: str, kind: str) -> Clause:
    """A filter for all items whose column holds a value of a kind. A date is a string, too."""
    if kind == "string":
        others = AnyOf((all_of_kind(path, "number"), all_of_kind(path, "boolean")))
        return AllOf((Compare(path, "exists", True), Not(others)))
    tests = tuple(Compare(path, op, value) for op, value in _ALL_OF_KIND.get(kind, _BOOLEANS))
    return AnyOf(tests)


def _holds_other_values(store: Store, path: str, kind: str) -> bool:
    """Whether any item has a value in a column that the index of a facet does not hold."""
    others: Clause
    if kind == "keyword":
        others = AnyOf((all_of_kind(path, "number"), all_of_kind(path, "boolean")))
    else:
        others = AllOf((Compare(path, "exists", True), Not(all_of_kind(path, "boolean"))))
    return count_cached(store, others) > 0


_MAX_COUNTS = 1000  # of one store: a server counts for columns that requests make up
_COUNT_SECONDS = 60.0  # until items are counted again, because other processes may change those on a server
_counts: WeakKeyDictionary[Store, dict[Clause, tuple[tuple[int, int], float, int]]] = WeakKeyDictionary()


def count_cached(store: Store, clause: Clause) -> int:
    """The number of items that match. It is counted again after a write, as it takes 0.3 s for 100,000 items."""
    state, now = (store.revision, store.count()), time.monotonic()
    known = _counts.setdefault(store, {})
    found = known.get(clause)
    if found is None or found[0] != state or now - found[1] > _COUNT_SECONDS:
        found = state, now, store.count(clause)
        if len(known) >= _MAX_COUNTS:
            known.clear()
        known[clause] = found
    return found[2]


def _items_with(store: Store, column: str) -> list[Record]:
    """A few items that have a column. Warns if there is none."""
    records = next(store.scroll(_COLUMN_SAMPLE, Compare(column_path(column), "exists", True)), [])
    if not records:
        warn_about_missing_column(store, column)
    return records


def warn_about_missing_column(store: Store, column: str) -> None:
    """Warn that no item has a column, unless the store is empty."""
    if store.count():
        known = ", ".join(map(quoted_name, column_kinds(store)))
        warn(f'No item has a column "{column}". Columns: {known}.')


def _first_value(records: list[Record], column: str) -> Any:
    """The first value of a column that has a kind."""
    return next((value for record in records if kind_of(value := value_at(record.payload, column))), None)
