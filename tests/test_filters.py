"""The filter language: its refusals, and its meaning against a brute-force evaluation in Python."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unidiff_sdk.errors import FilterError
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import OPERATORS, AllOf, AnyOf, Compare, Not, parse

# Local mode says that payload indexes have no effect on it.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")

# ------------------------------------------------------------------------------------------------ what a filter means

MISSING = object()


def matches(where: dict[str, Any], payload: dict[str, Any]) -> bool:
    """The filter language, evaluated in the plainest way."""
    return all(holds(key, condition, payload) for key, condition in where.items())


def holds(key: str, condition: Any, payload: dict[str, Any]) -> bool:
    if key == "and":
        return all(matches(part, payload) for part in condition)
    if key == "or":
        return any(matches(part, payload) for part in condition)
    if key == "not":
        return not matches(condition, payload)
    value: Any = payload
    for name in key.split("."):
        value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
    if condition is None:
        condition = {"null": True}
    elif isinstance(condition, list):
        condition = {"in": condition}
    elif not isinstance(condition, dict):
        condition = {"eq": condition}
    return all(compare(operator, operand, value) for operator, operand in condition.items())


def compare(operator: str, operand: Any, value: Any) -> bool:
    elements = value if isinstance(value, list) else [] if value is MISSING else [value]
    if operator == "null":
        return (any(element is None for element in elements)) == operand
    if operator == "exists":
        return (value is not MISSING and value is not None and value != []) == operand
    if operator == "ne":
        return not compare("eq", operand, value)
    if operator == "in":
        return any(compare("eq", choice, value) for choice in operand)
    if operator == "eq" and operand is None:
        return compare("null", True, value)
    if operator == "eq":
        return any(same(element, operand) for element in elements)
    numbers = [e for e in elements if isinstance(e, (int, float)) and not isinstance(e, bool)]
    test = {"gt": float.__gt__, "gte": float.__ge__, "lt": float.__lt__, "lte": float.__le__}[operator]
    return any(test(float(number), float(operand)) for number in numbers)


def same(element: Any, operand: Any) -> bool:
    kinds = [("b" if isinstance(x, bool) else "n" if isinstance(x, (int, float)) else "s") for x in (element, operand)]
    return kinds[0] == kinds[1] and element == operand


# ------------------------------------------------------------------------------------------------ strategies

KEYS = ("colour", "price", "tags", "in stock", "size.cm")
words = st.sampled_from(["red", "blue", "", "3", "größe"])
numbers = st.sampled_from([-1, 0, 1, 2, 3, 3.0, 2.5, -0.5, 1e9])
scalars = st.one_of(words, numbers, st.booleans())
values = st.one_of(scalars, st.none(), st.lists(st.one_of(scalars, st.none()), max_size=3))
payloads = st.builds(
    lambda flat, size: flat | ({} if size is MISSING else {"size": {"cm": size}}),
    st.dictionaries(st.sampled_from(KEYS[:4]), values, max_size=4),
    st.one_of(st.just(MISSING), values),
)
conditions = st.one_of(
    scalars,
    st.none(),
    st.lists(scalars, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), numbers, min_size=1, max_size=2),
    st.builds(lambda v: {"eq": v}, st.one_of(scalars, st.none())),
    st.builds(lambda v: {"ne": v}, st.one_of(scalars, st.none())),
    st.builds(lambda v: {"in": v}, st.lists(scalars, min_size=1, max_size=3)),
    st.builds(lambda op, v: {op: v}, st.sampled_from(["exists", "null"]), st.booleans()),
)
leaves = st.dictionaries(st.sampled_from(KEYS), conditions, min_size=1, max_size=2)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda parts: {"or": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"and": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda a, b: a | {"not": b}, leaves, inner),
    ),
    max_leaves=8,
)


@pytest.fixture(params=BACKENDS, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = request.param(tmp_path)
    yield store
    store.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(payloads, min_size=1, max_size=12), wheres=st.lists(filters, min_size=1, max_size=6))
def test_every_store_agrees_with_brute_force(store: Store, items: list[dict[str, Any]], wheres: list[Any]) -> None:
    """Indexes made for earlier examples stay, so that every kind of index also meets columns of mixed types."""
    records = [Record(str(uuid.uuid4()), np.eye(store.dim, dtype=np.float32)[0], payload) for payload in items]
    store.upsert(records)
    try:
        for where in wheres:
            expected = {r.id for r in records if matches(where, r.payload)}
            clause = parse(where)
            found = store.query(np.ones(store.dim, np.float32), limit=100, where=clause)
            assert {hit.id for hit in found} == expected, where
            assert store.count(clause) == len(expected)
    finally:
        store.delete([r.id for r in records])


# ------------------------------------------------------------------------------------------------ parsing


def test_no_filter() -> None:
    assert parse(None) is None
    assert parse({}) is None


def test_tree() -> None:
    tree = parse({"price": {"gte": 10, "lt": 80}, "brand": ["a", "b"], "not": {"colour": "red"}})
    assert tree == AllOf(
        (
            Compare("price", "gte", 10),
            Compare("price", "lt", 80),
            AnyOf((Compare("brand", "eq", "a"), Compare("brand", "eq", "b"))),
            Not(Compare("colour", "eq", "red")),
        )
    )


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("price", "price"),
        ("size.cm", "size.cm"),
        ("in stock", '"in stock"'),
        ('"size.cm"', '"size.cm"'),
        ("a[].b", "a[].b"),
    ],
)
def test_paths(key: str, path: str) -> None:
    assert parse({key: 1}) == Compare(path, "eq", 1)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"price": {"below": 3}}, "Valid operators: " + ", ".join(OPERATORS)),
        ({"price": {}}, "Valid operators"),
        ({"price": {"lt": "cheap"}}, "finite number"),
        ({"price": {"lt": True}}, "finite number"),
        ({"price": {"lt": float("nan")}}, "finite number"),
        ({"price": 2**70}, "finite number"),
        ({"price": b"x"}, "a string, a finite number"),
        ({"brand": []}, "at least one value"),
        ({"brand": {"exists": 1}}, "true or false"),
        ({"or": {"a": 1}}, "list of filters"),
        ({"or": []}, "list of filters"),
        ({"not": {}}, "empty filter"),
        ({"not": [1]}, "A filter is a dictionary"),
        ("red", "A filter is a dictionary"),
        ({3: 1}, "names of columns"),
        ({"": 1}, "names of columns"),
        ({"a..b": 1}, "not a column"),
        ({'a"b': 1}, "not a column"),
        ({"n": {"in": list(range(1025))}}, "at most 1,024"),
    ],
)
def test_refusals(where: Any, says: str) -> None:
    with pytest.raises(FilterError, match=says.replace("(", r"\(")):
        parse(where)


def test_depth_is_capped() -> None:
    where: dict[str, Any] = {"a": 1}
    for _ in range(1000):
        where = {"not": where}
    with pytest.raises(FilterError, match="nested more than 32 deep"):
        parse(where)
