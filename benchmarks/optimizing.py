"""What searches and an event loop wait for while the index of 100,000 vectors is being built.

Each round builds the index of a fresh copy of the same catalog, while one thread searches ten times a second
or so (300 different queries, each answer compared with the exact one) and an event loop wakes every 5 ms. A wait is how
long a search took, or by how much the loop woke late. The peer is the engine's own `optimize`, called in a thread.
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
    """A contestant: builds the index of a fresh copy, and remembers the waits of all rounds.

    Args:
        filled: the folder of a catalog whose index is not built.
        opened: opens a copy; gives a search (query -> rows) and the call that builds.
    """

    def __init__(self, filled: Path, opened: Any, vectors: Any, asked: Any, tenth: Any) -> None:
        self.filled, self.opened, self.vectors = filled, opened, vectors
        self.questions = list(zip(asked, tenth, strict=True))
        self.searches: list[float] = []
        self.late: list[float] = []
        self.rights: list[float] = []

    def __call__(self) -> Seconds:
        with tempfile.TemporaryDirectory(dir=self.filled.parent) as folder:
            copy = Path(shutil.copytree(self.filled, Path(folder) / "copy.catalog"))
            with self.opened(copy) as (search, build):
                return Seconds(asyncio.run(self._watch(search, build)))

    async def _watch(self, search: Callable[[Any], Any], build: Callable[[], object]) -> float:
        search(self.questions[0][0])
        done = threading.Event()
        searching = threading.Thread(target=self._search, args=(search, done))
        searching.start()
        started = time.perf_counter()
        building = asyncio.get_running_loop().run_in_executor(None, build)
        before = started
        while not building.done():
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            self.late.append(now - before - TICK)
            before = now
        took = time.perf_counter() - started
        done.set()
        searching.join()
        await building
        return took

    def _search(self, search: Callable[[Any], Any], done: threading.Event) -> None:
        answers = []
        for query, least in itertools.cycle(self.questions):
            before = time.perf_counter()
            found = search(query)
            self.searches.append(time.perf_counter() - before)
            answers.append((query, least, found))
            if done.wait(PAUSE):
                break
        for query, least, found in answers:  # afterwards, so that it does not slow the building down
            self.rights.append(float((self.vectors[found] @ query >= least - 1e-6).sum()) / len(found))

    def figures(self) -> dict[str, float]:
        """The longest waits of all rounds, the usual search meanwhile, and how right it was."""
        ordered = sorted(self.searches)
        return {
            "recall@10": round(sum(self.rights) / len(self.rights), 4),
            "p50_ms": round(1000 * ordered[len(ordered) // 2], 3),
            "p99_ms": round(1000 * ordered[len(ordered) * 99 // 100], 3),
            "longest_search_ms": round(1000 * ordered[-1], 1),
            "longest_tick_ms": round(1000 * max(self.late), 1),
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
    """The engine alone, in a thread of this process, on the catalog's shard."""
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
@click.option("--items", default=100_000, show_default=True, help="How many vectors.")
def main(items: int, **chosen: Any) -> None:
    """Measure the longest waits while an index is built."""
    depends = [HERE / name for name in ("engines.py", "search.py", "gallery.py")]
    bench = Benchmark(__file__, "What waits while a search index is being built?", depends=depends, **chosen)
    import numpy as np
    from engines import filled_catalog, truth
    from search import turned

    case = f"build the index of {items:,} x 512, embeddings"
    if bench.wants(case):
        vectors, asked = np.split(turned(items + QUERIES), [items])
        tenth = truth(vectors, asked, None)
        with tempfile.TemporaryDirectory() as folder:
            filled = Path(folder) / "filled.catalog"
            filled_catalog(filled, vectors).close()
            contestants = {
                name: Building(filled, opened, vectors, asked, tenth)
                for name, opened in {"UniDiff": _catalog, "Edge, in this process": _engine}.items()
            }
            bench.row(
                case,
                ours={"UniDiff": contestants["UniDiff"]},
                peers={"Edge, in this process": contestants["Edge, in this process"]},
                parameters={"items": items},
                rounds=min(bench.rounds, 2),
                warm_up=0,
                note="The median is of the whole build, which goes on beside ten searches a second.",
            )
    bench.finish()


if __name__ == "__main__":
    main()
