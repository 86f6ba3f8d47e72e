"""A peer of `search.py` in an environment of its own: `python search_peer.py ENGINE FOLDER THREADS [BUCKET]`."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _worker
import numpy as np
from _worker import serve

TOP, PASSING = 10, 10
# Where an engine lets one choose, what Qdrant has by default: 16 links, 100 candidates at build time, 128 at search.
LINKS, AT_BUILD, AT_SEARCH = 16, 100, 128
_worker.PACKAGES = ("faiss-cpu", "lancedb", "numpy")


def faiss_hnsw(vectors: Any, folder: Path, threads: int, bucket: int | None) -> Callable[[Any], Any]:
    """FAISS's HNSW graph over plain float32 vectors; a filter is a bitmap of what passes."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = AT_BUILD
    index.add(vectors)
    parameters = faiss.SearchParametersHNSW(efSearch=AT_SEARCH)
    if bucket is not None:
        bits = np.packbits(np.arange(len(vectors)) % PASSING == bucket, bitorder="little")
        parameters = faiss.SearchParametersHNSW(efSearch=AT_SEARCH, sel=faiss.IDSelectorBitmap(bits))

    def search(query: Any) -> Any:
        found = index.search(query[None], TOP, params=parameters)[1][0]
        return found[found >= 0]

    return search


def lancedb_hnsw(vectors: Any, folder: Path, threads: int, bucket: int | None) -> Callable[[Any], Any]:
    """LanceDB's IVF_HNSW_SQ on disk, as its documentation sets it up; a filter is applied before the search."""
    import lancedb
    import pyarrow as pa

    columns = {
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "id": np.arange(len(vectors)),
        "bucket": np.arange(len(vectors)) % PASSING,
    }
    table = lancedb.connect(folder / f"lance-{bucket}").create_table("items", pa.table(columns))
    table.create_index(metric="dot", index_type="IVF_HNSW_SQ", m=LINKS, ef_construction=AT_BUILD)
    table.create_scalar_index("bucket")

    def search(query: Any) -> Any:
        asked = (
            table.search(query)
            .distance_type("dot")
            .ef(AT_SEARCH)
            .refine_factor(2)
            .select(["id", "_distance"])
            .limit(TOP)
        )
        asked = asked if bucket is None else asked.where(f"bucket = {bucket}", prefilter=True)
        return asked.to_arrow()["id"].to_numpy()

    return search


def main() -> None:
    """Build, measure recall and tail once, and answer one query a call."""
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    bucket = int(sys.argv[4]) if sys.argv[4] else None
    vectors, asked = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    started = time.perf_counter()
    search = {"faiss": faiss_hnsw, "lancedb": lancedb_hnsw}[engine](vectors, folder, threads, bucket)
    build_s = time.perf_counter() - started

    allowed = np.ones(len(vectors), bool) if bucket is None else np.arange(len(vectors)) % PASSING == bucket
    seconds, rights = [], []
    for query in asked:
        started = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - started)
        scores = vectors @ query
        rights.append(np.sum(scores[found] >= np.sort(scores[allowed])[-TOP] - 1e-6) / TOP)
    figures = {
        "recall@10": round(float(np.mean(rights)), 4),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 3),
        "build_s": round(build_s, 1),
    }
    queries = itertools.cycle(asked)
    serve(lambda: search(next(queries)), figures=lambda: figures)


if __name__ == "__main__":
    main()
