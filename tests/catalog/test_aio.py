"""The async variants of a catalog: same results, a responsive event loop, and cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.color_bundle import make_color_bundle
from support.recorded import open_watched

from unidiff_sdk import Bundle, BusyError, Catalog, OptionError, StoreError
from unidiff_sdk.catalog import aio
from unidiff_sdk.catalog.aio import GENERATING, MAX_GENERATING, READING, WRITING, in_thread

pytestmark = pytest.mark.filterwarnings('ignore:The bundle "toy" was trained')
TIMEOUT = 30  # seconds after which an event loop counts as blocked


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "colors")


def shade(n: int) -> Image.Image:
    return Image.new("RGB", (24, 24), (9 * n, 255 - 9 * n, 90))


def test_async_variants_return_the_same_results(toy: Path) -> None:
    async def use() -> None:
        async with Catalog.aopen(":memory:", toy) as catalog:
            columns = [{"n": n, "kind": "even" if n % 2 == 0 else "odd"} for n in range(9)]
            assert await catalog.aadd([shade(n) for n in range(9)], ids=list(range(9)), payloads=columns) == [*range(9)]
            assert await catalog.acount({"kind": "odd"}) == 4
            page, same = await catalog.asearch(image=shade(3), limit=4), catalog.search(image=shade(3), limit=4)
            assert page.hits == same.hits and page[0].id == 3
            batch = await catalog.asearch_batch(["red", {"image": shade(5)}], limit=2)
            assert [len(page) for page in batch] == [2, 2] and batch[1][0].id == 5
            assert [hit.id for hit in await catalog.abrowse(order_by="-n", limit=2)] == [8, 7]
            assert await catalog.afacets("kind") == {"even": 5, "odd": 4}
            assert await catalog.aget(4) == catalog.get(4)
            assert len(await catalog.aduplicates(0.5)) == len(catalog.duplicates(0.5))
            generation = await catalog.agenerate("red boots", n=2, seed=7, steps=2)
            again = catalog.generate("red boots", n=2, seed=7, steps=2)
            assert [made.seed for made in generation] == [made.seed for made in again]
            assert all(np.array_equal(a.image, b.image) for a, b in zip(generation, again, strict=True))
            assert await catalog.adelete([1, 2, "none"]) == 2
            await catalog.aoptimize()
            with pytest.raises(OptionError, match="limit=0"):
                await catalog.asearch("red", limit=0)
        with pytest.raises(StoreError, match="is closed"):
            await catalog.acount()
        catalog = await Catalog.aopen(":memory:", toy)
        assert await catalog.acount() == 0
        await catalog.aclose()
        with pytest.raises(StoreError, match="There is no catalog"):
            async with Catalog.aopen("nowhere", create=False):
                pytest.fail("it is not there")

    asyncio.run(use())


def test_async_variants_have_the_signatures_of_their_methods() -> None:
    pairs = [
        (getattr(Catalog, name), getattr(Catalog, name[1:]))
        for name in dir(Catalog)
        if name.startswith("a") and inspect.iscoroutinefunction(getattr(Catalog, name)) and name != "aopen"
    ]
    assert len(pairs) == 21
    for awaited, method in pairs:
        assert inspect.signature(awaited) == inspect.signature(method)
        assert awaited.__name__ == f"a{method.__name__}" and f"`{method.__name__}`" in awaited.__doc__


ENCODING: dict[str, Callable[[Catalog, Path, Bundle], Awaitable[Any]]] = {
    "asearch": lambda catalog, folder, other: catalog.asearch(image=shade(1)),
    "aadd": lambda catalog, folder, other: catalog.aadd(shade(99), ids="new"),
    "aadd_folder": lambda catalog, folder, other: catalog.aadd_folder(folder),
    "agenerate": lambda catalog, folder, other: catalog.agenerate("red", steps=2, seed=0),
    "areindex": lambda catalog, folder, other: catalog.areindex(other),
}


@pytest.mark.parametrize("name", ENCODING)
def test_event_loop_is_not_blocked(tmp_path: Path, colors: Path, name: str) -> None:
    """The encoder waits until the event loop has run ten times, which a blocked loop never would."""
    (tmp_path / "products").mkdir()
    shade(8).save(tmp_path / "products" / "8.png")
    (tmp_path / "products" / "metadata.jsonl").write_text('{"file_name": "8.png", "text": "x"}\n')
    encoding, ticked, watching = threading.Event(), threading.Event(), threading.Event()

    def wait(graph: str, feeds: Mapping[str, np.ndarray]) -> None:
        if graph == "image_encoder" and watching.is_set():
            encoding.set()
            assert ticked.wait(TIMEOUT), "the event loop was blocked"

    async def tick() -> None:
        since = 0
        while since < 10:
            await asyncio.sleep(0.001)
            since += encoding.is_set()
        ticked.set()

    async def use() -> None:
        other = open_watched(make_color_bundle(tmp_path / "other", variant=1), wait)
        async with Catalog(bundle=open_watched(colors, wait)) as catalog:
            await catalog.aadd([shade(n) for n in range(3)])
            watching.set()
            await asyncio.gather(ENCODING[name](catalog, tmp_path / "products", other), tick())

    asyncio.run(use())
    assert encoding.is_set() and ticked.is_set()


def test_concurrent_calls_return_their_own_results(toy: Path) -> None:
    async def use() -> list[Any]:
        async with Catalog(bundle=toy) as catalog:
            await asyncio.gather(*(catalog.aadd(shade(n), ids=n, payloads={"n": n}) for n in range(24)))
            pages = await asyncio.gather(*(catalog.asearch(image=shade(n), where={"n": n}) for n in range(24)))
            return [hit.id for page in pages for hit in page]

    assert asyncio.run(use()) == list(range(24))


def test_cancelled_generation_stops(toy: Path) -> None:
    steps: list[int] = []

    def callback(done: int, total: int) -> None:
        steps.append(done)
        if done == 2:
            assert cancelled.wait(TIMEOUT)

    async def use() -> None:
        async with Catalog(bundle=toy) as catalog:
            task = asyncio.ensure_future(catalog.agenerate("red boots", steps=50, seed=0, callback=callback))
            while len(steps) < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled.set()
            assert len(await catalog.agenerate("red boots", steps=2, seed=0)) == 1  # the model is free again

    cancelled = threading.Event()
    asyncio.run(use())
    assert max(steps) <= 3


def test_context_variables_are_passed_to_the_thread() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")

    async def use() -> str:
        request.set("abc")
        return await in_thread(request.get)

    assert asyncio.run(use()) == "abc"


# ------------------------------------------------------------------------------------------------ load


def held_generator(toy: Path, released: threading.Event) -> Bundle:
    """A bundle whose UNet waits until `released` is set."""

    def wait(graph: str, feeds: Mapping[str, np.ndarray]) -> None:
        if graph == "unet":
            assert released.wait(TIMEOUT)

    return open_watched(toy, wait)


def test_waiting_generations_delay_no_search_and_are_limited(toy: Path) -> None:
    released = threading.Event()

    async def use() -> None:
        async with Catalog(bundle=held_generator(toy, released)) as catalog:
            await catalog.aadd(shade(1), ids=1)
            tasks = [asyncio.ensure_future(catalog.agenerate("red", steps=1, seed=n)) for n in range(99)]
            tasks.append(asyncio.ensure_future(catalog.asearch("red boots", imagine=1)))
            refused, _ = await asyncio.wait(tasks, timeout=0.5)
            assert len(refused) == len(tasks) - MAX_GENERATING
            assert all(isinstance(task.exception(), BusyError) for task in refused)
            assert "64 generations are running, which is the limit" in str(refused.pop().exception())
            assert (await asyncio.wait_for(catalog.asearch("red"), TIMEOUT))[0].id == 1
            await asyncio.wait_for(catalog.aadd(shade(2), ids=2), TIMEOUT)
            released.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(not isinstance(result, BaseException) for result in results) == MAX_GENERATING
            assert len(await catalog.agenerate("red", steps=1, seed=0)) == 1, "there is room again"

    asyncio.run(use())


def test_waiting_writes_delay_no_search(toy: Path) -> None:
    async def use() -> None:
        async with Catalog(bundle=toy) as catalog:
            await catalog.aadd(shade(1), ids=1)
            with catalog._opened.lock:  # as if a write took long
                tasks = [asyncio.ensure_future(catalog.aadd(shade(n), ids=n)) for n in range(2, 100)]
                await asyncio.sleep(0.2)
                assert (await asyncio.wait_for(catalog.asearch("red"), TIMEOUT))[0].id == 1
            await asyncio.gather(*tasks)
            assert await catalog.acount() == 99

    asyncio.run(use())


@pytest.mark.parametrize("how", ["close", "aclose"])
def test_close_ends_waiting_generations(toy: Path, how: str) -> None:
    released = threading.Event()

    async def use() -> list[Any]:
        catalog = Catalog(bundle=held_generator(toy, released))
        tasks = [asyncio.ensure_future(catalog.agenerate("red", steps=1, seed=n)) for n in range(MAX_GENERATING)]
        while len(catalog._opened.snapshot.generator._batcher._requests) < MAX_GENERATING:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(catalog.aclose() if how == "aclose" else asyncio.to_thread(catalog.close), TIMEOUT)
        done, _ = await asyncio.wait(tasks, timeout=1)
        assert len(done) >= MAX_GENERATING - 1, "all but the one in the UNet end at once"
        released.set()
        with pytest.raises(StoreError, match="is closed"):
            await catalog.agenerate("red", steps=1, seed=0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(use())
    assert {str(result) for result in results if isinstance(result, StoreError)} == {
        "The catalog :memory: was closed, which ended the generation."
    }
    assert all(isinstance(result, StoreError) for result in results)


def test_cancelled_generations_that_wait_make_room_at_once(toy: Path) -> None:
    released = threading.Event()

    async def use() -> None:
        async with Catalog(bundle=held_generator(toy, released)) as catalog:
            tasks = [asyncio.ensure_future(catalog.agenerate("red", steps=1, seed=n)) for n in range(MAX_GENERATING)]
            batcher = catalog._opened.snapshot.generator._batcher
            while len(batcher._requests) < MAX_GENERATING:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            assert all(
                isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True)
            )
            async with asyncio.timeout(TIMEOUT):
                while len(batcher._requests) > 1:  # the one in the UNet
                    await asyncio.sleep(0.01)
            again = asyncio.ensure_future(catalog.agenerate("red", steps=1, seed=0))
            await asyncio.sleep(0.1)
            assert not again.done()
            released.set()
            assert len(await again) == 1

    asyncio.run(use())


def test_searches_beyond_the_limit_are_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio.READING, "_free", threading.Semaphore(3))
    monkeypatch.setattr(aio.READING, "_limit", 3)

    async def use() -> list[Any]:
        async with Catalog(bundle=toy) as catalog:
            with catalog._opened._searcher_lock:
                tasks = [asyncio.ensure_future(catalog.acount()) for _ in range(5)]
                await asyncio.sleep(0.1)
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(use())
    assert results[:3] == [0, 0, 0] and all(isinstance(result, BusyError) for result in results[3:])


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_generations_yield_to_searches() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def of_pools() -> list[int]:
        return [await in_thread(priority, pool) for pool in (READING, WRITING, GENERATING)]

    ours = priority()
    assert asyncio.run(of_pools()) == [ours, ours, min(19, ours + 10)] and priority() == ours
