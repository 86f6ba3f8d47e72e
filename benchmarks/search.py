"""Search among 100,000 vectors of 512 numbers: how fast, how right, how long to build, beside other engines.

Two kinds of vectors: isotropic noise, the hardest there is, and the built-in model's embeddings of drawn products.
Those have 128 numbers; a rotation into 512 dimensions leaves all their distances as they are. Recall goes by distance:
a hit counts if no more than nine items are truly closer, so that equals count. One query at a time, engines in turn.

Drawing 100,000 products takes some five minutes of two cores; the embeddings are kept in `--cache`.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, Seconds, Worker, options, peer_python

DIM, TOP, PASSING = 512, 10, 10  # one item in PASSING passes the filter
BATCH = 500
PEER = Path(__file__).with_name("search_peer.py")
WORDS = ("red striped dress", "a tall blue mug", "green boots, dotted", "a slim black coat", "yellow")


@click.command()
@options
@click.option("--items", default=100_000, show_default=True, help="How many vectors.")
@click.option(
    "--queries", default=300, show_default=True, help="How many queries, of each of which there is one round."
)
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "search", help="For embeddings.")
def main(items: int, queries: int, cache: Path, **chosen: Any) -> None:
    """Measure search on isotropic vectors, on embeddings, with a filter, and from words to hits."""
    bench = Benchmark(__file__, "How fast and how right is search among 100,000 items?", depends=[PEER], **chosen)
    import numpy as np

    for kind in ("isotropic", "embeddings"):
        cases = {f"{kind}, {items:,}": None, f"{kind}, {items:,}, {100 // PASSING} % pass": 0}
        if not any(map(bench.wants, cases)):
            continue
        rng = np.random.default_rng(0)
        draw = isotropic if kind == "isotropic" else embeddings
        vectors, asked = np.split(draw(items + queries, rng, cache), [items])
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/vectors.npy", vectors)
            np.save(f"{folder}/queries.npy", asked)
            engines = {
                "UniDiff": unidiff(Path(folder), vectors),
                "qdrant-client, local": local(vectors),
                "NumPy": flat(vectors),
            }
            for case, bucket in cases.items():
                if bench.wants(case):
                    measure(bench, case, engines, folder, vectors, asked, bucket)
            engines["UniDiff"].close()
    if bench.wants("words to hits, tiny bundle"):
        words_to_hits(bench)
    bench.finish()


def measure(
    bench: Benchmark, case: str, engines: dict[str, Engine], folder: str, vectors: Any, asked: Any, bucket: int | None
) -> None:
    """One row: every engine answers every query once for its recall and tail, then one query a round in turn."""
    import numpy as np

    allowed = np.ones(len(vectors), bool) if bucket is None else np.arange(len(vectors)) % PASSING == bucket
    tenth = [np.sort((vectors @ query)[allowed])[-TOP] for query in asked]
    figures, contestants = {}, {}
    for name, engine in engines.items():
        seconds, rights = [], []
        for query, least in zip(asked, tenth, strict=True):
            started = time.perf_counter()
            found = engine.search(query, bucket)
            seconds.append(time.perf_counter() - started)
            rights.append(np.sum((vectors[found] @ query >= least - 1e-6) & allowed[found]) / TOP)
        figures[name] = {
            "recall@10": round(float(np.mean(rights)), 4),
            "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 3),
            "build_s": round(engine.build_s, 1),
        }
        contestants[name] = one_by_one(engine, asked, bucket)
    workers = {
        name: Worker(
            [peer_python("search"), PEER, key, folder, str(bench.threads), "" if bucket is None else str(bucket)]
        )
        for name, key in {"FAISS HNSW": "faiss", "LanceDB": "lancedb"}.items()
    }
    ours = {"UniDiff": contestants.pop("UniDiff")}
    peers = contestants | workers
    parameters = {"items": len(vectors), "dim": DIM, "kind": case.split(",")[0], "filtered": bucket is not None}
    try:
        bench.row(case, ours=ours, peers=peers, figures=figures, parameters=parameters, rounds=len(asked))
    finally:
        for worker in workers.values():
            worker.close()


def one_by_one(engine: Engine, asked: Any, bucket: int | None) -> Callable[[], object]:
    """A contestant that answers the next query each time."""
    queries = itertools.cycle(asked)
    return lambda: engine.search(next(queries), bucket)


# ------------------------------------------------------------------------------------------------ vectors


def isotropic(count: int, rng: Any, cache: Path) -> Any:
    """Directions without any structure: float32[count, DIM] of length 1."""
    import numpy as np

    rows = rng.standard_normal((count, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(count: int, rng: Any, cache: Path) -> Any:
    """The built-in model's embeddings of as many drawn products, in any order, rotated into DIM dimensions."""
    import numpy as np

    from unidiff_sdk import Bundle
    from unidiff_sdk.datasets.synthetic import CATALOGUES, products, render
    from unidiff_sdk.encoder import Encoder

    bundle = Bundle.open()
    file = cache / f"embeddings-{bundle.fingerprint[:12]}-{count}.npy"
    if not file.is_file():
        encoder, shares = Encoder(bundle), np.array_split(np.arange(count), len(CATALOGUES))
        drawn: Iterator[Any] = (
            render(product)
            for name, share in zip(CATALOGUES, shares, strict=True)
            for product in products(name, len(share), seed=7, split="test")
        )
        parts = []
        with click.progressbar(length=count, label="Drawing and encoding") as bar:
            while batch := list(itertools.islice(drawn, 256)):
                parts.append(encoder.encode_images(batch))
                bar.update(len(batch))
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, np.concatenate(parts))
    vectors = np.load(file)
    rotation, _ = np.linalg.qr(rng.standard_normal((DIM, vectors.shape[1])))
    return rng.permutation(vectors) @ rotation.T.astype(np.float32)


# ------------------------------------------------------------------------------------------------ engines


class Engine:
    """Something that was built in `build_s` seconds and finds the TOP rows closest to a query."""

    def __init__(self, build: Callable[[], Callable[[Any, int | None], Any]], close: Callable[[], None] = lambda: None):
        started = time.perf_counter()
        self.search = build()
        self.build_s = time.perf_counter() - started
        self.close = close


def unidiff(folder: Path, vectors: Any) -> Engine:
    """What `Catalog.search(vector=…)` does, over Qdrant Edge, after `optimize`."""
    import numpy as np

    from unidiff_sdk.ids import key_of
    from unidiff_sdk.query import Query
    from unidiff_sdk.results import Hit
    from unidiff_sdk.search import Searcher, Window
    from unidiff_sdk.store import Record
    from unidiff_sdk.store.edge import EdgeStore

    def no_encoder() -> Any:
        raise AssertionError("a query by vector opens no model")

    def hit(payload: dict[str, Any], score: float) -> Hit:
        return Hit(payload["id"], score, None, payload, "", "", None)  # type: ignore[arg-type]

    store = EdgeStore(folder / "store", DIM)

    def build() -> Callable[[Any, int | None], Any]:
        for start in range(0, len(vectors), BATCH):
            rows = range(start, min(start + BATCH, len(vectors)))
            store.upsert([Record(key_of(k), vectors[k], {"id": k, "bucket": k % PASSING}) for k in rows])
        store.optimize()
        searcher = Searcher(store, no_encoder, hit)

        def search(query: Any, bucket: int | None) -> Any:
            window = Window.of(limit=TOP, where=None if bucket is None else {"bucket": bucket})
            (page,) = searcher.search([Query.of(vector=query)], window)
            return np.array([found.id for found in page])

        search(vectors[0], 0)  # makes the payload index
        return search

    return Engine(build, store.close)


def local(vectors: Any) -> Engine:
    """qdrant-client's own in-memory mode, which scans."""
    import numpy as np
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")

    def build() -> Callable[[Any, int | None], Any]:
        config = models.VectorParams(size=DIM, distance=models.Distance.DOT)
        with warnings.catch_warnings(action="ignore"):  # that it is not made for so many
            client.create_collection("c", vectors_config=config)
            client.upload_collection(
                "c", vectors, payload=({"bucket": k % PASSING} for k in range(len(vectors))), ids=range(len(vectors))
            )

        def search(query: Any, bucket: int | None) -> Any:
            test = models.FieldCondition(key="bucket", match=models.MatchValue(value=bucket or 0))
            condition = None if bucket is None else models.Filter(must=[test])
            points = client.query_points("c", query=query, limit=TOP, query_filter=condition).points
            return np.array([point.id for point in points])

        return search

    return Engine(build, client.close)


def flat(vectors: Any) -> Engine:
    """One matrix product and a partial sort: exact."""
    import numpy as np

    def build() -> Callable[[Any, int | None], Any]:
        buckets = [np.arange(bucket, len(vectors), PASSING) for bucket in range(PASSING)]
        parts = [vectors[rows] for rows in buckets]

        def search(query: Any, bucket: int | None) -> Any:
            scores = (vectors if bucket is None else parts[bucket]) @ query
            best = np.argpartition(-scores, TOP)[:TOP]
            best = best[np.argsort(-scores[best])]
            return best if bucket is None else buckets[bucket][best]

        return search

    return Engine(build)


def words_to_hits(bench: Benchmark) -> None:
    """Tokenise, encode and search 1,000 products, beside the same encoder with a plain matrix product."""
    import numpy as np

    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render
    from unidiff_sdk.encoder import Encoder

    chosen = products("fashion-woman", 1000, seed=1, split="test")
    texts, again = itertools.cycle(WORDS), itertools.cycle(WORDS)
    with Catalog() as catalog:
        catalog.add([render(p) for p in chosen], payloads=[{"catalogue": p.catalogue} for p in chosen])
        encoder = Encoder(catalog.bundle)
        vectors = np.array([record.vector for batch in catalog._store.scroll() for record in batch])

        def by_hand() -> object:
            (query,) = encoder.encode_texts([next(again)])
            return np.argsort(-(vectors @ query))[:TOP]

        def timed() -> Seconds:
            return Seconds(catalog.search(next(texts), limit=TOP).took_ms / 1000)

        bench.row(
            "words to hits, tiny bundle",
            ours={"UniDiff": timed},
            peers={"the same encoder, NumPy": by_hand},
            parameters={"items": len(chosen)},
            rounds=300,
        )


if __name__ == "__main__":
    main()
