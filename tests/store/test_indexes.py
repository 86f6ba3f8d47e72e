"""Payload indexes: created once, also if several threads need one."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.misbehaving_server import MisbehavingServer, Request

from unidiff_sdk import Catalog, FilterError, ForbiddenError, ServerOptions
from unidiff_sdk.store.indexes import PayloadIndexes


class RecordingStore:
    """Records what is created and dropped. Creating takes a while."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def create_index(self, column: str, kind: str) -> None:
        self.calls.append(("create", column, kind))
        time.sleep(0.05)

    def has_column(self, column: str) -> bool:
        return column in ("brand", "price", "added")

    def drop_index(self, column: str) -> None:
        self.calls.append(("drop", column))


def test_index_needed_by_four_threads_is_created_once() -> None:
    indexes, store = PayloadIndexes({}), RecordingStore()
    threads = [threading.Thread(target=indexes.ensure, args=("brand", "keyword", store)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.calls == [("create", "brand", "keyword")]


def test_filter_uses_an_existing_index_of_another_kind() -> None:
    indexes, store = PayloadIndexes({"brand": "text"}), RecordingStore()
    indexes.ensure_for_filter({"brand": "keyword", "price": "float"}, store)
    assert store.calls == [("create", "price", "float")]


def test_columns_that_no_item_has_get_no_index() -> None:
    indexes, store = PayloadIndexes({}), RecordingStore()
    for n in range(100):
        indexes.ensure_for_filter({f"unknown{n}": "keyword", "price": "float"}, store)
    assert store.calls == [("create", "price", "float")]


def test_searches_for_unknown_columns_leave_no_files(tmp_path: Path, toy: Path) -> None:
    image = Image.new("RGB", (8, 8))
    with Catalog(tmp_path / "shop.catalog", toy) as catalog, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        catalog.add([image], ["red"], ["a"], [{"price": 5}])

        def files() -> int:
            return sum(1 for path in (tmp_path / "shop.catalog").rglob("*") if path.is_file())

        before = files()
        for n in range(20):
            assert len(catalog.search("red", where={f"unknown{n}": "x"})) == 0
            assert len(catalog.browse(where={f"unknown.deep{n}": {"lt": n}})) == 0
        assert files() == before
        catalog.update("a", {"unknown1": "x"})
        assert len(catalog.search("red", where={"unknown1": "x"})) == 1 and files() > before


def test_index_of_numbers_is_dropped_for_a_range_of_dates_and_not_created_again() -> None:
    indexes, store = PayloadIndexes({"added": "float"}), RecordingStore()
    for kind in ("datetime", "float", "datetime"):
        indexes.ensure_for_filter({"added": kind}, store)
    assert store.calls == [("drop", "added")]


# ------------------------------------------------------------------------------------------------ ahead of searches


PAYLOADS: list[dict[str, Any]] = [
    {
        "name": "a", "price": 3, "sold": True, "made": "2026-01-01", "at": {"lat": 1.0, "lon": 2.0}, "mixed": 1,
        "tags": ["x"],
    },
    {
        "name": "b", "price": 1.5, "sold": False, "made": "2026-02-01", "mixed": "2026-01-01", "dot.ted": 1,
        "maker": {"city": "Bern"}, "size[1]": 2,
    },
]  # fmt: skip
KINDS = {
    "at": "geo", '"dot.ted"': "float", "id": "keyword", "made": "datetime", "name": "keyword", "price": "float",
    '"size[1]"': "float", "sold": "bool", "tags": "keyword", "text": "text",
}  # fmt: skip


def fill(catalog: Catalog) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    catalog.add(images, ["one", "two"], ["1", "2"], PAYLOADS)


def test_indexes_of_all_columns_are_created_ahead(catalog: Catalog) -> None:
    fill(catalog)
    assert catalog.create_indexes() == KINDS, "objects, and numbers beside dates, have no index"
    assert catalog.create_indexes() == KINDS
    assert catalog.create_indexes(["maker.city"]) == {"maker.city": "keyword"}
    with pytest.warns(UserWarning, match='No item has a column "none"'):
        assert catalog.create_indexes(["none"]) == {}
    with pytest.raises(FilterError):
        catalog.create_indexes([""])
    where = {"price": {"lt": 2}, "mixed": {"gte": "2026-01-01"}}
    assert [hit.id for hit in catalog.search("one", where=where)] == ["2"]


def test_a_key_that_may_only_read_filters_without_an_index(toy: Path, tmp_path: Path) -> None:
    server = MisbehavingServer()
    place: dict[str, Any] = {"location": server.url, "images": tmp_path, "server": ServerOptions(retries=0)}

    def forbid(request: Request) -> int | None:
        return 403 if request.path.endswith("/index") else None

    try:
        with Catalog(bundle=toy, **place) as writing:
            fill(writing)
            server.choose = forbid
            with Catalog(create=False, **place) as reading:
                with pytest.warns(UserWarning, match=r"'price' are slow, because they have no index.*create_indexes"):
                    assert [hit.id for hit in reading.search("one", where={"price": {"lt": 2}})] == ["2"]
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    reading.search("one", where={"price": {"lt": 2}})
                for call in (lambda: reading.facets("name"), lambda: reading.browse(order_by="price")):
                    with pytest.raises(ForbiddenError, match="may not index the column"):
                        call()
                with pytest.raises(ForbiddenError):
                    reading.create_indexes()
            server.choose = lambda request: None
            asked = len(server.requests)
            assert writing.create_indexes() == KINDS
            created = [r.body["field_name"] for r in server.requests[asked:] if r.path.endswith("/index")]
            assert sorted(created) == sorted(KINDS)
    finally:
        server.stop()
