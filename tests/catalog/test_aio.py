"""The catalog under asyncio: the same answers, an event loop that goes on, and what cancelling does."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, OptionError, StoreError
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.inference.encoder import Encoder

pytestmark = pytest.mark.filterwarnings('ignore:The bundle "toy" was trained')
PATIENCE = 30  # seconds until a blocked event loop is taken for one


def shade(n: int) -> Image.Image:
    return Image.new("RGB", (24, 24), (9 * n, 255 - 9 * n, 90))


def test_every_twin_is_its_method(toy: Path) -> None:
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
        with pytest.raises(StoreError, match="no catalog"):
            async with Catalog.aopen("nowhere", create=False):
                pytest.fail("it is not there")

    asyncio.run(use())


def test_twins_look_like_their_methods() -> None:
    pairs = [
        (getattr(Catalog, name), getattr(Catalog, name[1:]))
        for name in dir(Catalog)
        if name.startswith("a") and inspect.iscoroutinefunction(getattr(Catalog, name)) and name != "aopen"
    ]
    assert len(pairs) == 16
    for awaited, method in pairs:
        assert inspect.signature(awaited) == inspect.signature(method)
        assert awaited.__name__ == f"a{method.__name__}" and f"`{method.__name__}`" in awaited.__doc__


ENCODING: dict[str, Callable[[Catalog, Path], Awaitable[Any]]] = {
    "asearch": lambda catalog, folder: catalog.asearch(image=shade(1)),
    "aadd": lambda catalog, folder: catalog.aadd(shade(99), ids="new"),
    "aadd_folder": lambda catalog, folder: catalog.aadd_folder(folder),
    "agenerate": lambda catalog, folder: catalog.agenerate("red", steps=2, seed=0),
    "areindex": lambda catalog, folder: catalog.areindex(make_toy_bundle(folder.parent / "other", seed=1)),
}


@pytest.mark.parametrize("name", ENCODING)
def test_the_loop_goes_on_meanwhile(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The encoder goes on only when the loop has ticked ten times since it was asked: blocked, it would never."""
    (tmp_path / "products").mkdir()
    shade(8).save(tmp_path / "products" / "8.png")
    (tmp_path / "products" / "metadata.jsonl").write_text('{"file_name": "8.png", "text": "x"}\n')
    asked, ticked = threading.Event(), threading.Event()
    encode = Encoder.encode_pixels

    def waits(self: Encoder, pixels: np.ndarray) -> np.ndarray:
        asked.set()
        assert ticked.wait(PATIENCE), "the event loop was blocked"
        return encode(self, pixels)

    async def tick() -> None:
        since = 0
        while since < 10:
            await asyncio.sleep(0.001)
            since += asked.is_set()
        ticked.set()

    async def use() -> None:
        async with Catalog(bundle=toy) as catalog:
            await catalog.aadd([shade(n) for n in range(3)])
            monkeypatch.setattr(Encoder, "encode_pixels", waits)
            await asyncio.gather(ENCODING[name](catalog, tmp_path / "products"), tick())

    asyncio.run(use())
    assert asked.is_set() and ticked.is_set()


def test_calls_at_the_same_time(toy: Path) -> None:
    async def use() -> list[Any]:
        async with Catalog(bundle=toy) as catalog:
            await asyncio.gather(*(catalog.aadd(shade(n), ids=n, payloads={"n": n}) for n in range(24)))
            pages = await asyncio.gather(*(catalog.asearch(image=shade(n), where={"n": n}) for n in range(24)))
            return [hit.id for page in pages for hit in page]

    assert asyncio.run(use()) == list(range(24))


def test_a_cancelled_generation_stops_drawing(toy: Path) -> None:
    began, steps = threading.Event(), list[int]()

    def callback(done: int, total: int) -> None:
        steps.append(done)
        began.set()
        if done == 2:
            assert cancelled.wait(PATIENCE)

    async def use() -> None:
        async with Catalog(bundle=toy) as catalog:
            task = asyncio.ensure_future(catalog.agenerate("red boots", steps=50, seed=0, callback=callback))
            while len(steps) < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled.set()
            assert len(await catalog.agenerate("red boots", steps=2, seed=0)) == 1  # and the model is free again

    cancelled = threading.Event()
    asyncio.run(use())
    assert max(steps) <= 3


def test_context_variables_come_along() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")

    async def use() -> str:
        request.set("abc")
        return await in_thread(request.get)

    assert asyncio.run(use()) == "abc"
