"""A peer of `search.py` in a separate environment: `python search_peer.py ENGINE FOLDER THREADS EF BUCKET`.

BUCKET is a number, or empty for queries without a filter. The first process for a folder builds the index; later ones
read it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _worker
import numpy as np
from _worker import serve
from engines import MATCHING, TOP, Search, Vectors, assess, score_of_rank

# Defaults of Qdrant: 16 links, and 100 candidates for each new point.
LINKS, BUILD_CANDIDATES = 16, 100
_worker.PACKAGES = ("faiss-cpu", "lancedb", "numpy")


def faiss_hnsw(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """Return FAISS's HNSW graph over float32 vectors; a filter is a bitmap of the matching vectors."""
    import faiss

    return _faiss(
        faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT), vectors, folder, threads, ef
    )


def faiss_int8(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """Return the same graph over 8-bit vectors, without the originals for re-scoring."""
    import faiss

    kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    return _faiss(faiss.IndexHNSWSQ(vectors.shape[1], kind, LINKS, metric), vectors, folder, threads, ef)


def _faiss(index: Any, vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(threads)
    file = folder / "index.faiss"
    if file.is_file():
        index = faiss.read_index(str(file))
    else:
        index.hnsw.efConstruction = BUILD_CANDIDATES
        if not index.is_trained:
            index.train(vectors[: 100 * BUILD_CANDIDATES])
        index.add(vectors)
        folder.mkdir()
        faiss.write_index(index, str(file))
    selectors: dict[int, Any] = {}

    def search(query: Vectors, bucket: int | None) -> Any:
        if bucket is not None and bucket not in selectors:
            bits = np.packbits(np.arange(len(vectors)) % MATCHING == bucket, bitorder="little")
            selectors[bucket] = faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersHNSW(efSearch=ef, sel=None if bucket is None else selectors[bucket])
        found = index.search(query[None], TOP, params=parameters)[1][0]
        return found[found >= 0]

    return search


def lancedb_hnsw(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """Return LanceDB's IVF_HNSW_SQ on disk, set up as in its documentation; a filter is applied before the search."""
    import lancedb
    import pyarrow as pa
    from lancedb.index import BTree, HnswSq

    exists = folder.is_dir()
    database = lancedb.connect(folder)
    if exists:
        table = database.open_table("items")
    else:
        columns = {
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            "id": np.arange(len(vectors)),
            "bucket": np.arange(len(vectors)) % MATCHING,
        }
        table = database.create_table("items", pa.table(columns))
        graph = HnswSq(distance_type="dot", m=LINKS, ef_construction=BUILD_CANDIDATES)
        table.create_index("vector", config=graph)
        table.create_index("bucket", config=BTree())

    def search(query: Vectors, bucket: int | None) -> Any:
        request = (
            table.search(query).distance_type("dot").ef(ef).refine_factor(2).select(["id", "_distance"]).limit(TOP)
        )
        request = request if bucket is None else request.where(f"bucket = {bucket}", prefilter=True)
        return request.to_arrow()["id"].to_numpy()

    return search


ENGINES: dict[str, Callable[[Vectors, Path, int, int], Search]] = {
    "faiss": faiss_hnsw,
    "faiss-int8": faiss_int8,
    "lancedb": lancedb_hnsw,
}


def main() -> None:
    """Build or open the index, measure recall and percentiles once, and answer one query per call."""
    name, folder, threads, ef = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    bucket = int(sys.argv[5]) if sys.argv[5] else None
    vectors, queries = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    build_time = folder / f"{name}.json"
    started = time.perf_counter()
    search = ENGINES[name](vectors, folder / name, threads, ef)
    if not build_time.is_file():
        build_time.write_text(json.dumps(round(time.perf_counter() - started, 1)))
    build_s = json.loads(build_time.read_text())
    least_scores = score_of_rank(vectors, queries, bucket)
    figures = assess(search, vectors, queries, least_scores, bucket) | {"build_s": build_s}
    endless = itertools.cycle(queries)
    serve(lambda: search(next(endless), bucket), figures=lambda: figures)


if __name__ == "__main__":
    main()
