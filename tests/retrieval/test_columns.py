"""Columns: facets, order, kinds and names."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from qdrant_client import QdrantClient
from support.backends import BACKENDS, DIM, record

from unidiff_sdk import Catalog, FilterError, OptionError
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.retrieval.columns import FacetCounts, count_cached
from unidiff_sdk.retrieval.filter_kinds import warn_about_filter
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.server.store import ServerStore


def test_facets_count_the_values_of_filtered_items() -> None:
    chosen = products("fashion-woman", 60, seed=4)
    with Catalog() as catalog:
        catalog.add([render(p) for p in chosen], payloads=[{"catalog": p.catalog, **p.attributes} for p in chosen])
        counts = catalog.facets("type", where={"pattern": "solid"})
        expected = Counter(p.attributes["type"] for p in chosen if p.attributes["pattern"] == "solid")
        assert counts == dict(expected) and list(counts.values()) == sorted(counts.values(), reverse=True)
        most_common = Counter(p.attributes["type"] for p in chosen).most_common(2)
        assert list(catalog.facets("type", limit=2).values()) == [n for _, n in most_common]
        with pytest.warns(UserWarning, match='No item has a column "typ". Columns: catalog, colour'):
            assert catalog.facets("typ") == {}


def test_quoted_column_names_work_wherever_columns_are_named() -> None:
    images = [render(product) for product in products("fashion-man", 3, seed=1)]
    rows: list[dict[str, Any]] = [
        {"size.cm": 31, "size.eu": "M", "size": {"cm": 1, "eu": "nested"}},
        {"size.cm": 30, "size.eu": "M"},
        {"size.cm": 32, "size.eu": "L"},
    ]
    with Catalog() as catalog:
        catalog.add(images, ids=[0, 1, 2], payloads=[{"catalog": "fashion-man", **row} for row in rows])
        assert catalog.facets('"size.eu"') == {"M": 2, "L": 1} and catalog.facets("size.eu") == {"nested": 1}
        assert catalog.facets('"size.cm"') == {31: 1, 30: 1, 32: 1} and catalog.facets("size.cm") == {1: 1}
        assert [hit.id for hit in catalog.browse(order_by='"size.cm"')] == [1, 0, 2]
        hits = catalog.search("shirt", group_by='"size.eu"')
        assert sorted(hit.payload["size.eu"] for hit in hits) == ["L", "M"]
        assert {hit.id for hit in catalog.search("shirt", where={'"size.cm"': {"gt": 30}})} == {0, 2}


def test_elements_of_lists_work_wherever_columns_are_named() -> None:
    images = [render(product) for product in products("fashion-man", 3, seed=1)]
    rows: list[dict[str, Any]] = [
        {"tags": ["new", "sale"], "parts": [{"name": "lid", "cm": 3}, {"name": ["rim", "lid"]}]},
        {"tags": ["old", "sale"], "parts": [{"name": "base", "cm": 2}]},
        {"tags": "new", "tags[0]": "old"},
    ]
    with Catalog() as catalog:
        catalog.add(images, ids=[0, 1, 2], payloads=[{"catalog": "fashion-man", **row} for row in rows])
        assert catalog.facets("tags[0]") == {"new": 1, "old": 1} and catalog.facets('"tags[0]"') == {"old": 1}
        assert catalog.facets("tags[1]", where={"tags[0]": "new"}) == {"sale": 1}
        assert catalog.facets("parts[].name") == {"lid": 1, "rim": 1, "base": 1}
        assert [hit.id for hit in catalog.browse(order_by="parts[0].cm")] == [1, 0]
        with pytest.raises(OptionError, match="give a column of single numbers or dates"):
            catalog.browse(order_by="parts[].cm")
        hits = catalog.search("shirt", group_by="tags[1]")
        assert len(hits) == 2 and 2 in [hit.id for hit in hits]
        assert catalog.create_indexes(["tags[0]", "parts[].cm"]) == {"tags[0]": "keyword", "parts[].cm": "float"}
        assert catalog.count({"parts[].cm": {"gt": 2}, "tags[0]": "new"}) == 1


def test_counts_follow_what_another_process_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    client, clause = QdrantClient(":memory:"), parse({"size": {"exists": True}})
    assert clause is not None
    store, other = (ServerStore(client, "shop", DIM, "aaaa") for _ in range(2))
    store.upsert([record(1, size="M")])
    assert count_cached(store, clause) == 1
    other.upsert([record(1)])
    later = time.monotonic() + 61
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert count_cached(store, clause) == 0


def test_columns_of_every_kind_are_counted_ordered_and_described() -> None:
    images = [render(product) for product in products("fashion-man", 4, seed=1)]
    rows: list[dict[str, Any]] = [
        {"price": 20, "tags": ["new", "sale"], "day": "2024-05-02", "sale": True, "at": {"lat": 1.0, "lon": 2.0}},
        {"price": 9.5, "tags": ["new"], "day": "2024-05-01T10:00:00", "sale": False, "size": {"cm": 3}},
        {"price": 20, "tags": [], "day": "2024-05-03", "sale": True},
        {},
    ]
    with Catalog() as catalog:
        catalog.add(images, ids=[0, 1, 2, 3], payloads=[{"catalog": "fashion-man", **row} for row in rows])
        assert catalog.facets("price") == {20: 2, 9.5: 1}
        assert catalog.facets("tags") == {"new": 2, "sale": 1}
        assert catalog.facets("sale") == {True: 2, False: 1}
        assert catalog.facets("size.cm") == {3: 1}
        assert [hit.id for hit in catalog.browse(order_by="-day")] == [2, 0, 1]
        assert [hit.id for hit in catalog.browse(order_by="price", limit=1)] == [1]
        assert {hit.id for hit in catalog.browse(order_by="-price", limit=2)} == {0, 2}
        assert len(catalog.browse()) == 4 and len(catalog.browse(offset=3)) == 1
        assert [hit.score for hit in catalog.browse(limit=1)] == [1.0]
        for column in ("tags", "at", "sale"):
            with pytest.raises(OptionError, match="give a column of single numbers or dates"):
                catalog.browse(order_by=column)
        with pytest.raises(FilterError, match="3 is not a column"):
            catalog.browse(order_by=3)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match='No item has a column "prize"'):
            assert len(catalog.search("red", where={"prize": {"lt": 80}})) == 0
        with pytest.warns(UserWarning, match='No item has a column "size.inch"'):
            assert catalog.count({"size.inch": 3}) == 0
        assert catalog.count({"price": 7}) == 0
        assert catalog.info()["columns"] == {
            "at": "place",
            "catalog": "string",
            "day": "date",
            "id": "number",
            "price": "number",
            "sale": "boolean",
            "size": "object",
            "tags": "string",
        }


@pytest.mark.parametrize(
    ("day", "kind"),
    [
        ("2026-03-01", "date"),
        ("2026-03-01T12:30", "date"),
        ("2026-03-01 12:30:00.5+05:30", "date"),
        ("2026-03-01T12:30:00Z", "date"),
        ("2026-03-01T12:30Z", "string"),
        ("20260301", "string"),
        ("2026-03-01T", "string"),
    ],
)
def test_date_columns_support_range_filters(day: str, kind: str) -> None:
    with Catalog() as catalog:
        catalog.add(Image.new("RGB", (16, 16)), payloads=[{"day": day, "catalog": "fashion-man"}])
        assert catalog.info()["columns"]["day"] == kind
        assert catalog.count({"day": {"gte": "2026-01-01"}}) == (kind == "date")
        assert catalog.facets("day") == {day: 1}


def test_browse_refuses_to_order_by_lists() -> None:
    with Catalog() as catalog:
        images = [Image.new("RGB", (16, 16), (9, n, n)) for n in range(3)]
        catalog.add(images, payloads=[{"n": n, "catalog": "fashion-man"} for n in (3, [1, 5], 2)])
        with pytest.raises(OptionError, match="give a column of single numbers or dates"):
            catalog.browse(order_by="n")


def filled(values: list[Any], name: str = "value") -> Catalog:
    """A catalog with an item for each value. None: the item lacks the column."""
    catalog = Catalog()
    images = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in range(len(values))]
    payloads = [{"catalog": "fashion-man", **({} if value is None else {name: value})} for value in values]
    catalog.add(images, ids=list(range(len(values))), payloads=payloads)
    return catalog


@pytest.mark.parametrize(
    "values",
    [
        ["S", "M", 38, 40, 38, "S"] * 6,
        [*["S"] * 40, 38],
        [38, *["S"] * 40],
        [*[True] * 30, "yes", 1, False, 0, 0.5],
        [*[1] * 30, True],
        [["new", 2026], ["new"], "new", [True]] * 8,
        [*["2026-03-01"] * 20, "soon", 5],
    ],
    ids=lambda values: repr(values[:6]),
)
def test_facets_count_every_value_of_a_mixed_column(values: list[Any]) -> None:
    every = [value for entry in values for value in (entry if isinstance(entry, list) else [entry])]
    expected = Counter((type(value), value) for value in every)
    with filled(values) as catalog:
        counts = catalog.facets("value")
        assert {(type(value), value): count for value, count in counts.items()} == dict(expected)
        assert sum(counts.values()) == len(every) and list(counts.values()) == sorted(counts.values(), reverse=True)
        assert catalog.facets("value") == counts, "counted again after the index exists"


def test_facets_see_a_value_of_another_kind_that_is_added_later() -> None:
    with filled(["S"] * 20) as catalog:
        assert catalog.facets("value") == {"S": 20}
        catalog.add(Image.new("RGB", (16, 16), "blue"), ids=0, payloads={"catalog": "fashion-man", "value": 38})
        assert catalog.facets("value") == {"S": 19, 38: 1}


def test_facet_counts_behave_as_a_dictionary_in_which_true_is_not_one() -> None:
    counts = FacetCounts([("yes", 3), (True, 2), (1, 1)])
    assert (counts[True], counts[1], counts["yes"], counts.get("no"), len(counts)) == (2, 1, 3, None, 3)
    assert list(counts) == ["yes", True, 1] and list(counts.values()) == [3, 2, 1]
    assert 1 in counts and 0 not in counts and False not in counts
    assert counts == FacetCounts([(1, 1), (True, 2), ("yes", 3)]) and counts != {"yes": 3, True: 2}
    assert FacetCounts([(True, 2)]) != {1: 2} and FacetCounts([("a", 1)]) == {"a": 1} and FacetCounts([]) == {}
    assert repr(counts) == "{'yes': 3, True: 2, 1: 1}"
    assert json.loads(json.dumps(FacetCounts([("a", 2), ("b", 1)]))) == {"a": 2, "b": 1}
    with pytest.raises(KeyError, match="2"):
        counts[2]


@pytest.mark.parametrize("odd", [0, 7, 19])
@pytest.mark.parametrize("other", [20260301, "soon"])
def test_the_order_of_a_column_does_not_depend_on_which_item_is_odd(odd: int, other: Any) -> None:
    values: list[Any] = [f"2026-03-{day + 1:02}" for day in range(20)]
    values[odd] = other
    with filled(values) as catalog:
        with pytest.warns(UserWarning, match=r'1 of 20 items are left out, because their "value" is not a date'):
            hits = catalog.browse(order_by="value", limit=50)
        assert [hit.id for hit in hits] == [n for n in range(20) if n != odd]


def test_an_order_refuses_a_list_behind_the_first_items() -> None:
    with filled([*range(30), [1, 2]]) as catalog, pytest.raises(OptionError, match="some items hold a list"):
        catalog.browse(order_by="value", limit=50)


@pytest.mark.parametrize(
    ("where", "kinds"),
    [
        ({"value": {"lt": 100}}, "with a number, and no item has a number there: its values are of the kind string"),
        ({"value": True}, "with a boolean"),
        ({"value": {"gte": "2026-01-01"}}, "with a date"),
    ],
)
def test_a_filter_of_another_kind_than_the_column_is_reported(where: dict[str, Any], kinds: str) -> None:
    with filled(["10,5", "9,9"]) as catalog, pytest.warns(UserWarning, match=kinds):
        assert catalog.count(where) == 0
    with filled([10, 9]) as catalog:
        with pytest.warns(UserWarning, match="with a string, and no item has a string there"):
            assert not catalog.browse(where={"value": ["10", "9"]})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert catalog.count({"value": {"lt": 5}}) == 0, "a filter of the same kind that matches nothing is silent"


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"not": {"price": {"lt": 100}}}, '"lt" compares the column "price" with a number'),
    ({"or": [{"price": {"gte": 3}}, {"brand": "Acme"}]}, '"gte" compares the column "price" with a number'),
    ({"or": [{"brand": "Acme"}, {"prize": 3}]}, 'No item has a column "prize"'),
    ({"brand": ["Acme", 7]}, '"eq" compares the column "brand" with a number'),
    ({"stock": [7, "7", "8"]}, '"in" compares the column "stock" with a string'),
    ({"not": {"stock": {"contains": "seven"}}}, '"contains" compares the column "stock" with a string'),
    ({"stock": {"ne": True}}, '"eq" compares the column "stock" with a boolean'),
    ({"not": {"stock": {"lt": "2026-01-01"}}}, '"lt" compares the column "stock" with a date'),
    (
        {"not": {"brand": {"near": {"lat": 1, "lon": 2, "radius": 9}}}},
        '"near" compares the column "brand" with a place',
    ),
]
POSSIBLE: list[dict[str, Any]] = [
    {"price": "10,5", "brand": ["Acme", "Nord"], "stock": {"lt": 0}, "sale": False, "day": {"lt": "2020-01-01"}},
    {"day": "2026-03-01", "at": {"near": {"lat": 50, "lon": 50, "radius": 1}}, "tags": ["x", 38]},
    {"not": {"or": [{"size.cm": 4}, {"gone": {"exists": True}}, {"gone": None}]}},
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
def test_a_part_of_a_filter_that_no_item_can_match_is_reported_whatever_the_filter_matches(
    backend: Any, tmp_path: Path
) -> None:
    columns: dict[str, Any] = {"price": "10,5", "brand": "Acme", "stock": 7, "sale": True, "day": "2026-03-01"}
    columns |= {"at": {"lat": 1.0, "lon": 2.0}, "tags": ["new", 38], "size": {"cm": 3}, SYSTEM: {}}
    store = backend(tmp_path)
    try:
        warn_about_filter(store, parse(IMPOSSIBLE[0][0]))  # an empty store is no reason to warn
        store.upsert([record(number, **columns) for number in range(20)])
        for where, message in IMPOSSIBLE:
            for _ in range(2):
                with pytest.warns(UserWarning, match=message):
                    warn_about_filter(store, parse(where))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for where in POSSIBLE:
                warn_about_filter(store, parse(where))
            # The kind appears later.
            store.upsert([record(21, price=20, prize=3, brand=7, **{SYSTEM: {}})])
            for where, _ in IMPOSSIBLE[:4]:
                warn_about_filter(store, parse(where))
    finally:
        store.close()


def test_every_call_with_a_filter_reports_parts_that_cannot_match(tmp_path: Path) -> None:
    where = {"not": {"value": {"lt": 100}}}
    calls: list[Callable[[Catalog], Any]] = [
        lambda catalog: catalog.search("red", where=where),
        lambda catalog: catalog.browse(where=where),
        lambda catalog: catalog.count(where),
        lambda catalog: catalog.facets("value", where=where),
        lambda catalog: catalog.duplicates(where=where),
        lambda catalog: catalog.export(tmp_path / "shop.parquet", where=where),
    ]
    with filled(["10,5", "9,9"]) as catalog:
        for call in calls:
            with pytest.warns(UserWarning, match="no item has a number there"):
                assert call(catalog)


def test_info_reports_every_kind_of_a_mixed_column_whatever_comes_first() -> None:
    with filled([*["M"] * 300, *[38] * 100, True, ["x", "2026-03-01"]]) as catalog:
        assert catalog.info()["columns"]["value"] == "string, number, boolean, date"


@pytest.mark.parametrize("name", ["a\\b", "\\", 'size 12"', "", " "])
def test_a_column_that_no_filter_could_name_is_refused(name: str) -> None:
    with Catalog() as catalog:
        with pytest.raises(OptionError, match="cannot be the name of a column"):
            catalog.add(Image.new("RGB", (16, 16)), payloads={"catalog": "fashion-man", name: 1})
        for call in (catalog.facets, lambda column: catalog.count({column: 1})):
            with pytest.raises(FilterError):
                call(name if name.strip() else "")


@pytest.mark.parametrize("name", ["a b", "ünï", '"x-y.z"', '"[0]"', "a'b", '"and"', "  p ", "$", "*", "a\nb", "😀"])
def test_every_other_name_works_in_filters_facets_order_and_groups(name: str) -> None:
    with filled([3, 1, 2], name.strip('"')) as catalog:
        assert catalog.facets(name) == {1: 1, 2: 1, 3: 1} and catalog.count({name: {"gte": 2}}) == 2
        assert [hit.id for hit in catalog.browse(order_by=f"-{name}")] == [0, 2, 1]
        assert len(catalog.search("red", group_by=name)) == 3
