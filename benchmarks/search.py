"""Search among 100,000 vectors: how fast, how right, how long to build, `Catalog` on Qdrant Edge beside other engines.

Two kinds of vectors: isotropic noise of 512 numbers, the hardest there is, and the built-in model's embeddings of drawn
products (`gallery.py`). Those have 128 numbers, for so wide is that model: they are turned into 512 dimensions, which
leaves all their distances as they were. The queries are embeddings of products that are not stored. Recall goes by
distance: a hit counts if no more than nine items are truly closer, so that equals count. One query at a time: first
one after another (recall, p50, p99), then in turn with the other engines (median, ratio).
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
EF = 128  # candidates at search, of the peers that let one choose; more and fewer for the curve
CURVE = {"faiss": (32, EF, 512), "lancedb": (EF, 512)}
PEERS = {"faiss": "FAISS HNSW", "lancedb": "LanceDB"}
WORDS = ("red striped dress", "a tall blue mug", "green boots, dotted", "a slim black coat", "yellow")


@click.command()
@options
@click.option("--items", default=100_000, show_default=True, help="How many vectors.")
@click.option("--queries", default=300, show_default=True, help="How many different queries.")
def main(items: int, queries: int, **chosen: Any) -> None:
    """Measure search on isotropic vectors, on embeddings, with a filter, and from words to hits."""
    bench = Benchmark(__file__, "How fast and how right is search?", depends=DEPENDS, **chosen)
    import numpy as np

    for kind, draw in KINDS.items():
        case = f"{kind}, {items:,}"
        cases = {case: None, f"{case}, 10 % pass a filter": 0}
        if any(map(bench.wants, cases)):
            vectors, asked = np.split(draw(items + queries), [items])
            with tempfile.TemporaryDirectory() as folder:
                measure(bench, cases, Path(folder), vectors, asked)
    if bench.wants("words to hits, tiny bundle"):
        words_to_hits(bench)
    bench.finish()


def isotropic(count: int) -> Any:
    """Directions without any structure: float32[count, DIM] of length 1."""
    import numpy as np

    rows = np.random.default_rng(0).standard_normal((count, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def drawn(count: int) -> Any:
    """The embeddings as they are, in any order: float32[count, 128]."""
    import numpy as np
    from gallery import embeddings

    return np.random.default_rng(0).permutation(embeddings(count))


def turned(count: int) -> Any:
    """The embeddings, turned into DIM dimensions: float32[count, DIM]."""
    return turn(drawn(count))


def turn(vectors: Any) -> Any:
    """Vectors after a random orthogonal map into DIM dimensions, always the same one."""
    import numpy as np

    map, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, vectors.shape[1])))
    return vectors @ map.T.astype(np.float32)


KINDS: dict[str, Callable[[int], Any]] = {
    "embeddings, 512 numbers": turned,
    "isotropic, 512 numbers": isotropic,
}


def measure(bench: Benchmark, cases: dict[str, int | None], folder: Path, vectors: Any, asked: Any) -> None:
    """The rows of one kind of vectors: engines are built once, unfiltered and filtered queries asked of them."""
    import numpy as np
    from engines import assess, flat, local, truth, unidiff

    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", asked)
    engines = {
        "UniDiff": unidiff(folder / "shop.catalog", vectors),
        "qdrant-client, local": local(vectors),
        "NumPy": flat(vectors),
    }
    try:
        for case, bucket in cases.items():
            if not bench.wants(case):
                continue
            tenth = truth(vectors, asked, bucket)
            figures = {
                name: assess(engine.search, vectors, asked, tenth, bucket) | {"build_s": engine.build_s}
                for name, engine in engines.items()
            }
            contestants = {name: _one_by_one(engine.search, asked, bucket) for name, engine in engines.items()}
            workers = dict(_workers(bench, folder, bucket))
            try:
                bench.row(
                    case,
                    ours={"UniDiff": contestants.pop("UniDiff")},
                    peers=contestants | workers,
                    figures=figures,
                    parameters={"items": len(vectors), "kind": case},
                    rounds=len(asked),
                    budget_s=20,
                )
            finally:
                for worker in workers.values():
                    worker.close()
    finally:
        for engine in engines.values():
            engine.close()


def _one_by_one(search: Any, asked: Any, bucket: int | None) -> Callable[[], object]:
    queries = itertools.cycle(asked)
    return lambda: search(next(queries), bucket)


def _workers(bench: Benchmark, folder: Path, bucket: int | None) -> Iterator[tuple[str, Worker]]:
    python, threads = peer_python("search"), str(bench.threads)
    for key, name in PEERS.items():
        for ef in CURVE[key] if bucket is None else (EF,):
            filtered = "" if bucket is None else str(bucket)
            argv = [python, HERE / "search_peer.py", key, folder, threads, str(ef), filtered]
            yield f"{name}, ef {ef}", Worker(argv)


def words_to_hits(bench: Benchmark) -> None:
    """Tokenize, encode and search 1,000 products, beside the same encoder with a plain matrix product."""
    import numpy as np

    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render
    from unidiff_sdk.inference.encoder import Encoder

    chosen = products("fashion-woman", 1000, seed=1, split="test")
    # A number makes each text one that was not asked for before: ours remembers those.
    texts, again = ((f"{words}, {i}" for i, words in enumerate(itertools.cycle(WORDS))) for _ in range(2))
    with Catalog() as catalog:
        catalog.add([render(p) for p in chosen], payloads=[{"catalog": p.catalog} for p in chosen])
        encoder = Encoder(catalog.bundle)
        vectors = np.array([record.vector for batch in catalog._store.scroll() for record in batch])

        def by_hand() -> object:
            (query,) = encoder.encode_texts([next(again)])
            return np.argsort(-(vectors @ query))[:10]

        bench.row(
            "words to hits, tiny bundle",
            ours={"UniDiff": lambda: catalog.search(next(texts))},
            peers={"the same encoder, NumPy": by_hand},
            parameters={"items": len(chosen)},
            rounds=300,
        )


if __name__ == "__main__":
    main()
