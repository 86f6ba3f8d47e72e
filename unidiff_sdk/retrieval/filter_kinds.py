"""Warnings about filters that cannot match: a column that no item has, or values of another kind than the column's."""

from __future__ import annotations

from datetime import datetime
from weakref import WeakKeyDictionary

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.store import Store
from unidiff_sdk.store.filters import Box, Circle, Clause, Compare, comparisons

from .columns import (
    all_of_kind,
    count_cached,
    elements,
    kind_of,
    value_at,
    warn_about_missing_column,
)

__all__ = ["warn_about_filter"]

_SAMPLE = 16  # items with a column that are read to find a kind, before all items are counted

# Kinds that a column has held. A kind is looked for again only as long as it was not found.
_found: WeakKeyDictionary[Store, set[tuple[str, str]]] = WeakKeyDictionary()


def warn_about_filter(store: Store, where: Clause | None) -> None:
    """Warn about the parts of a filter that no item can match, whatever the whole filter matches.

    A misspelled column matches nothing inside "or", and everything inside "not". The operators `exists` and `null` are
    not checked.
    """
    if where is None:
        return
    for test in dict.fromkeys(comparisons(where)):
        wanted = _compared_kind(test)
        if not wanted or _holds(store, test.key, wanted):
            continue
        if not store.count():
            return
        if not count_cached(store, Compare(test.key, "exists", True)):
            warn_about_missing_column(store, test.key)
            continue
        held = _held_kinds(store, test.key)
        warn(
            f'"{test.op}" compares the column "{test.key}" with a {wanted}, and no item has a {wanted} there: its '
            f"values are of the kind {held}. Compare it with a {held}, or correct the values."
        )


def _compared_kind(test: Compare) -> str:
    """The kind of value that a comparison can match; "" if it is not checked."""
    match test.value:
        case _ if test.op in ("exists", "null"):
            return ""
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case datetime():
            return "date"
        case Circle() | Box():
            return "place"
    return "string"


def _holds(store: Store, path: str, kind: str) -> bool:
    """Whether any item has a value of a kind in a column. A date is a string, too."""
    found = _found.setdefault(store, set())
    if (path, kind) not in found and (
        kind in _sampled_kinds(store, path) or count_cached(store, all_of_kind(path, kind))
    ):
        found.add((path, kind))
    return (path, kind) in found


def _sampled_kinds(store: Store, path: str) -> set[str]:
    records = next(store.scroll(_SAMPLE, Compare(path, "exists", True)), [])
    kinds = {kind_of(element) for record in records for element in elements(value_at(record.payload, path))}
    return kinds | ({"string"} if "date" in kinds else set())


def _held_kinds(store: Store, path: str) -> str:
    return " or ".join(sorted(_sampled_kinds(store, path) - {""})) or "other"
