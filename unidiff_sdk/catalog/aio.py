"""The methods of a catalog for asyncio: each runs in a thread, and the event loop goes on meanwhile."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from unidiff_sdk.errors import GenerationError

__all__ = ["Opening", "cancellable", "in_thread", "twin"]

Self = TypeVar("Self")
P = ParamSpec("P")
R = TypeVar("R")

# Not the event loop's own few threads: an application needs those, and reindexing may take hours. A thread is started
# only when all others are busy; calls beyond these wait for their turn.
_THREADS = 64
_pool = ThreadPoolExecutor(_THREADS, "unidiff")


async def in_thread(call: Callable[[], R]) -> R:
    """What a call returns, made in a thread with the caller's context variables.

    A task that is cancelled waits no longer; the call itself, once begun, goes on to its end.
    """
    import asyncio  # 20 ms at the start of all who do not await

    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_pool, lambda: context.run(call))


class _Closes(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closes)


class Opening(Generic[C]):
    """Something that is opened in a thread: by `await`, or by `async with`, which also closes it."""

    def __init__(self, open: Callable[[], C]) -> None:
        self._open = open

    def __await__(self) -> Generator[Any, None, C]:
        return in_thread(self._open).__await__()

    async def __aenter__(self) -> C:
        self._opened = await self
        return self._opened

    async def __aexit__(self, *exception: object) -> None:
        await self._opened.aclose()


def twin(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, R]]:
    """The same method for `await`, with the same arguments, result and errors."""

    @wraps(method)
    async def awaited(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await in_thread(partial(method, self, *args, **kwargs))

    awaited.__name__ = f"a{method.__name__}"
    awaited.__qualname__ = f"{method.__qualname__.removesuffix(method.__name__)}{awaited.__name__}"
    awaited.__doc__ = f"`{method.__name__}`, for `await`: the same arguments, result and errors."
    return awaited


def cancellable(
    method: Callable[Concatenate[Self, P], R],
) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, R]]:
    """As `twin`, of a method that takes a `callback=` between its steps: cancelling the task ends the work, too."""

    plain = twin(method)

    @wraps(plain)
    async def awaited(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Callable[..., None] | None = kwargs.pop("callback", None)  # type: ignore[assignment]
        stopped = threading.Event()

        def callback(*progress: Any) -> None:
            if stopped.is_set():
                raise GenerationError("the task that waited for these pictures was cancelled")
            if given is not None:
                given(*progress)

        kwargs["callback"] = callback
        try:
            return await plain(self, *args, **kwargs)
        finally:
            stopped.set()

    return awaited
