"""The filter language, compared with a brute-force evaluation in Python, and its errors."""

from __future__ import annotations

import enum
import math
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import BACKENDS

from unidiff_sdk.errors import FilterError
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import OPERATORS, AllOf, AnyOf, Box, Circle, Compare, Not, index_kinds, parse

# qdrant-client's local mode warns that payload indexes have no effect.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")

# ------------------------------------------------------------------------------------------------ what a filter means


def matches(where: dict[str, Any], payload: dict[str, Any]) -> bool:
    """Evaluate a filter without an engine."""
    return all(holds(key, condition, payload) for key, condition in where.items())


def holds(key: str, condition: Any, payload: dict[str, Any]) -> bool:
    if key == "and":
        return all(matches(part, payload) for part in condition)
    if key == "or":
        return any(matches(part, payload) for part in condition)
    if key == "not":
        return not matches(condition, payload)
    values = found_at(key, payload)
    if condition is None:
        condition = {"null": True}
    elif isinstance(condition, list):
        condition = {"in": condition}
    elif not isinstance(condition, dict):
        condition = {"eq": condition}
    return all(compare(operator, operand, values) for operator, operand in condition.items())


def found_at(key: str, value: Any) -> list[Any]:
    """The values that the rest of a key leads to: a quoted or plain name, [n] or [], one after the other."""
    if not key:
        return [value]
    step = re.match(r'\.?"(?P<quoted>[^"]+)"|\.?(?P<name>[^.\[]+)|\[(?P<position>\d*)\]', key)
    assert step is not None, key
    rest, name = key[step.end() :], step["quoted"] or step["name"]
    if name is not None:
        return found_at(rest, value[name]) if isinstance(value, dict) and name in value else []
    if not isinstance(value, list):
        return []
    chosen = value if step["position"] == "" else value[int(step["position"]) :][:1]
    return [found for element in chosen for found in found_at(rest, element)]


def compare(operator: str, operand: Any, values: list[Any]) -> bool:
    elements = [element for value in values for element in (value if isinstance(value, list) else [value])]
    if operator == "null":
        return (any(element is None for element in elements)) == operand
    if operator == "exists":
        return any(value is not None and value != [] for value in values) == operand
    if operator == "ne":
        return not compare("eq", operand, values)
    if operator == "in":
        return any(compare("eq", choice, values) for choice in operand)
    if operator == "eq" and operand is None:
        return compare("null", True, values)
    if operator == "eq":
        return any(same(element, operand) for element in elements)
    if operator == "contains":
        return any(words_of(operand) <= words_of(element) for element in elements if isinstance(element, str))
    if operator in ("near", "box"):
        places = [e for e in elements if isinstance(e, dict)]
        return any(lies_in(operand, place["lat"], place["lon"]) for place in places)
    test = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}[operator]
    if isinstance(operand, (str, date)):
        stored = [to_utc(e) for e in elements if isinstance(e, str) and re.match(r"\d{4}-", e)]
        return any(getattr(value, test)(to_utc(operand)) for value in stored)
    numbers = [e for e in elements if isinstance(e, (int, float)) and not isinstance(e, bool)]
    return any(getattr(float(number), test)(float(operand)) for number in numbers)


def words_of(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W_]+", text)}


def lies_in(area: dict[str, float], lat: float, lon: float) -> bool:
    """A box, or a circle by the haversine formula on a sphere of the Earth's mean radius."""
    if "radius" not in area:
        west, east = area["west"], area["east"]
        between = west <= lon <= east if west <= east else lon >= west or lon <= east
        return area["south"] <= lat <= area["north"] and between
    phi, other = math.radians(area["lat"]), math.radians(lat)
    half = math.sin((phi - other) / 2) ** 2
    half += math.cos(phi) * math.cos(other) * math.sin(math.radians(area["lon"] - lon) / 2) ** 2
    return 2 * 6_371_008.8 * math.asin(math.sqrt(half)) <= area["radius"]


def to_utc(value: str | date) -> datetime:
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def same(element: Any, operand: Any) -> bool:
    if isinstance(operand, date):
        return isinstance(element, str) and bool(re.match(r"\d{4}-", element)) and to_utc(element) == to_utc(operand)
    kinds = [("b" if isinstance(x, bool) else "n" if isinstance(x, (int, float)) else "s") for x in (element, operand)]
    return kinds[0] == kinds[1] and element == operand


# ------------------------------------------------------------------------------------------------ strategies

COLUMNS = ("color", "price", "tags", "in stock", "shop")
ELEMENTS = ("tags[0]", "tags[1]", "tags[]", '"in stock"[0]', "shop[].lat", "parts[].cm", "parts[0].cm[1]")
KEYS = (*COLUMNS, "size.cm", *ELEMENTS)
strings = st.sampled_from(["red", "blue", "", "3", "größe", "Red striped-dress", "a dress, RED!", "x_y 3"])
dates = st.sampled_from(
    ["2024-05-01", "2024-05-01T12:30:00", "2024-05-01T12:30:00+02:00", "2024-05-01T10:30:00Z", "2023-12-31 23:59:59.5"]
)
zones = st.sampled_from([None, UTC, timezone(timedelta(hours=2))])
datetimes = st.one_of(
    st.sampled_from([date(2024, 5, 1), date(2023, 12, 31)]),
    st.builds(lambda zone: datetime(2024, 5, 1, 12, 30, tzinfo=zone), zones),
)
numbers = st.sampled_from([-1, 0, 1, 2, 3, 3.0, 2.5, -0.5, 1e9])
scalars = st.one_of(strings, dates, numbers, st.booleans())
# No place is on a border for any of the radii. Two places are on the two sides of the antimeridian.
places = st.sampled_from(
    [
        {"lat": 52.52, "lon": 13.405},
        {"lat": 48.86, "lon": 2.35},
        {"lat": -17.7, "lon": 178.1},
        {"lat": -13.8, "lon": -171.8},
    ]
)
values = st.one_of(
    scalars, places, st.none(), st.lists(st.one_of(scalars, st.none()), max_size=3), st.lists(places, max_size=2)
)
sizes = st.fixed_dictionaries({}, optional={"cm": values})
payloads = st.builds(
    lambda flat, nested: flat | nested,
    st.dictionaries(st.sampled_from(COLUMNS), values, max_size=5),
    st.fixed_dictionaries({}, optional={"size": sizes, "parts": st.one_of(sizes, st.lists(sizes, max_size=2))}),
)
circles = st.builds(lambda place, radius: place | {"radius": radius}, places, st.sampled_from([0.5, 9e5, 2e6, 1e8]))
boxes = st.builds(
    lambda west, east, south: {"west": west, "east": east, "south": south, "north": south + 40},
    st.sampled_from([-180, 0, 10, 170]),
    st.sampled_from([-160, 5, 180]),
    st.sampled_from([-90, -50, 20, 50]),
)
choices = st.lists(st.one_of(scalars, datetimes), min_size=1, max_size=3)
searches = st.sampled_from(["red", "dress red", "DRESS", "größe", "strip", "y", "3"])
conditions = st.one_of(
    scalars,
    datetimes,
    st.none(),
    choices,
    st.dictionaries(
        st.sampled_from(["gt", "gte", "lt", "lte"]), st.one_of(numbers, dates, datetimes), min_size=1, max_size=2
    ),
    st.builds(lambda v: {"eq": v}, st.one_of(scalars, st.none())),
    st.builds(lambda v: {"ne": v}, st.one_of(scalars, datetimes, st.none())),
    st.builds(lambda v: {"in": v}, choices),
    st.builds(lambda v: {"contains": v}, searches),
    st.builds(lambda v: {"near": v}, circles),
    st.builds(lambda v: {"box": v}, boxes),
    st.builds(lambda op, v: {op: v}, st.sampled_from(["exists", "null"]), st.booleans()),
)
# Columns of one type each, with comparisons of that type: these detect most errors in a translation.
typed_payloads = st.fixed_dictionaries({"text": strings, "day": dates, "shop": places, "price": numbers})
typed_filters = st.one_of(
    st.builds(lambda v: {"text": {"contains": v}}, searches),
    st.builds(lambda v: {"text": v}, st.lists(strings, min_size=1, max_size=3)),
    st.builds(lambda op, v: {"day": {op: v}}, st.sampled_from(["gt", "gte", "lt", "lte"]), st.one_of(dates, datetimes)),
    st.builds(lambda v: {"day": v}, datetimes),
    st.builds(lambda v: {"shop": {"near": v}}, circles),
    st.builds(lambda v: {"shop": {"box": v}}, boxes),
    st.builds(lambda op, v: {"price": {op: v}}, st.sampled_from(["gt", "gte", "lt", "lte", "eq"]), numbers),
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


examples = st.one_of(
    st.tuples(st.lists(payloads, min_size=1, max_size=12), st.lists(filters, min_size=1, max_size=6)),
    st.tuples(st.lists(typed_payloads, min_size=3, max_size=12), st.lists(typed_filters, min_size=4, max_size=12)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(example=examples)
def test_store_agrees_with_brute_force(store: Store, example: tuple[list[dict[str, Any]], list[Any]]) -> None:
    """Indexes of earlier examples stay, so that every kind of index is also used on columns of mixed types."""
    items, wheres = example
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


def test_parse_none_and_empty_select_everything() -> None:
    assert parse(None) is None
    assert parse({}) is None


def test_parse_returns_a_tree() -> None:
    tree = parse({"price": {"gte": 10, "lt": 80}, "brand": ["a", "b"], "not": {"color": "red"}})
    assert tree == AllOf(
        (
            Compare("price", "gte", 10),
            Compare("price", "lt", 80),
            Compare("brand", "in", ("a", "b")),
            Not(Compare("color", "eq", "red")),
        )
    )


def test_parse_converts_dates_to_utc_and_splits_boxes_at_the_antimeridian() -> None:
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert parse({"day": {"gte": "2024-05-01T14:00+02:00"}}) == Compare("day", "gte", noon)
    assert parse({"day": {"gte": datetime(2024, 5, 1, 12)}}) == Compare("day", "gte", noon)
    assert parse({"day": date(2024, 5, 1)}) == Compare("day", "eq", noon.replace(hour=0))
    assert parse({"day": "2024-05-01"}) == Compare("day", "eq", "2024-05-01")
    assert parse({"shop": {"near": {"lat": 1, "lon": 2, "radius": 3}}}) == Compare("shop", "near", Circle(1, 2, 3))
    fiji = parse({"shop": {"box": {"west": 170, "east": -170, "south": -20, "north": 0}}})
    assert fiji == AnyOf(
        (Compare("shop", "box", Box(170, 180 - 1e-9, -20, 0)), Compare("shop", "box", Box(-180, -170, -20, 0)))
    )


def test_index_kinds_of_each_comparison() -> None:
    where = {
        "brand": ["a", "b"],
        "price": {"lt": 80},
        "sale": True,
        "added": {"gte": "2024-05-01"},
        "shop": {"near": {"lat": 1, "lon": 2, "radius": 3}},
        "text": {"contains": "red"},
        "color": {"exists": True},
    }
    clause = parse(where)
    assert clause and index_kinds(clause) == {
        "brand": "keyword",
        "price": "float",
        "sale": "bool",
        "added": "datetime",
        "shop": "geo",
        "text": "text",
    }


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("price", "price"),
        ("size.cm", "size.cm"),
        ("in stock", '"in stock"'),
        ('"size.cm"', '"size.cm"'),
        ("a[].b", "a[].b"),
        ("a[0][].b", "a[0][].b"),
        ('"in stock"[0]', '"in stock"[0]'),
        ("in stock[0]", '"in stock[0]"'),
        ("a[x]", '"a[x]"'),
        ("a[٣]", '"a[٣]"'),
    ],
)
def test_column_path_quotes_names(key: str, path: str) -> None:
    assert parse({key: 1}) == Compare(path, "eq", 1)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"price": {"below": 3}}, "Valid operators: " + ", ".join(OPERATORS)),
        ({"price": {}}, "Valid operators"),
        ({"price": {"lt": "cheap"}}, "finite number or a date"),
        ({"price": {"lt": True}}, "finite number"),
        ({"price": {"lt": float("nan")}}, "finite number"),
        ({"price": 2**70}, "finite number"),
        ({"price": b"x"}, "a string, a finite number"),
        ({"brand": []}, "at least one value"),
        ({"brand": {"in": ["x"] * 65_537}}, "at most 65,536"),
        ({"brand": {"exists": 1}}, "true or false"),
        ({"nor": [{"brand": "a"}]}, "joined by and, or, not"),
        ({"day": {"lt": "2024-13-01"}}, "a date such as"),
        ({"day": {"lt": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))}}, "outside the years"),
        ({"text": {"contains": " ?!"}}, "at least one word"),
        ({"text": {"contains": 3}}, "at least one word"),
        ({"text": {"contains": "x" * 100_000}}, "100,000 characters"),
        ({"shop": {"near": {"lat": 1, "lng": 2, "radius": 3}}}, 'the numbers {"lat": …, "lon": …, "radius": …}'),
        ({"shop": {"near": {"lat": 91, "lon": 2, "radius": 3}}}, "-90 to 90"),
        ({"shop": {"near": {"lat": 1, "lon": 2, "radius": 0}}}, "above 0"),
        ({"shop": {"near": {"lat": 1, "lon": 2, "radius": True}}}, "the numbers"),
        ({"shop": {"box": {"west": 1, "east": 2, "south": 3, "north": 2}}}, "south below north"),
        ({"shop": {"box": [1, 2, 3, 4]}}, "the numbers"),
        ({"or": {"a": 1}}, "list of filters"),
        ({"or": []}, "list of filters"),
        ({"not": {}}, "empty filter"),
        ({"not": [1]}, "A filter is a dictionary"),
        ("red", "A filter is a dictionary"),
        ({3: 1}, "names of columns"),
        ({"": 1}, "names of columns"),
        ({"a..b": 1}, "not a column"),
        ({"C:\\x": 1}, "a name has no backslash"),
        ({'"C:\\x"': {"exists": True}}, "a name has no backslash"),
        ({'a"b': 1}, "not a column"),
        ({'"a"b': 1}, "not a column"),
        ({"tags[" + "9" * 5000 + "]": 1}, "a position in a list has at most 9 digits"),
        ({"n": {"in": list(range(1025))}}, "at most 1,024"),
        ({"brand": ["a", "\ud83d"]}, "not valid Unicode"),
        ({"text": {"contains": "red \ud83d"}}, "not valid Unicode"),
        ({"\ud83d": 1}, "not valid Unicode"),
    ],
)
def test_parse_rejects(where: Any, says: str) -> None:
    with pytest.raises(FilterError, match=re.escape(says)):
        parse(where)


def test_parse_limits_depth() -> None:
    where: dict[str, Any] = {"a": 1}
    for _ in range(1000):
        where = {"not": where}
    with pytest.raises(FilterError, match="nested more than 32 deep"):
        parse(where)


def test_parse_limits_the_number_of_comparisons() -> None:
    with pytest.raises(FilterError, match="10,000 clauses; at most 1,024"):
        parse({"or": [{"a": n} for n in range(10_000)]})
    with pytest.raises(FilterError, match="10,000 clauses"):
        parse({f"column {n}": {"lt": n} for n in range(10_000)})


def test_parse_rejects_a_deep_value_with_a_short_message() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    for where in ({"a": value}, {"a": {"eq": value}}, {"a": {"near": value}}, {"not": value}, value):
        with pytest.raises(FilterError) as refused:
            parse(where)
        assert len(str(refused.value)) < 400


def test_in_accepts_ten_thousand_strings(store: Store) -> None:
    """A list of ids may be long: strings are one lookup."""
    vector = np.ones(store.dim, np.float32)
    store.upsert([Record(str(uuid.uuid4()), vector, {"sku": f"A-{n}"}) for n in range(20)])
    assert store.count(parse({"sku": [f"A-{n}" for n in range(5, 10_005)]})) == 15


def test_store_answers_filters_at_the_limits(store: Store) -> None:
    store.upsert([Record(str(uuid.uuid4()), np.ones(store.dim, np.float32), {"n": n}) for n in range(3)])
    deep: dict[str, Any] = {"n": 1}
    for _ in range(30):
        deep = {"not": deep}
    assert store.count(parse(deep)) == 1
    assert store.count(parse({"or": [{"n": n} for n in range(1024)]})) == 3


def test_box_reaches_the_poles_and_the_antimeridian(store: Store) -> None:
    """The engine's geo index finds nothing in a box that ends at exactly 90° or 180°."""
    places = [(lat, lon) for lat in (-89, -17, 48, 89) for lon in (-179, -90, 1, 178)]
    vector = np.ones(store.dim, np.float32)
    store.upsert([Record(str(uuid.uuid4()), vector, {"at": {"lat": lat, "lon": lon}}) for lat, lon in places])
    for west, east in ((-180, 180), (-180, 0), (0, 180), (170, 180), (-10, 10), (100, -100)):
        for south, north in ((-90, 90), (-90, 0), (0, 90), (-50, 50)):
            box = {"west": west, "east": east, "south": south, "north": north}
            assert store.count(parse({"at": {"box": box}})) == sum(lies_in(box, *place) for place in places), box


def test_column_of_numbers_and_dates_is_compared_with_both(store: Store) -> None:
    """An index of one kind would hide the values of the other kind."""
    vector = np.ones(store.dim, np.float32)
    store.upsert([Record(str(uuid.uuid4()), vector, {"mixed": value}) for value in (1, 5, "2024-05-01", "2024-06-01")])
    for _ in range(2):
        assert store.count(parse({"mixed": {"gt": 2}})) == 1
        assert store.count(parse({"mixed": {"gt": "2024-05-02"}})) == 1
        assert store.count(parse({"or": [{"mixed": {"lt": 2}}, {"mixed": {"lt": "2024-05-02"}}]})) == 2


class Brand(enum.StrEnum):
    ACME = "Acme"


@pytest.mark.parametrize(
    ("foreign", "plain"),
    [
        ({"brand": Brand.ACME}, {"brand": "Acme"}),
        ({"brand": np.array(["Acme", "Nord"])}, {"brand": ["Acme", "Nord"]}),
        ({"price": {"lt": np.float32(0.5)}}, {"price": {"lt": 0.5}}),
        ({"price": {"in": np.array([1, 2])}}, {"price": {"in": [1, 2]}}),
        ({"price": Decimal("79.90")}, {"price": 79.9}),
        ({"sale": np.bool_(True)}, {"sale": True}),
        ({"took": {"gte": timedelta(seconds=3)}}, {"took": {"gte": 3.0}}),
        ({"day": {"gte": np.datetime64("2026-03-05")}}, {"day": {"gte": date(2026, 3, 5)}}),
        ({"day": np.datetime64("2026-03-05T10:00:00", "ns")}, {"day": datetime(2026, 3, 5, 10)}),
    ],
    ids=repr,
)
def test_parse_converts_foreign_values_as_stored_ones(foreign: dict[str, Any], plain: dict[str, Any]) -> None:
    assert parse(foreign) == parse(plain)


@pytest.mark.parametrize(
    "value",
    [10**5000, np.datetime64("NaT"), Decimal("NaN"), np.float64("nan"), b"Acme", 1j],
    ids=lambda value: type(value).__name__,
)
def test_parse_refuses_values_that_no_column_holds(value: Any) -> None:
    for where in ({"price": value}, {"price": {"in": [value]}}, {"price": {"lt": value}}):
        with pytest.raises(FilterError):
            parse(where)
