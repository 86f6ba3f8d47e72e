"""Search among 100,000 vectors: speed, recall and build time of `Catalog` on Qdrant Edge and of other engines.

Two kinds of vectors are searched: isotropic noise of 512 dimensions, the hardest case, and the built-in model's
embeddings of synthetic products (`gallery.py`). Those have 128 dimensions; a rotation into 512 dimensions keeps all
their distances. The queries are embeddings of products that are not stored. Recall goes by score: a hit is correct if
at most nine items score higher, so that ties count. Each engine answers one query at a time, first on its own (recall,
p50, p99), then in turns with the others (median, ratio).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Worker, options, peer_python

HERE = Path(__file__).parent
DEPENDS = [HERE / "search_peer.py", HERE / "engines.py", HERE / "gallery.py"]
DIM = 512
EF = 128  # candidates at search, for peers with that option; other values give the curve
OURS: dict[str, dict[str, Any]] = {"UniDiff": {}, "UniDiff, ef 32": {"ef": 32}}
CURVE = {"faiss": (32, EF, 512), "lancedb": (EF, 512)}
PEERS = {"faiss": "FAISS HNSW", "lancedb": "LanceDB"}
TEXTS = ("red striped dress", "a tall blue mug", "green boots, dotted", "a slim black coat", "yellow")


@click.command()
@options
@click.option("--items", default=100_000, show_default=True, help="Number of vectors.")
@click.option("--queries", default=300, show_default=True, help="Number of different queries.")
def main(items: int, queries: int, **chosen: Any) -> None:
    """Measure search in isotropic vectors and in embeddings, with and without a filter, and from text to hits."""
    bench = Benchmark(__file__, "How fast and how accurate is search?", depends=DEPENDS, **chosen)
    import numpy as np

    for kind, vectors_of in KINDS.items():
        case = f"{kind}, {items:,}"
        cases = {case: None, f"{case}, 10 % match a filter": 0}
        if any(map(bench.wants, cases)):
            stored, query_vectors = np.split(vectors_of(items + queries), [items])
            with tempfile.TemporaryDirectory() as folder:
                measure(bench, cases, Path(folder), stored, query_vectors)
    if bench.wants("text query to hits, tiny bundle"):
        text_to_hits(bench)
    bench.finish()


def isotropic(count: int) -> Any:
    """Return random directions: unit vectors float32[count, DIM]."""
    import numpy as np

    vectors = np.random.default_rng(0).standard_normal((count, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shuffled_embeddings(count: int) -> Any:
    """Return embeddings of products in random order: float32[count, 128]."""
    import numpy as np
    from gallery import embeddings

    return np.random.default_rng(0).permutation(embeddings(count))


def rotated_embeddings(count: int) -> Any:
    """Return embeddings of products, rotated into DIM dimensions: float32[count, DIM]."""
    return rotate(shuffled_embeddings(count))


def rotate(vectors: Any) -> Any:
    """Map vectors into DIM dimensions by a fixed random orthogonal map."""
    import numpy as np

    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, vectors.shape[1])))
    return vectors @ basis.T.astype(np.float32)


KINDS: dict[str, Callable[[int], Any]] = {
    "embeddings, 512 dimensions": rotated_embeddings,
    "isotropic, 512 dimensions": isotropic,
}


def measure(bench: Benchmark, cases: dict[str, int | None], folder: Path, vectors: Any, queries: Any) -> None:
    """Measure the rows of one kind of vectors; the engines are built once for unfiltered and filtered queries."""
    import numpy as np
    from engines import assess, flat, local, score_of_rank, unidiff

    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    engines = {
        **unidiff(folder / "shop.catalog", vectors, OURS),
        "qdrant-client, local": local(vectors),
        "NumPy": flat(vectors),
    }
    try:
        for case, bucket in cases.items():
            if not bench.wants(case):
                continue
            least_scores = score_of_rank(vectors, queries, bucket)
            figures = {
                name: assess(engine.search, vectors, queries, least_scores, bucket) | _build_time(engine)
                for name, engine in engines.items()
            }
            contestants = {name: _sequential(engine.search, queries, bucket) for name, engine in engines.items()}
            workers = dict(_workers(bench, folder, bucket))
            try:
                bench.row(
                    case,
                    ours={name: contestants.pop(name) for name in OURS},
                    peers=contestants | workers,
                    figures=figures,
                    parameters={"items": len(vectors), "kind": case},
                    rounds=len(queries),
                    budget_s=20,
                )
            finally:
                for worker in workers.values():
                    worker.close()
    finally:
        for engine in engines.values():
            engine.close()


def _build_time(engine: Any) -> dict[str, float]:
    """Return how long building took; nothing for an engine that only copies the vectors."""
    return {"build_s": engine.build_s} if engine.build_s >= 1 else {}


def _sequential(search: Any, queries: Any, bucket: int | None) -> Callable[[], object]:
    endless = itertools.cycle(queries)
    return lambda: search(next(endless), bucket)


def _workers(bench: Benchmark, folder: Path, bucket: int | None) -> Iterator[tuple[str, Worker]]:
    python, threads = peer_python("search"), str(bench.threads)
    for key, name in PEERS.items():
        for ef in CURVE[key] if bucket is None else (EF,):
            filtered = "" if bucket is None else str(bucket)
            argv = [python, HERE / "search_peer.py", key, folder, threads, str(ef), filtered]
            yield f"{name}, ef {ef}", Worker(argv)


def text_to_hits(bench: Benchmark) -> None:
    """Tokenize, encode and search 1,000 products, next to the same encoder with a plain matrix product."""
    import numpy as np

    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render
    from unidiff_sdk.inference.encoder import Encoder

    chosen = products("fashion-woman", 1000, seed=1, split="test")
    # A number makes each text a new one: the catalog caches embeddings of texts.
    texts, peer_texts = ((f"{text}, {i}" for i, text in enumerate(itertools.cycle(TEXTS))) for _ in range(2))
    with Catalog() as catalog:
        catalog.add([render(p) for p in chosen], payloads=[{"catalog": p.catalog} for p in chosen])
        encoder = Encoder(catalog.bundle)
        vectors = np.array([record.vector for batch in catalog._store.scroll() for record in batch])

        def encode_and_scan() -> object:
            (query,) = encoder.encode_texts([next(peer_texts)])
            return np.argsort(-(vectors @ query))[:10]

        bench.row(
            "text query to hits, tiny bundle",
            ours={"UniDiff": lambda: catalog.search(next(texts))},
            peers={"the same encoder, NumPy": encode_and_scan},
            parameters={"items": len(chosen)},
            rounds=300,
        )


if __name__ == "__main__":
    main()
