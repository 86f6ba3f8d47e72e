"""What searches vectors in this process: a catalog, qdrant-client's local mode, and a plain matrix product.

Each is built from float32[n, dim] of length 1 and answers a query with the numbers of the TOP rows closest to it; with
a bucket, only among the rows whose number is that modulo PASSING.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from unidiff_sdk import Catalog

TOP, PASSING = 10, 10  # one item in PASSING passes the filter
BATCH = 1000

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Search = Callable[[Vectors, int | None], Rows]


class Engine:
    """An engine, and how many seconds it took to build."""

    def __init__(self, build: Callable[[], Search], close: Callable[[], None] = lambda: None) -> None:
        started = time.perf_counter()
        self.search, self.close = build(), close
        self.build_s = round(time.perf_counter() - started, 1)


def filled_catalog(folder: Path, vectors: Vectors, *, quantization: str | None = None) -> Catalog:
    """A catalog that holds vectors as `add` would write them, without pictures; its bundle is never opened.

    The index is not built yet.
    """
    from unidiff_sdk import Catalog
    from unidiff_sdk.catalog.catalog_file import BundleRef, CatalogFile

    no_bundle = BundleRef("none", "none", "none", 64 * "0", vectors.shape[1])
    CatalogFile(no_bundle, "vectors", datetime.now(UTC).isoformat(timespec="seconds")).write(folder)
    catalog = Catalog(folder, create=False, quantization=quantization)
    for start in range(0, len(vectors), BATCH):
        catalog._store.upsert(list(_records(vectors[start : start + BATCH], start)))
    return catalog


def _records(vectors: Vectors, start: int) -> Iterator[object]:
    from unidiff_sdk.store import Record
    from unidiff_sdk.store.ids import key_of

    for k, vector in enumerate(vectors, start):
        system = {"sha256": f"{k:064x}", "uri": f"images/{k:064x}.png"}
        yield Record(key_of(k), vector, {"id": k, "bucket": k % PASSING, "_unidiff": system})


def search_by(catalog: Catalog) -> Search:
    """`Catalog.search(vector=…)`."""

    def search(query: Vectors, bucket: int | None) -> Rows:
        page = catalog.search(vector=query, limit=TOP, where=None if bucket is None else {"bucket": bucket})
        return np.array([hit.id for hit in page], np.int64)

    return search


def unidiff(folder: Path, vectors: Vectors, *, quantization: str | None = None) -> Engine:
    """A catalog with its index, as `add_folder` leaves it. What a filter needs, the first filtered query makes."""
    catalogs = []

    def build() -> Search:
        catalog = filled_catalog(folder, vectors, quantization=quantization)
        catalogs.append(catalog)
        catalog.optimize()
        return search_by(catalog)

    return Engine(build, lambda: catalogs[0].close())


def local(vectors: Vectors) -> Engine:
    """qdrant-client's own in-memory mode, which scans."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")

    def build() -> Search:
        config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
        payloads = ({"bucket": k % PASSING} for k in range(len(vectors)))
        with warnings.catch_warnings(action="ignore"):  # that it is not made for so many
            client.create_collection("c", vectors_config=config)
            client.upload_collection("c", vectors, payload=payloads, ids=range(len(vectors)))

        def search(query: Vectors, bucket: int | None) -> Rows:
            test = models.FieldCondition(key="bucket", match=models.MatchValue(value=bucket or 0))
            condition = None if bucket is None else models.Filter(must=[test])
            points = client.query_points("c", query=query, limit=TOP, query_filter=condition).points
            return np.array([point.id for point in points], np.int64)

        return search

    return Engine(build)


def flat(vectors: Vectors) -> Engine:
    """One matrix product and a partial sort: exact."""

    def build() -> Search:
        buckets = [np.arange(bucket, len(vectors), PASSING) for bucket in range(PASSING)]
        parts = [vectors[rows] for rows in buckets]

        def search(query: Vectors, bucket: int | None) -> Rows:
            scores = (vectors if bucket is None else parts[bucket]) @ query
            best = np.argpartition(-scores, TOP)[:TOP]
            best = best[np.argsort(-scores[best])]
            return best if bucket is None else buckets[bucket][best]

        return search

    return Engine(build)


def truth(vectors: Vectors, asked: Vectors, bucket: int | None, rank: int = TOP) -> NDArray[np.float32]:
    """The score of the TOP-th best row for each query: what scores as much is rightly found (equals count)."""
    allowed = vectors if bucket is None else vectors[bucket::PASSING]
    tenths = [np.partition(allowed @ query, -rank)[-rank] for query in asked]
    return np.array(tenths, np.float32)


def assess(search: Search, vectors: Vectors, asked: Vectors, tenth: Vectors, bucket: int | None) -> dict[str, float]:
    """Recall by distance, and the spread of times of one query after another, after 20 to warm up; for 20 s at most."""
    ends = time.monotonic() + 20
    for query in asked[:20]:
        search(query, bucket)
    seconds, rights = [], []
    for query, least in zip(asked, tenth, strict=True):
        started = time.perf_counter()
        found = search(query, bucket)
        seconds.append(time.perf_counter() - started)
        passing = np.ones(len(found), bool) if bucket is None else found % PASSING == bucket
        rights.append(np.sum((vectors[found] @ query >= least - 1e-6) & passing) / TOP)
        if time.monotonic() > ends:
            break
    return {
        "recall@10": round(float(np.mean(rights)), 4),
        "p50_ms": round(1000 * float(np.quantile(seconds, 0.5)), 3),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 3),
    }
