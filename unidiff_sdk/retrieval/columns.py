"""The columns of stored items: their kinds, values, facets and order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import Clause, Compare, column_path, path_segments, referenced_columns
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.protocol import CAPTION

__all__ = ["column_kinds", "elements", "facet_counts", "kind_of", "ordered", "value_at", "warn_about_unknown_columns"]

_SAMPLE = 256  # items that `column_kinds` reads
_COLUMN_SAMPLE = 16  # items with a column that decide its kind
_BATCH_SIZE = 1024
_ORDER_KINDS = {"number": "float", "date": "datetime"}  # kind of a column -> kind of its index
_FACET_KINDS = {"string": "keyword", "boolean": "bool"}

# The dates that the engine parses: a time zone needs seconds.
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)?)?)?$")


# ------------------------------------------------------------------------------------------------ one item


def value_at(payload: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None if the item lacks it. Dots and quotes as in a filter."""
    value: Any = payload
    for name in path_segments(column):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


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
    """The columns of the first 256 items, sorted by name, and the kind of each (`kind_of`)."""
    kinds: dict[str, str] = {}
    for record in next(store.scroll(_SAMPLE), []):
        for name, value in record.payload.items():
            if name != SYSTEM and (kind := kind_of(value)):
                kinds.setdefault(name, kind)
    return dict(sorted(kinds.items()))


def facet_counts(store: Store, column: str, where: Clause | None, limit: int) -> dict[str | bool | int | float, int]:
    """Count the items with each value of a column, most frequent first.

    Strings and booleans are counted by the engine; captions, numbers and dates one by one, because the engine keeps one
    index per column and filters on these need another one.
    """
    kind = kind_of(_first_value(_items_with(store, column), column))
    if kind in _FACET_KINDS and column != CAPTION:
        counts = store.facet(column_path(column), _FACET_KINDS[kind], limit=limit, where=where)
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0]))))
    counter: Counter[Any] = Counter()
    for record in chain.from_iterable(store.scroll(_BATCH_SIZE, where)):
        values = elements(value_at(record.payload, column))
        counter.update({value for value in values if isinstance(value, (str, int, float))})
    return dict(counter.most_common(limit))


def ordered(store: Store, order_by: str, where: Clause | None, limit: int, offset: int) -> list[Record]:
    """The items in the order of a column of numbers or dates; descending with "-" before its name.

    Raises:
        OptionError: the column holds other values, or lists.
        FilterError: `order_by` does not name a column.
    """
    column = order_by.removeprefix("-") if isinstance(order_by, str) else order_by
    records = _items_with(store, column)
    kind = _ORDER_KINDS.get(kind_of(_first_value(records, column)))
    if kind is None or any(isinstance(value_at(record.payload, column), list) for record in records):
        raise OptionError(f"order_by={order_by!r}: give a column of single numbers or dates")
    return store.order_by(
        column_path(column), kind, descending=order_by.startswith("-"), limit=limit, offset=offset, where=where
    )


def warn_about_unknown_columns(store: Store, where: Clause | None) -> None:
    """Warn if a filter that matched nothing names a column that no item has."""
    if where is None or not store.count():
        return
    for column in referenced_columns(where):
        if not store.count(Compare(column, "exists", True)):
            known = ", ".join(f'"{name}"' if "." in name else name for name in column_kinds(store))
            warn(f'No item has a column "{column}". Columns: {known}.')


def _items_with(store: Store, column: str) -> list[Record]:
    """A few items that have a column. Warns if there is none."""
    has_column = Compare(column_path(column), "exists", True)
    records = next(store.scroll(_COLUMN_SAMPLE, has_column), [])
    if not any(kind_of(value_at(record.payload, column)) for record in records):
        warn_about_unknown_columns(store, has_column)
    return records


def _first_value(records: list[Record], column: str) -> Any:
    """The first value of a column that has a kind."""
    return next((value for record in records if kind_of(value := value_at(record.payload, column))), None)
