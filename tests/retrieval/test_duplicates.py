"""Near-duplicates against the connected components of a plain similarity matrix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import BACKENDS, DIM

from unidiff_sdk import Catalog, OptionError
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.retrieval.duplicates import near_duplicates
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.ids import key_of

# qdrant-client's local mode warns that it ignores payload indexes.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


@pytest.fixture(params=BACKENDS, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = request.param(tmp_path)
    yield store
    store.close()


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def test_near_duplicates_are_the_connected_components(store: Store) -> None:
    rng = np.random.default_rng(0)
    records = [
        Record(key_of(100 * group + k), unit(center + 0.03 * rng.normal(size=DIM)), {"id": 100 * group + k})
        for group, center in enumerate(rng.normal(size=(12, DIM)))
        for k in range(group)
    ]
    store.upsert(records)
    vectors = np.array([r.vector for r in records])
    for threshold in (0.9, 0.98, 0.99):
        links = vectors @ vectors.T >= threshold
        reach = np.linalg.matrix_power(links.astype(float), len(records)) > 0
        expected = {frozenset(np.flatnonzero(row)) for row in reach if row.sum() > 1}
        places = {r.id: place for place, r in enumerate(records)}
        groups = near_duplicates(store, threshold, None)
        assert {frozenset(places[found.id] for found in group) for group in groups} == expected
        assert [len(group) for group in groups] == sorted((len(group) for group in groups), reverse=True)
        for group in groups:
            for found in group:
                others = [vectors[places[o.id]] for o in group if o.id != found.id]
                assert found.score == pytest.approx(max(vectors[places[found.id]] @ o for o in others), abs=1e-5)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, True, "high", float("nan")])
def test_near_duplicates_refuses_an_invalid_threshold(store: Store, threshold: Any) -> None:
    with pytest.raises(OptionError, match="give a cosine above 0 and at most 1"):
        near_duplicates(store, threshold, None)


def test_catalog_duplicates_finds_equal_and_similar_images() -> None:
    chosen = products("fashion-man", 5, seed=1)
    images = [render(product) for product in chosen]
    images += [images[0].resize((200, 200)), images[0].transpose(0), images[3]]
    with Catalog() as catalog:
        catalog.add(images, ids=list("abcdefgh"), payloads=[{"catalog": "fashion-man"}] * 8)
        pair = next(group for group in catalog.duplicates(0.999) if group[0].id in "dh")
        assert {hit.id for hit in pair} == {"d", "h"}
        assert pair[0].score == pytest.approx(1, abs=1e-4)
        assert {"a", "f"} <= {hit.id for hit in catalog.duplicates(0.97)[0]}
        assert catalog.duplicates(0.999, where={"id": ["d", "e"]}) == []
