"""Vector search engines in this process: a catalog, qdrant-client's local mode, and a plain matrix product.

Each is built from unit vectors float32[n, dim] and answers a query with the indices of its TOP nearest vectors. With a
bucket, only vectors count whose index modulo MATCHING is the bucket.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from unidiff_sdk import Catalog

TOP, MATCHING = 10, 10  # one item in MATCHING matches the filter
BATCH = 1000

Vectors = NDArray[np.float32]
Indices = NDArray[np.int64]
Search = Callable[[Vectors, int | None], Indices]


class Engine:
    """A built engine and its build time in seconds."""

    def __init__(self, build: Callable[[], Search], close: Callable[[], None] = lambda: None) -> None:
        started = time.perf_counter()
        self.search, self.close = build(), close
        self.build_s = round(time.perf_counter() - started, 1)


def filled_catalog(folder: Path, vectors: Vectors, *, quantization: str | None = None) -> Catalog:
    """Return a catalog that holds vectors as `add` writes them, without images and without an index.

    Its bundle is never opened.
    """
    from unidiff_sdk import Catalog
    from unidiff_sdk.catalog.catalog_file import BundleRef, CatalogFile
    from unidiff_sdk.store.edge.store import EdgeStore

    no_bundle = BundleRef("none", "none", "none", 64 * "0", vectors.shape[1])
    CatalogFile(no_bundle, "vectors", datetime.now(UTC).isoformat(timespec="seconds")).write(folder)
    EdgeStore(folder / "vectors", vectors.shape[1], quantization).close()
    catalog = Catalog(folder, create=False)
    for start in range(0, len(vectors), BATCH):
        catalog._store.upsert(list(_records(vectors[start : start + BATCH], start)))
    return catalog


def _records(vectors: Vectors, start: int) -> Iterator[object]:
    from unidiff_sdk.store import Record
    from unidiff_sdk.store.ids import key_of

    for k, vector in enumerate(vectors, start):
        system = {"sha256": f"{k:064x}", "uri": f"images/{k:064x}.png"}
        yield Record(key_of(k), vector, {"id": k, "bucket": k % MATCHING, "_unidiff": system})


def search_by(catalog: Catalog, **options: Any) -> Search:
    """Return a search by `Catalog.search(vector=…)` with these options."""

    def search(query: Vectors, bucket: int | None) -> Indices:
        where = None if bucket is None else {"bucket": bucket}
        page = catalog.search(vector=query, limit=TOP, where=where, **options)
        return np.array([hit.id for hit in page], np.int64)

    return search


def unidiff(folder: Path, vectors: Vectors, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Engine]:
    """Return a catalog with an index, as `add_folder` leaves it, searched with each of the named options.

    The first filtered query creates the payload index.
    """
    started = time.perf_counter()
    catalog = filled_catalog(folder, vectors)
    catalog.optimize()
    engines = {name: Engine(partial(search_by, catalog, **some), catalog.close) for name, some in options.items()}
    for engine in engines.values():
        engine.build_s = round(time.perf_counter() - started, 1)
    return engines


def local(vectors: Vectors) -> Engine:
    """Return qdrant-client's in-memory mode, which scans all vectors."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")

    def build() -> Search:
        config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
        payloads = ({"bucket": k % MATCHING} for k in range(len(vectors)))
        with warnings.catch_warnings(action="ignore"):  # it warns about collections of this size
            client.create_collection("c", vectors_config=config)
            client.upload_collection("c", vectors, payload=payloads, ids=range(len(vectors)))

        def search(query: Vectors, bucket: int | None) -> Indices:
            test = models.FieldCondition(key="bucket", match=models.MatchValue(value=bucket or 0))
            condition = None if bucket is None else models.Filter(must=[test])
            points = client.query_points("c", query=query, limit=TOP, query_filter=condition).points
            return np.array([point.id for point in points], np.int64)

        return search

    return Engine(build)


def flat(vectors: Vectors) -> Engine:
    """Return an exact search: one matrix product and a partial sort."""

    def build() -> Search:
        buckets = [np.arange(bucket, len(vectors), MATCHING) for bucket in range(MATCHING)]
        parts = [vectors[indices] for indices in buckets]

        def search(query: Vectors, bucket: int | None) -> Indices:
            scores = (vectors if bucket is None else parts[bucket]) @ query
            best = np.argpartition(-scores, TOP)[:TOP]
            best = best[np.argsort(-scores[best])]
            return best if bucket is None else buckets[bucket][best]

        return search

    return Engine(build)


def score_of_rank(vectors: Vectors, queries: Vectors, bucket: int | None, rank: int = TOP) -> NDArray[np.float32]:
    """Return the exact score of the result at `rank` for each query: a hit with at least this score is correct."""
    allowed = vectors if bucket is None else vectors[bucket::MATCHING]
    scores = [np.partition(allowed @ query, -rank)[-rank] for query in queries]
    return np.array(scores, np.float32)


def assess(
    search: Search, vectors: Vectors, queries: Vectors, least_scores: Vectors, bucket: int | None
) -> dict[str, float]:
    """Return recall by score, and the median and 99th percentile of the times of sequential queries.

    60 queries warm up, or as many as run in 10 seconds: a catalog copies the matches of a repeated filter during 51
    searches. After 20 seconds, the remaining queries are skipped.
    """
    ends = time.monotonic() + 20
    for query in queries[:60]:
        search(query, bucket)
        if time.monotonic() > ends - 10:
            break
    seconds, recalls = [], []
    for query, least in zip(queries, least_scores, strict=True):
        started = time.perf_counter()
        found = search(query, bucket)
        seconds.append(time.perf_counter() - started)
        matching = np.ones(len(found), bool) if bucket is None else found % MATCHING == bucket
        recalls.append(np.sum((vectors[found] @ query >= least - 1e-6) & matching) / TOP)
        if time.monotonic() > ends:
            break
    return {
        "recall@10": round(float(np.mean(recalls)), 4),
        "p50_ms": round(1000 * float(np.quantile(seconds, 0.5)), 3),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 3),
    }
