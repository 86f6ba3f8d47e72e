"""The search index of Qdrant Edge: 8-bit vectors, selective filters and the page cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, OptionError, StoreError
from unidiff_sdk.catalog.snapshot import OPTIMIZE_FROM
from unidiff_sdk.store import Record, VectorQuery
from unidiff_sdk.store.edge.page_cache import warm_page_cache
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.protocol import MAX_DELETED_SHARE

MANY, WIDE = 1400, 2048  # just above 10,000 KB, where the engine starts to compress and to build a graph


def test_quantized_search_has_exact_scores_and_finds_the_best(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((MANY + 30, WIDE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, queries = np.split(vectors, [MANY])
    store = EdgeStore(tmp_path / "vectors", WIDE, "scalar")
    for start in range(0, MANY, 350):
        store.upsert(
            [
                Record(key_of(k), vectors[k], {"n": k, "half": k % 2, "text": f"word{k}"})
                for k in range(start, start + 350)
            ]
        )
    assert not list(tmp_path.rglob("quantized*.data"))
    store.optimize()
    assert store.unindexed_count() == 0
    (compressed,) = tmp_path.rglob("quantized.data")
    assert compressed.stat().st_size < vectors.nbytes / 3
    store.close()

    store = EdgeStore(tmp_path / "vectors", WIDE)
    assert store.quantization == "scalar"
    right = 0
    for query in queries:
        scores = vectors @ query
        for where, passing in ((None, np.arange(MANY)), ({"half": 1}, np.arange(1, MANY, 2))):
            found = store.query(query, limit=10, where=parse(where))
            rows = [one.payload["n"] for one in found]
            np.testing.assert_allclose([one.score for one in found], scores[rows], atol=1e-6)
            right += len(set(rows) & set(passing[np.argsort(-scores[passing])[:10]]))
    assert right > 0.9 * 2 * 10 * len(queries)
    (hybrid,) = store.query_batch([VectorQuery(queries[0], 5, text="word700", bm25_weight=0.9)])
    assert hybrid[0].payload["n"] == 700
    store.close()


def test_more_candidates_find_more_and_an_exact_search_finds_all(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((MANY + 30, WIDE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, queries = np.split(vectors, [MANY])
    store = EdgeStore(tmp_path / "vectors", WIDE, full_scan_kb=10)
    for start in range(0, MANY, 350):
        store.upsert([Record(key_of(k), vectors[k], {"n": k}) for k in range(start, start + 350)])
    store.optimize()

    def recall(**options: Any) -> float:
        found = 0
        for query in queries:
            (results,) = store.query_batch([VectorQuery(query, 10, **options)])
            found += len({one.payload["n"] for one in results} & set(np.argsort(-(vectors @ query))[:10].tolist()))
        return found / (10 * len(queries))

    few, default, many = recall(ef=10), recall(), recall(ef=1000)
    assert few < default - 0.1
    assert few < many - 0.1
    assert many > 0.99
    assert recall(exact=True) == 1
    store.close()


def test_deleted_and_replaced_records_are_not_counted_as_indexed(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((MANY, WIDE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    records = [Record(key_of(k), vector, {"n": k}) for k, vector in enumerate(vectors)]
    store = EdgeStore(tmp_path / "vectors", WIDE)
    assert (store.unindexed_count(), store.deleted_share()) == (0, 0)
    for start in range(0, MANY, 350):
        store.upsert(records[start : start + 350])
    assert (store.unindexed_count(), store.deleted_share()) == (MANY, 0)
    store.optimize()
    assert (store.unindexed_count(), store.deleted_share()) == (0, 0)
    store.delete([record.id for record in records[:100]])
    store.upsert(records[200:250])  # replaced
    store.upsert(records[:30])  # deleted and added again
    store.upsert(records[:30])  # replaced, but not in the graph
    for _ in range(2):
        assert store.unindexed_count() == 80
        assert store.deleted_share() == 150 / MANY
        store.close()
        store = EdgeStore(tmp_path / "vectors", WIDE)
    store.delete([record.id for record in records[300:600]])
    assert store.deleted_share() > MAX_DELETED_SHARE
    store.optimize()
    assert store.deleted_share() == 0
    assert store.unindexed_count() <= store.count() == MANY - 370
    store.close()


@pytest.mark.parametrize(
    ("unindexed", "deleted", "expected"),
    [
        (0, 0.0, False),
        (OPTIMIZE_FROM - 1, MAX_DELETED_SHARE, False),
        (OPTIMIZE_FROM, 0.0, True),
        (0, MAX_DELETED_SHARE + 0.01, True),
    ],
)
def test_catalog_optimizes_many_unindexed_items_and_many_deletions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unindexed: int, deleted: float, expected: bool
) -> None:
    optimized: list[EdgeStore] = []
    monkeypatch.setattr(EdgeStore, "unindexed_count", lambda store: unindexed)
    monkeypatch.setattr(EdgeStore, "deleted_share", lambda store, tolerance=0.0: deleted)
    monkeypatch.setattr(EdgeStore, "optimize", lambda store: optimized.append(store))
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20), "red").save(images / "a.png")
    (images / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add_folder(images)
    assert len(optimized) == expected


@pytest.mark.slow
def test_selective_filter_finds_its_items_through_the_graph(tmp_path: Path) -> None:
    """The graph was built before the filter was known. The low limit for scans makes every search use the graph."""
    many, wide, rng = 21_000, 128, np.random.default_rng(0)
    vectors = rng.standard_normal((300, 1, wide)) + 0.5 * rng.standard_normal((300, many // 300, wide))
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32).reshape(many, wide)
    store = EdgeStore(tmp_path / "vectors", wide, full_scan_kb=1)
    for start in range(0, many, 1000):
        store.upsert([Record(key_of(k), vectors[k], {"n": k, "tenth": k % 10}) for k in range(start, start + 1000)])
    store.optimize()
    assert store.unindexed_count() == 0
    passing, right = np.arange(3, many, 10), 0
    for query in vectors[::700]:
        found = [one.payload["n"] for one in store.query(query, limit=10, where=parse({"tenth": 3}))]
        right += len(set(found) & set(passing[np.argsort(-(vectors @ query)[passing])[:10]]))
    assert right >= 0.95 * 10 * 30
    store.close()


def test_reindexed_catalog_keeps_its_quantization(tmp_path: Path) -> None:
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "a"), quantization="scalar") as catalog:
        catalog.add([Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")], ids=[1, 2, 3])
        assert catalog.reindex(make_toy_bundle(tmp_path / "b", seed=1)) == 3
        assert len(catalog.search(like=1)) == 2
    configurations = [file.read_text() for file in (tmp_path / "shop").rglob("edge_config.json")]
    assert configurations and all('"int8"' in text for text in configurations)
    with Catalog(tmp_path / "shop", quantization="scalar") as catalog:
        assert catalog.count() == 3


def test_quantization_is_validated_and_cannot_be_changed(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "a")
    with pytest.raises(OptionError, match=r"'int4'.*'scalar'"):
        Catalog(tmp_path / "new", bundle, quantization="int4")
    Catalog(tmp_path / "new", bundle, quantization="scalar").close()
    Catalog(tmp_path / "plain", bundle).close()
    with pytest.raises(StoreError, match="made with quantization=None and keeps it"):
        Catalog(tmp_path / "plain", quantization="scalar")
    Catalog(tmp_path / "plain").close()
    with pytest.raises(OptionError, match="ServerOptions"):
        Catalog("http://localhost:6333", bundle, images=tmp_path / "images", quantization="scalar")


@pytest.mark.parametrize(
    ("quantization", "room", "is_read"), [(None, 10**9, True), (None, 10**5, False), ("scalar", 10**9, False)]
)
def test_warm_page_cache_reads_only_what_fits(
    tmp_path: Path, quantization: str | None, room: int, is_read: bool
) -> None:
    """Nothing is read of a quantized shard, whose originals stay on disk, or of one larger than the memory."""
    vectors = np.eye(256, dtype=np.float32)
    store = EdgeStore(tmp_path / "vectors", 256, quantization)
    store.upsert([Record(key_of(k), vector, {"n": k}) for k, vector in enumerate(vectors)])
    store.close()
    before = bytes_read()
    warm_page_cache(tmp_path / "vectors" / "0", available=room)
    assert (bytes_read() - before > vectors.nbytes) == is_read


def bytes_read() -> int:
    """The bytes that the system calls of this process have read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])
