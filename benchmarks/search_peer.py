"""A peer of `search.py` in an environment of its own: `python search_peer.py ENGINE FOLDER THREADS EF [BUCKET]`.

The index is built on the first call for a folder, and read by later ones.
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
from engines import PASSING, TOP, Search, Vectors, assess, truth

# What Qdrant has by default: 16 links, and 100 candidates for each new point.
LINKS, AT_BUILD = 16, 100
_worker.PACKAGES = ("faiss-cpu", "lancedb", "numpy")


def faiss_hnsw(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """FAISS's HNSW graph over plain float32 vectors; a filter is a bitmap of what passes."""
    import faiss

    return _faiss(
        faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT), vectors, folder, threads, ef
    )


def faiss_int8(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """The same graph over 8-bit vectors, without the originals: it cannot rank by them."""
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
        index.hnsw.efConstruction = AT_BUILD
        if not index.is_trained:
            index.train(vectors[: 100 * AT_BUILD])
        index.add(vectors)
        folder.mkdir()
        faiss.write_index(index, str(file))
    selectors: dict[int, Any] = {}

    def search(query: Vectors, bucket: int | None) -> Any:
        if bucket is not None and bucket not in selectors:
            bits = np.packbits(np.arange(len(vectors)) % PASSING == bucket, bitorder="little")
            selectors[bucket] = faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersHNSW(efSearch=ef, sel=None if bucket is None else selectors[bucket])
        found = index.search(query[None], TOP, params=parameters)[1][0]
        return found[found >= 0]

    return search


def lancedb_hnsw(vectors: Vectors, folder: Path, threads: int, ef: int) -> Search:
    """LanceDB's IVF_HNSW_SQ on disk, as its documentation sets it up; a filter is applied before the search."""
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
            "bucket": np.arange(len(vectors)) % PASSING,
        }
        table = database.create_table("items", pa.table(columns))
        graph = HnswSq(distance_type="dot", m=LINKS, ef_construction=AT_BUILD)
        table.create_index("vector", config=graph)
        table.create_index("bucket", config=BTree())

    def search(query: Vectors, bucket: int | None) -> Any:
        asked = table.search(query).distance_type("dot").ef(ef).refine_factor(2).select(["id", "_distance"]).limit(TOP)
        asked = asked if bucket is None else asked.where(f"bucket = {bucket}", prefilter=True)
        return asked.to_arrow()["id"].to_numpy()

    return search


ENGINES: dict[str, Callable[[Vectors, Path, int, int], Search]] = {
    "faiss": faiss_hnsw,
    "faiss-int8": faiss_int8,
    "lancedb": lancedb_hnsw,
}


def main() -> None:
    """Build or open, measure recall and tail once, and answer one query a call."""
    name, folder, threads, ef = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    bucket = int(sys.argv[5]) if sys.argv[5] else None
    vectors, asked = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    note = folder / f"{name}.json"
    started = time.perf_counter()
    search = ENGINES[name](vectors, folder / name, threads, ef)
    if not note.is_file():
        note.write_text(json.dumps(round(time.perf_counter() - started, 1)))
    build_s = json.loads(note.read_text())
    figures = assess(search, vectors, asked, truth(vectors, asked, bucket), bucket) | {"build_s": build_s}
    queries = itertools.cycle(asked)
    serve(lambda: search(next(queries), bucket), figures=lambda: figures)


if __name__ == "__main__":
    main()
