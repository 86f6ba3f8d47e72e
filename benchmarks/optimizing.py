"""Latency of searches and of an event loop while the index of 100,000 vectors is built.

Each round builds the index of a new copy of the same catalog. Meanwhile one thread searches about ten times a second
(300 different queries, each answer compared with the exact one), and an event loop wakes every 5 ms. Reported are the
times of the searches and the delays of the event loop. The peer is the engine's own `optimize`, called in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Seconds, options

HERE = Path(__file__).parent
QUERIES = 300
TICK, PAUSE = 0.005, 0.1


class Building:
    """A contestant that builds the index of a new copy and records the latencies of all rounds.

    Args:
        filled: the folder of a catalog without an index.
        open_copy: opens a copy; returns a search (query -> indices) and the call that builds the index.
    """

    def __init__(self, filled: Path, open_copy: Any, vectors: Any, queries: Any, least_scores: Any) -> None:
        self.filled, self.open_copy, self.vectors = filled, open_copy, vectors
        self.queries = list(zip(queries, least_scores, strict=True))
        self.searches: list[float] = []
        self.delays: list[float] = []
        self.recalls: list[float] = []

    def __call__(self) -> Seconds:
        with tempfile.TemporaryDirectory(dir=self.filled.parent) as folder:
            copy = Path(shutil.copytree(self.filled, Path(folder) / "copy.catalog"))
            with self.open_copy(copy) as (search, build):
                return Seconds(asyncio.run(self._watch(search, build)))

    async def _watch(self, search: Callable[[Any], Any], build: Callable[[], object]) -> float:
        search(self.queries[0][0])
        done = threading.Event()
        searching = threading.Thread(target=self._search, args=(search, done))
        searching.start()
        started = time.perf_counter()
        building = asyncio.get_running_loop().run_in_executor(None, build)
        before = started
        while not building.done():
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            self.delays.append(now - before - TICK)
            before = now
        took = time.perf_counter() - started
        done.set()
        searching.join()
        await building
        return took

    def _search(self, search: Callable[[Any], Any], done: threading.Event) -> None:
        answers = []
        for query, least in itertools.cycle(self.queries):
            before = time.perf_counter()
            found = search(query)
            self.searches.append(time.perf_counter() - before)
            answers.append((query, least, found))
            if done.wait(PAUSE):
                break
        for query, least, found in answers:  # afterwards, so that it does not slow down the build
            self.recalls.append(float((self.vectors[found] @ query >= least - 1e-6).sum()) / len(found))

    def figures(self) -> dict[str, float]:
        """Return recall, percentiles of the searches, and the longest search and delay of all rounds."""
        ordered = sorted(self.searches)
        return {
            "recall@10": round(sum(self.recalls) / len(self.recalls), 4),
            "p50_ms": round(1000 * ordered[len(ordered) // 2], 3),
            "p99_ms": round(1000 * ordered[len(ordered) * 99 // 100], 3),
            "longest_search_ms": round(1000 * ordered[-1], 1),
            "longest_tick_ms": round(1000 * max(self.delays), 1),
        }


@contextmanager
def _catalog(folder: Path) -> Iterator[tuple[Any, Callable[[], object]]]:
    from engines import search_by

    from unidiff_sdk import Catalog

    with Catalog(folder, create=False) as catalog:
        search = search_by(catalog)
        yield lambda query: search(query, None), catalog.optimize


@contextmanager
def _engine(folder: Path) -> Iterator[tuple[Any, Callable[[], object]]]:
    """Open the catalog's shard with the engine alone, in this process."""
    import numpy as np
    import qdrant_edge as edge

    shard = edge.EdgeShard.load(str(folder / "vectors" / "0"))

    def search(query: Any) -> Any:
        nearest: Any = edge.Query.Nearest(query.tolist(), using="image")
        points = shard.query(edge.QueryRequest(query=nearest, limit=10, with_payload=True))
        return np.array([point.payload["id"] for point in points if point.payload])

    try:
        yield search, shard.optimize
    finally:
        shard.close()


@click.command()
@options
@click.option("--items", default=100_000, show_default=True, help="Number of vectors.")
def main(items: int, **chosen: Any) -> None:
    """Measure the longest latencies while an index is built."""
    depends = [HERE / name for name in ("engines.py", "search.py", "gallery.py")]
    bench = Benchmark(__file__, "How long do searches wait while an index is built?", depends=depends, **chosen)
    import numpy as np
    from engines import filled_catalog, score_of_rank
    from search import rotated_embeddings

    case = f"build an index of {items:,} x 512 embeddings"
    if bench.wants(case):
        vectors, queries = np.split(rotated_embeddings(items + QUERIES), [items])
        least_scores = score_of_rank(vectors, queries, None)
        with tempfile.TemporaryDirectory() as folder:
            filled = Path(folder) / "filled.catalog"
            filled_catalog(filled, vectors).close()
            contestants = {
                name: Building(filled, open_copy, vectors, queries, least_scores)
                for name, open_copy in {"UniDiff": _catalog, "Qdrant Edge, in this process": _engine}.items()
            }
            bench.row(
                case,
                ours={"UniDiff": contestants["UniDiff"]},
                peers={"Qdrant Edge, in this process": contestants["Qdrant Edge, in this process"]},
                parameters={"items": items},
                rounds=min(bench.rounds, 2),
                warm_up=0,
                note="The time is that of the whole build, during ten searches a second.",
            )
    bench.finish()


if __name__ == "__main__":
    main()
