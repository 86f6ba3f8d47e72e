"""Searches after many items of the index of Qdrant Edge were deleted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, StoreError
from unidiff_sdk.store import Record, Vector, VectorQuery
from unidiff_sdk.store.edge.deletions import GraphState
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.protocol import MAX_DELETED_SHARE

MANY, WIDE = 1400, 2048  # just above 10,000 KB, where the engine starts to build a graph
QUERIES, TOP = 20, 10


def unit_vectors(count: int) -> Vector:
    vectors = np.random.default_rng(0).standard_normal((count, WIDE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest_half(vectors: Vector, queries: Vector) -> list[int]:
    """The indices of half of the vectors: those that are nearest to any query."""
    ranks = np.argsort(np.argsort(-(queries @ vectors.T), axis=1), axis=1)
    return [int(k) for k in np.argsort(ranks.min(axis=0))[: len(vectors) // 2]]


def recall(store: EdgeStore, vectors: Vector, queries: Vector, live: list[int]) -> float:
    """The share of the TOP nearest live vectors, found by brute force, that searches return."""
    found = 0
    for query, scored in zip(queries, store.query_batch([VectorQuery(q, TOP) for q in queries]), strict=True):
        best = np.array(live)[np.argsort(-(vectors[live] @ query))[:TOP]]
        found += len({record.id for record in scored} & {key_of(int(k)) for k in best})
    return found / TOP / len(queries)


def test_search_finds_the_rest_after_half_of_the_index_was_deleted(tmp_path: Path) -> None:
    """The neighbors of the queries are deleted, so that the graph has holes where it is searched.

    The engine finds nothing at all in many of these graphs: all of their entry points are deleted.
    """
    vectors, queries = np.split(unit_vectors(MANY + QUERIES), [MANY])
    store = EdgeStore(tmp_path / "vectors", WIDE, full_scan_kb=1)
    for start in range(0, MANY, 350):
        store.upsert([Record(key_of(k), vectors[k], {}) for k in range(start, start + 350)])
    store.optimize()
    deleted = nearest_half(vectors, queries)
    live = sorted(set(range(MANY)) - set(deleted))
    store.delete([key_of(k) for k in deleted])
    for _ in range(2):
        assert store.deleted_share() == 0.5
        assert recall(store, vectors, queries, live) >= 0.98
        store.close()
        store = EdgeStore(tmp_path / "vectors", WIDE)
    store.optimize()
    assert store.deleted_share() == 0
    assert recall(store, vectors, queries, live) >= 0.98
    store.close()


def test_search_considers_more_candidates_after_few_deletions() -> None:
    assert GraphState(100_000, 100_000).search_options(512, 40_000) == {}
    assert GraphState(100_000, 100_000, written=1).search_options(512, 40_000) == {"hnsw_ef": 200}
    assert GraphState(90_000, 100_000, 10_000).search_options(512, 40_000) == {"hnsw_ef": 360}
    assert GraphState(80_000, 100_000, 20_000).search_options(512, 40_000) == {"hnsw_ef": 520}
    assert GraphState(20_000, 20_001, 1).search_options(512, 40_000) == {"exact": True}  # 40,000 KB remain
    assert GraphState(79_000, 100_000, 21_000).search_options(512, 40_000) == {"exact": True}


def test_candidates_of_the_caller_are_a_minimum() -> None:
    fresh, worn = GraphState(100_000, 100_000), GraphState(90_000, 100_000, 10_000)
    assert fresh.search_options(512, 40_000, ef=32) == {"hnsw_ef": 32}
    assert worn.search_options(512, 40_000, ef=32) == {"hnsw_ef": 360}
    assert worn.search_options(512, 40_000, ef=500) == {"hnsw_ef": 500}
    assert fresh.search_options(512, 40_000, exact=True) == {"exact": True}


def test_optimize_removes_deleted_vectors_from_small_graphs(tmp_path: Path) -> None:
    few, wide = 330, 8192  # the engine's default would keep them below 1,000 vectors
    vectors = np.random.default_rng(0).standard_normal((few, wide)).astype(np.float32)
    store = EdgeStore(tmp_path / "vectors", wide)
    store.upsert([Record(key_of(k), vector, {}) for k, vector in enumerate(vectors)])
    store.optimize()
    assert store.unindexed_count() == 0
    store.delete([key_of(k) for k in range(few // 4)])
    assert store.deleted_share() > MAX_DELETED_SHARE
    store.optimize()
    assert store.deleted_share() == 0
    store.close()


def test_deleted_share_with_tolerance_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EdgeStore(tmp_path / "vectors", WIDE)
    store._graphs = GraphState(points=1000, in_graphs=1000)
    measured: list[Path] = []

    def measure(shard: object, path: Path) -> GraphState:
        measured.append(path)
        return GraphState(points=1000, in_graphs=1000, deleted=store._graphs.deleted + 4)

    monkeypatch.setattr(GraphState, "measure", measure)
    store.delete([key_of(k) for k in range(9)])  # not all of them are in the graph
    assert store.deleted_share(0.01) == 0.009
    assert not measured
    assert store.deleted_share() == 0.004
    store.delete([key_of(k) for k in range(51)])
    assert len(measured) == 2, "more than 5 % of the index was written"
    assert store.deleted_share(0.01) == 0.008
    store.close()


@pytest.mark.parametrize(("share", "expected"), [(MAX_DELETED_SHARE, 0), (MAX_DELETED_SHARE + 0.01, 1)])
def test_delete_builds_the_index_again_when_a_fifth_of_it_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, expected: int
) -> None:
    optimized: list[EdgeStore] = []
    monkeypatch.setattr(EdgeStore, "optimize", lambda store: optimized.append(store))
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add([np.full((8, 8, 3), k, np.uint8) for k in range(3)], ids=[1, 2, 3])
        monkeypatch.setattr(EdgeStore, "deleted_share", lambda store, tolerance=0.0: share)
        assert catalog.delete(99) == 0
        assert not optimized
        assert catalog.delete([1, 2]) == 2
    assert len(optimized) == expected


def test_delete_warns_where_the_index_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: EdgeStore) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(EdgeStore, "optimize", fail)
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add([np.full((8, 8, 3), k, np.uint8) for k in range(3)], ids=[1, 2, 3])
        monkeypatch.setattr(EdgeStore, "deleted_share", lambda store, tolerance=0.0: 0.5)
        with pytest.warns(UserWarning, match="not built again: the disk is full"):
            assert catalog.delete(2) == 1
        assert [catalog.get(id) is None for id in (1, 2, 3)] == [False, True, False]
