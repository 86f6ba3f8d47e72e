"""Columns: facets, order, kinds and names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from PIL import Image

from unidiff_sdk import Catalog, FilterError, OptionError
from unidiff_sdk.datasets.synthetic import products, render


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
