"""Async variants of methods: each call runs in a thread, so the event loop is not blocked."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from unidiff_sdk._internal.text import hide_key
from unidiff_sdk.errors import GenerationError

__all__ = ["Opening", "Resource", "async_variant", "cancellable", "in_thread"]

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")

# A pool of our own: the event loop's default pool has few threads, which the application needs, and a reindexing may
# take hours. A thread starts only when all others are busy; calls beyond the limit are queued.
_THREADS = 64
_pool = ThreadPoolExecutor(_THREADS, "unidiff")


def _replace_pool() -> None:
    """Give a forked child a pool of its own: the threads of the parent's pool do not exist there."""
    global _pool
    _pool = ThreadPoolExecutor(_THREADS, "unidiff")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_pool)


async def in_thread(call: Callable[[], R]) -> R:
    """Run a call in a thread with the caller's context variables, and return its result.

    Cancelling the task stops the waiting. A call that has started runs to its end.
    """
    import asyncio  # 20 ms that synchronous applications do not pay at import

    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_pool, lambda: context.run(call))


class Resource:
    """An object to open and close: with `with`, `async with`, or `await`."""

    def close(self) -> None:
        """Release the resource."""
        raise NotImplementedError

    @classmethod
    def aopen(cls: type[C], *args: Any, **kwargs: Any) -> Opening[C]:
        """Open in a thread: `await Catalog.aopen(…)`, or `async with Catalog.aopen(…) as catalog`."""
        return Opening(partial(cls, *args, **hide_key(kwargs)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await in_thread(self.close)


C = TypeVar("C", bound=Resource)


class Opening(Generic[C]):
    """Opens a resource in a thread: with `await`, or with `async with`, which also closes it."""

    def __init__(self, open: Callable[[], C]) -> None:
        self._open = open

    def __await__(self) -> Generator[Any, None, C]:
        return in_thread(self._open).__await__()

    async def __aenter__(self) -> C:
        self._opened = await self
        return self._opened

    async def __aexit__(self, *exception: object) -> None:
        await in_thread(self._opened.close)


def async_variant(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The async variant of a method, with the same arguments, result and errors."""

    @wraps(method)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await in_thread(partial(method, self, *args, **kwargs))

    variant.__name__ = f"a{method.__name__}"
    variant.__qualname__ = f"{method.__qualname__.removesuffix(method.__name__)}{variant.__name__}"
    variant.__doc__ = f"The async variant of `{method.__name__}`, with the same arguments, result and errors."
    return variant


def cancellable(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """As `async_variant`, for a method with a `callback=`. Cancelling the task stops the work at the next callback."""

    plain = async_variant(method)

    @wraps(plain)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Callable[..., None] | None = kwargs.pop("callback", None)  # type: ignore[assignment]
        cancelled = threading.Event()

        def callback(*progress: Any) -> None:
            if cancelled.is_set():
                raise GenerationError("the task that awaited these images was cancelled")
            if given is not None:
                given(*progress)

        kwargs["callback"] = callback
        try:
            return await plain(self, *args, **kwargs)
        finally:
            cancelled.set()

    return variant
