"""The section of concurrency: 16 threads and an event loop call one catalog for ten minutes.

Every thread owns some ids, so that it knows what must be stored. The private memory is sampled; after a warm-up it must
be flat.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from unidiff_sdk import BusyError, Catalog, StoreError

from .corpus import COLORS, products
from .operations import left_overs

__all__ = ["MAX_GROWTH", "WARM_UP", "run_mixed", "slope_per_minute"]

THREADS, TASKS = 16, 8
IDS = 12  # items of one thread
SAMPLE_SECONDS = 1.0
KEPT_SAMPLES = 60  # pairs of seconds and MiB in the result
WARM_UP = 0.3  # share of the duration
# Bytes a call, which do not depend on the speed of the machine. A payload, a vector or an image that each call forgets
# to release is larger. Calls of one kind in 16 threads measured 40 to 300: the allocator's arenas, and deleted items of
# the engine.
MAX_GROWTH = 512
_MAX_ERRORS = 20  # tracebacks that are kept


class Calls:
    """What the threads did: calls by name, and foreign errors."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def record(self, name: str, act: Callable[[], Any], expected: type[Exception] | tuple[()] = ()) -> Any:
        """Make a call. `expected` is an error that is right at a busy time; returns None after an error."""
        with self._counted(name, expected):
            return act()

    async def arecord(self, name: str, call: Any, expected: type[Exception] | tuple[()] = ()) -> Any:
        """Await a call, as `record`."""
        with self._counted(name, expected):
            return await call

    @contextmanager
    def _counted(self, name: str, expected: type[Exception] | tuple[()]) -> Iterator[None]:
        try:
            yield
        except expected:
            self._count(f"{name} (busy)")
        except Exception:
            self._fail(name)
        else:
            self._count(name)

    def wrong(self, message: str) -> None:
        """Record a wrong result."""
        with self._lock:
            self.errors.append(message)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _fail(self, name: str) -> None:
        with self._lock:
            if len(self.errors) < _MAX_ERRORS:
                self.errors.append(f"{name}: {traceback.format_exc()[-1500:]}")
            else:
                self.counts["more errors"] += 1


def run_mixed(seconds: float, seed: int, corpus: Path, folder: Path) -> dict[str, Any]:
    """Run the calls, and return counts, errors, samples of the private memory and its slope."""
    calls, stop = Calls(), threading.Event()
    source = products(folder / "products", 6)
    expected: list[dict[str, str]] = [{} for _ in range(THREADS + 1)]
    samples: list[tuple[float, int]] = []
    with Catalog(folder / "shop.catalog", corpus / "colors") as catalog:
        catalog.add_folder(source)
        threads = [
            threading.Thread(target=_thread, args=(catalog, calls, stop, number, seed, expected[number]))
            for number in range(THREADS)
        ]
        threads.append(threading.Thread(target=_maintain, args=(catalog, calls, stop, seed, corpus, source, folder)))
        loop = threading.Thread(target=lambda: asyncio.run(_tasks(catalog, calls, stop, seed, expected[THREADS])))
        for thread in (*threads, loop):
            thread.start()
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            samples.append((elapsed, _private_memory()))
            stop.wait(min(SAMPLE_SECONDS, seconds / 20))
        stop.set()
        for thread in (*threads, loop):
            thread.join(120)
            if thread.is_alive():
                calls.wrong(f"{thread.name} did not end within 120 s")
        _compare(catalog, calls, expected)
    extra = left_overs(folder / "shop.catalog")
    if extra:
        calls.wrong(f"left-overs after closing: {extra[:3]}")
    slope = slope_per_minute([(at, size) for at, size in samples if at >= WARM_UP * seconds])
    return {
        "seconds": round(time.monotonic() - started, 1),
        "threads": THREADS,
        "tasks": TASKS,
        "calls": dict(sorted(calls.counts.items())),
        "items": sum(map(len, expected)),
        "errors": calls.errors,
        "memory": {
            "samples": [[round(at), size >> 20] for at, size in samples[:: max(1, len(samples) // KEPT_SAMPLES)]],
            "after_warm_up": next(size for at, size in samples if at >= WARM_UP * seconds),
            "last": samples[-1][1],
            "slope_per_minute": round(slope),
            "growth_per_call": round(slope / 60 * seconds / max(1, calls.counts.total())),
            "limit_per_call": MAX_GROWTH,
        },
    }


def _thread(
    catalog: Catalog, calls: Calls, stop: threading.Event, number: int, seed: int, expected: dict[str, str]
) -> None:
    rng = Random(f"mixed:{number}:{seed}")
    while not stop.is_set():
        color = rng.choice(COLORS)
        match rng.randrange(10):
            case 0 | 1:
                id, text = f"T{number}-{rng.randrange(IDS)}", f"a {color} thing {rng.randrange(1000)}"
                image = _image(color, rng)
                if calls.record("add", lambda i=image, t=text, d=id: catalog.add(i, t, d, {"thread": number})):
                    expected[id] = text
            case 2 if expected:
                id = rng.choice(sorted(expected))
                if calls.record("delete", lambda d=id: catalog.delete(d)) is not None:
                    del expected[id]
            case 3 if expected:
                id = rng.choice(sorted(expected))
                hit = calls.record("get", lambda d=id: catalog.get(d))
                if hit is None or hit.text != expected[id]:
                    calls.wrong(f"get({id!r}) is {hit and hit.text!r}, not {expected[id]!r}")
            case 4:
                calls.record("count", lambda: catalog.count({"thread": number}))
            case 5:
                calls.record("facets", lambda: catalog.facets("thread"))
            case 6:
                prompt = f"a {color} thing"
                calls.record("generate", lambda p=prompt: catalog.generate(p, n=1, steps=2, seed=1), BusyError)
            case _:
                where = rng.choice((None, {"thread": number}, {"thread": {"gte": 3}}))
                calls.record("search", lambda c=color, w=where: catalog.search(c, limit=5, where=w))


def _maintain(
    catalog: Catalog, calls: Calls, stop: threading.Event, seed: int, corpus: Path, source: Path, folder: Path
) -> None:
    """The calls that concern the whole catalog."""
    rng = Random(f"maintain:{seed}")
    while not stop.wait(rng.uniform(0.1, 1.0)):
        match rng.randrange(4):
            case 0:
                calls.record("optimize", catalog.optimize)
            case 1:
                bundle = corpus / rng.choice(("colors", "colors2"))
                calls.record("reindex", partial(catalog.reindex, bundle), BusyError)
            case 2:
                calls.record("add_folder", lambda: catalog.add_folder(source, prune=True))
            case _:
                calls.record("export", lambda: catalog.export(folder / "shop.parquet", overwrite=True))


async def _tasks(catalog: Catalog, calls: Calls, stop: threading.Event, seed: int, expected: dict[str, str]) -> None:
    async def one(number: int) -> None:
        rng = Random(f"task:{number}:{seed}")
        while not stop.is_set():
            color, id = rng.choice(COLORS), f"A{number}-{rng.randrange(IDS)}"
            match rng.randrange(4):
                case 0:
                    text = f"a {color} thing {rng.randrange(1000)}"
                    if await calls.arecord("aadd", catalog.aadd(_image(color, rng), text, id)):
                        expected[id] = text
                case 1 if id in expected:
                    if await calls.arecord("adelete", catalog.adelete(id)) is not None:
                        del expected[id]
                case 2:
                    await calls.arecord("agenerate", catalog.agenerate(f"a {color} thing", n=1, steps=2), BusyError)
                case _:
                    await calls.arecord("asearch", catalog.asearch(color, limit=5))

    await asyncio.gather(*(one(number) for number in range(TASKS)))


def _compare(catalog: Catalog, calls: Calls, expected: list[dict[str, str]]) -> None:
    """Compare what is stored with what was acknowledged."""
    stored = {hit.id: hit for hit in catalog.browse(limit=10_000)}
    wanted = {id: text for part in expected for id, text in part.items()}
    for id, text in wanted.items():
        hit = stored.get(id)
        if hit is None or hit.text != text:
            calls.wrong(f"{id!r} was acknowledged with {text!r}, but it is stored as {hit and hit.text!r}")
        else:
            hit.load_image()
    unexpected = [id for id in stored if str(id).startswith(("T", "A")) and id not in wanted]
    if unexpected:
        calls.wrong(f"{len(unexpected)} deleted items are stored, such as {unexpected[:3]}")
    try:
        found = catalog.search("red", limit=10_000)
    except StoreError as error:
        calls.wrong(f"the last search failed: {error}")
        return
    if len(found) != len(stored):
        calls.wrong(f"the last search finds {len(found)} of {len(stored)} items")


def _image(color: str, rng: Random) -> Any:
    from support.color_bundle import color_image

    return color_image(color, (24, 20 + rng.randrange(8)))


def _private_memory() -> int:
    """The resident memory in bytes without mapped files, which grow with what is stored."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))


def slope_per_minute(samples: list[tuple[float, int]]) -> float:
    """The slope of (seconds, bytes) by Theil and Sen, the median of all pairs, in bytes per minute.

    A single peak, such as that of a reindexing, does not change it.
    """
    step = max(1, len(samples) // 300)
    points = samples[::step]
    slopes = sorted(
        60 * (later[1] - earlier[1]) / (later[0] - earlier[0])
        for k, earlier in enumerate(points)
        for later in points[k + 1 :]
    )
    return slopes[len(slopes) // 2] if slopes else 0.0
