"""Changing columns of an item without encoding its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.errors import OptionError


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    opened = Catalog(tmp_path / "shop.catalog")
    shop = products("fashion-man", 3, seed=0, split="test")
    columns = {"price": 2.5, "tags": ["a"], "note": None}
    opened.add([render(each) for each in shop], [each.caption for each in shop], ["a", 7, "c"], [columns] * 3)
    return opened


def test_columns_change_and_the_rest_stays(catalog: Catalog, tmp_path: Path) -> None:
    before = catalog.get(7)
    score = catalog.search(before.text, limit=1)[0].score
    assert catalog.update(7, {"price": 3, "stock": True, "tags": None})
    after = catalog.get(before.id)
    assert after.payload == {"price": 3, "stock": True, "note": None}  # only what was named is removed
    assert (after.text, after.uri, after.sha256) == (before.text, before.uri, before.sha256)
    hit = catalog.search(before.text, where={"stock": True}, limit=1)[0]
    assert hit.id == 7 and hit.score == pytest.approx(score)
    assert catalog.get("a").payload["price"] == 2.5
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as reopened:
        assert reopened.get(7).payload == after.payload
        np.testing.assert_array_equal(np.asarray(reopened.get(7).load_image()), np.asarray(before.load_image()))


def test_unknown_items_and_wrong_columns(catalog: Catalog) -> None:
    assert not catalog.update("nothing", {"price": 1}) and len(catalog) == 3
    for columns in ({"id": 1}, {"text": "x"}, {'a"b': 1}, {"x": float("nan")}, {"x": object()}):
        with pytest.raises(OptionError):
            catalog.update("a", columns)
    assert catalog.get("a").payload["price"] == 2.5
    assert catalog.update("a", {})
