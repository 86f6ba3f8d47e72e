"""Async variants of methods: each call runs in a thread, so the event loop is not blocked.

Calls that may wait for each other have pools of their own: searches never wait for images that are generated, or for
writes. The pools are not those of the event loop, whose few threads the application needs.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from unidiff_sdk._internal.text import hide_key
from unidiff_sdk.errors import BusyError, GenerationError

__all__ = [
    "GENERATING",
    "MAX_GENERATING",
    "MAX_WAITING",
    "OPENING",
    "READING",
    "WRITING",
    "Opening",
    "Resource",
    "async_variant",
    "cancellable",
    "in_thread",
]

_NICE = 10  # of generations: searches take milliseconds, and somebody waits for each
_THREADS = 64  # of a pool; one starts only when all others are busy

MAX_GENERATING = 64
"""The most awaited calls that generate images, in the whole process. One more is refused: it would wait for minutes."""

MAX_WAITING = 10_000
"""The most awaited calls of another kind that wait for a thread, in the whole process."""

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def _yield_to_others(nice: int) -> None:
    """Lower the priority of this thread, and of the threads of ONNX Runtime that it starts. Only Linux has that."""
    if nice and sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + nice))


class _Pool:
    """Threads for one kind of calls.

    Args:
        kind: the calls, for messages.
        limit: the most calls that run or wait. One more is refused.
        nice: how far the threads yield to others of this process, as the system's `nice` does.
    """

    def __init__(self, kind: str, limit: int, nice: int = 0) -> None:
        self._kind, self._limit, self._nice = kind, limit, nice
        self.reset()

    def reset(self) -> None:
        """Start anew. A forked child does: the threads of its parent do not exist there."""
        self._threads = ThreadPoolExecutor(_THREADS, f"unidiff-{self._kind}", _yield_to_others, (self._nice,))
        self._free = threading.Semaphore(self._limit)

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Run a call in a thread. Raises BusyError if too many calls run or wait."""
        free = self._free
        if not free.acquire(blocking=False):
            state = "running" if self._limit <= _THREADS else "running or waiting"
            raise BusyError(f"{self._limit:,} {self._kind} are {state}, which is the limit; try again later")
        try:
            future = self._threads.submit(call)
        except BaseException:
            free.release()
            raise
        future.add_done_callback(lambda _: free.release())
        return future


READING = _Pool("searches", _THREADS + MAX_WAITING)
WRITING = _Pool("writes", _THREADS + MAX_WAITING)
GENERATING = _Pool("generations", MAX_GENERATING, _NICE)
OPENING = _Pool("openings", _THREADS + MAX_WAITING)  # and closing, which ends calls that wait in the other pools


def _reset_pools() -> None:
    for pool in (READING, WRITING, GENERATING, OPENING):
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pools)


async def in_thread(call: Callable[[], R], pool: _Pool = READING) -> R:
    """Run a call in a thread with the caller's context variables, and return its result.

    Cancelling the task stops the waiting. A call that has started runs to its end.

    Raises:
        BusyError: too many calls run or wait in this pool.
    """
    import asyncio  # 20 ms that synchronous applications do not pay at import

    context = contextvars.copy_context()
    return await asyncio.wrap_future(pool.submit(lambda: context.run(call)))


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
        await in_thread(self.close, OPENING)


C = TypeVar("C", bound=Resource)


class Opening(Generic[C]):
    """Opens a resource in a thread: with `await`, or with `async with`, which also closes it."""

    def __init__(self, open: Callable[[], C]) -> None:
        self._open = open

    def __await__(self) -> Generator[Any, None, C]:
        return in_thread(self._open, OPENING).__await__()

    async def __aenter__(self) -> C:
        self._opened = await self
        return self._opened

    async def __aexit__(self, *exception: object) -> None:
        await in_thread(self._opened.close, OPENING)


def async_variant(
    method: Callable[Concatenate[S, P], R], pool: _Pool = READING, *, generates: Callable[..., bool] | None = None
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The async variant of a method, with the same arguments, result and errors.

    Args:
        method: the method.
        pool: where its calls run.
        generates: the arguments of a call, without `self`, to whether it generates images and runs in `GENERATING`.
    """

    @wraps(method)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        chosen = GENERATING if generates is not None and generates(*args, **kwargs) else pool
        return await in_thread(partial(method, self, *args, **kwargs), chosen)

    variant.__name__ = f"a{method.__name__}"
    variant.__qualname__ = f"{method.__qualname__.removesuffix(method.__name__)}{variant.__name__}"
    variant.__doc__ = f"The async variant of `{method.__name__}`, with the same arguments, result and errors."
    return variant


def cancellable(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """As `async_variant`, for a method that generates images and has a `callback=`.

    Cancelling the task stops the work at the next callback, or at once while it waits for its turn.
    """

    plain = async_variant(method, GENERATING)

    @wraps(plain)
    async def variant(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Callable[..., None] | None = kwargs.pop("callback", None)  # type: ignore[assignment]
        cancelled = threading.Event()

        def callback(*progress: Any) -> None:
            if cancelled.is_set():
                raise GenerationError("the task that awaited these images was cancelled")
            if given is not None:
                given(*progress)

        from unidiff_sdk.generation.batching import cancellation

        kwargs["callback"] = callback
        token = cancellation.set(cancelled)
        try:
            return await plain(self, *args, **kwargs)
        finally:
            cancelled.set()
            cancellation.reset(token)

    return variant
