"""Recall and speed of search after half of an indexed catalog was deleted.

Half of the catalog is deleted: at random, or the items nearest to the queries, which leaves holes in the index where
the queries lead. Each query is then answered by a catalog before and after its index is built again, which
`Catalog.delete` does, and by the engine's own search of the same index. Recall goes by score: a hit is correct if at
most nine of the remaining items score higher.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, options

HERE = Path(__file__).parent
QUERIES = 200
BATCH = 500  # items deleted in one call
BEFORE, DELETED, REBUILT = "UniDiff, nothing deleted", "UniDiff, half deleted", "UniDiff, index built again"
ENGINE = "Qdrant Edge's own search, half deleted"


@click.command()
@options
@click.option("--items", default=20_000, show_default=True, help="Number of vectors before the deletion.")
def main(items: int, **chosen: Any) -> None:
    """Measure search after half of the indexed items were deleted."""
    depends = [HERE / name for name in ("engines.py", "search.py", "gallery.py")]
    bench = Benchmark(__file__, "Does search find everything after half was deleted?", depends=depends, **chosen)
    import numpy as np
    from search import rotated_embeddings

    cases = {f"half of {items:,} x 512 embeddings deleted: {how}": choose for how, choose in CHOICES.items()}
    if any(map(bench.wants, cases)):
        vectors, queries = np.split(rotated_embeddings(items + QUERIES), [items])
        for case, choose in cases.items():
            if bench.wants(case):
                with tempfile.TemporaryDirectory() as folder:
                    measure(bench, case, Path(folder), vectors, queries, choose(vectors, queries))
    bench.finish()


def at_random(vectors: Any, queries: Any) -> Any:
    """Return the indices of half of the vectors."""
    import numpy as np

    return np.random.default_rng(0).permutation(len(vectors))[: len(vectors) // 2]


def neighbors(vectors: Any, queries: Any) -> Any:
    """Return the indices of the half that ranks highest for any query."""
    import numpy as np

    ranks = np.argsort(np.argsort(-(queries @ vectors.T), axis=1), axis=1)
    return np.argsort(ranks.min(axis=0), kind="stable")[: len(vectors) // 2]


CHOICES = {"at random": at_random, "the nearest to the queries": neighbors}


def measure(bench: Benchmark, case: str, folder: Path, vectors: Any, queries: Any, deleted: Any) -> None:
    """Measure one row. The figures of each state are measured in that state, the times of all in turns."""
    import numpy as np
    from engines import assess, filled_catalog, score_of_rank, search_by

    left = np.setdiff1d(np.arange(len(vectors)), deleted)
    least = score_of_rank(vectors[left], queries, None)
    catalogs = {name: filled_catalog(folder / name, vectors) for name in (BEFORE, DELETED, REBUILT)}
    searches = {name: search_by(catalog) for name, catalog in catalogs.items()}
    searches[ENGINE] = _engine_search(catalogs[DELETED])
    figures = {}
    try:
        for catalog in catalogs.values():
            catalog.optimize()
        for start in range(0, len(deleted), BATCH):
            keys = deleted[start : start + BATCH]
            catalogs[DELETED]._store.delete([_key(index) for index in keys])
        started = time.perf_counter()
        catalogs[REBUILT].delete([int(index) for index in deleted])
        built = {"build_s": round(time.perf_counter() - started, 1)}
        for name, search in searches.items():
            scores = score_of_rank(vectors, queries, None) if name == BEFORE else least
            figures[name] = assess(lambda query, _, search=search: search(query, None), vectors, queries, scores, None)
        figures[REBUILT] |= built
        contestants = {name: _sequential(search, queries) for name, search in searches.items()}
        engine = contestants.pop(ENGINE)
        bench.row(
            case,
            ours=contestants,
            peers={ENGINE: engine},
            figures=figures,
            parameters={"items": len(vectors)},
            rounds=len(queries),
            budget_s=20,
            note="Build time: that of one call of `delete` for half of the items, which builds the index again.",
        )
    finally:
        for catalog in catalogs.values():
            catalog.close()


def _key(index: Any) -> str:
    from unidiff_sdk.store.ids import key_of

    return key_of(int(index))


def _engine_search(catalog: Any) -> Any:
    """Return the engine's search with its default options over the shard of a catalog."""
    import numpy as np
    import qdrant_edge as edge

    def search(query: Any, bucket: int | None) -> Any:
        nearest: Any = edge.Query.Nearest(query.tolist(), using="image")
        points = catalog._store._shard.query(edge.QueryRequest(query=nearest, limit=10, with_payload=True))
        return np.array([point.payload["id"] for point in points if point.payload], np.int64)

    return search


def _sequential(search: Any, queries: Any) -> Any:
    endless = itertools.cycle(queries)
    return lambda: search(next(endless), None)


if __name__ == "__main__":
    main()
