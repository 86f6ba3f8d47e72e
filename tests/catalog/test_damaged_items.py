"""Payloads in a catalog folder that this SDK did not write, or that were damaged: errors of the SDK, and a way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.color_bundle import color_image, make_color_bundle

from unidiff_sdk import Catalog, ImageError, StoreError
from unidiff_sdk.store import Record
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.payload import SYSTEM

GOOD = {"sha256": "0" * 64, "uri": f"images/00/{'0' * 64}.png"}
PAYLOADS: dict[str, dict[str, Any]] = {
    "empty": {},
    "no image": {"id": "a"},
    "null": {"id": "a", SYSTEM: None},
    "list": {"id": "a", SYSTEM: [1]},
    "wrong types": {"id": "a", SYSTEM: {"sha256": 3, "uri": []}},
    "no id": {SYSTEM: GOOD},
    "id is a list": {"id": [], SYSTEM: GOOD},
    "caption is a number": {"id": "a", "text": 7, SYSTEM: GOOD},
    "source is a number": {"id": "a", SYSTEM: {**GOOD, "source": 5}},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        catalog.add(color_image("red"), ids="red", texts="red")
        yield catalog


@pytest.mark.parametrize("kind", PAYLOADS)
def test_damaged_item_is_reported_and_replaced(tmp_path: Path, catalog: Catalog, kind: str) -> None:
    (stored,) = catalog._store.retrieve([key_of("red")])
    catalog._store.upsert([Record(key_of("a"), stored.vector, PAYLOADS[kind])])
    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: catalog.search("red"),
        "hybrid": lambda: catalog.search("red", hybrid=True),
        "browse": lambda: catalog.browse(),
        "get": lambda: catalog.get("a"),
        "duplicates": lambda: catalog.duplicates(0.9),
        "export": lambda: catalog.export(tmp_path / "shop.parquet"),
    }
    for name, call in calls.items():
        with pytest.raises((StoreError, ImageError), match=r"damaged") as failed:
            call()
        assert isinstance(failed.value, StoreError), name
    assert not (tmp_path / "shop.parquet").exists()
    catalog.add(color_image("blue"), ids="a", texts="blue")
    assert {hit.id for hit in catalog.search("red")} == {"red", "a"}


def test_damaged_item_can_be_deleted(catalog: Catalog) -> None:
    (stored,) = catalog._store.retrieve([key_of("red")])
    catalog._store.upsert([Record(key_of("a"), stored.vector, {})])
    assert catalog.delete("a") == 1
    (hit,) = catalog.search("red")
    assert hit.id == "red" and hit.load_image().size == (40, 30)
