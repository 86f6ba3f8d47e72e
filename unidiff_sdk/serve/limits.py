"""Who may call, how often, and how many at once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from unidiff_sdk._internal.text import terminal_safe

from .metrics import Metrics
from .problems import RETRY, ProblemError
from .settings import ServerSettings, host_name

__all__ = ["Gate", "Limits", "RateLimit", "checked_route"]

T = TypeVar("T")

MAX_CALLERS = 10_000  # whose rates are remembered; the one that was idle for longest is forgotten first


class RateLimit:
    """A token bucket for each caller.

    Args:
        rate: requests per second on average; twice as many may come at once. 0: no limit.
        clock: returns seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, max(1.0, 2 * rate), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Count a request. Returns 0 if it is allowed, else the seconds until the next one is."""
        if not self._rate:
            return 0.0
        now = self._clock()
        tokens, last = self._buckets.pop(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - last) * self._rate)
        is_allowed = tokens >= 1
        self._buckets[caller] = (tokens - 1 if is_allowed else tokens, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - tokens) / self._rate


class Gate:
    """A limit of calls at the same time.

    Args:
        kind: the calls, in the plural.
        limit: the most at the same time.
        metrics: records how many there are.
    """

    def __init__(self, kind: str, limit: int, metrics: Metrics) -> None:
        self._kind, self._limit, self._metrics, self._running = kind, limit, metrics, 0

    async def run(self, call: Coroutine[Any, Any, T], timeout: float) -> T:
        """Await a call that nothing can stop. It keeps its place until it ends, also after TimeoutError.

        Raises ProblemError (429) if there are too many.
        """
        try:
            self.require_room()
        except ProblemError:
            call.close()
            raise
        self._count(+1)
        task = asyncio.ensure_future(call)
        task.add_done_callback(self._end)
        async with asyncio.timeout(timeout):
            return await asyncio.shield(task)

    def require_room(self) -> None:
        """Raise ProblemError (429) if there are too many calls."""
        if self._running >= self._limit:
            raise ProblemError(
                429,
                "Too many requests at the same time",
                f"{self._limit} {self._kind} are running or waiting. Try again later.",
                RETRY,
            )

    @asynccontextmanager
    async def entered(self, timeout: float) -> AsyncIterator[None]:
        """Count a call within the block, and end it with TimeoutError after some seconds.

        Raises ProblemError (429) if there are too many.
        """
        self.require_room()
        self._count(+1)
        try:
            async with asyncio.timeout(timeout):
                yield
        finally:
            self._count(-1)

    def _end(self, task: asyncio.Future[Any]) -> None:
        self._count(-1)
        if not task.cancelled():
            task.exception()  # after TimeoutError, nobody else retrieves it, which asyncio would report

    def _count(self, change: int) -> None:
        self._running += change
        self._metrics.set_running(self._kind, self._running)


def checked_route(check: Callable[[Request], Awaitable[None]]) -> type[APIRoute]:
    """A kind of route that checks a request before FastAPI reads its body, unlike a dependency."""

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                await check(request)
                return await handle(request)

            return checked

    return CheckedRoute


class Limits:
    """Checks the key and the rate of each request."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings, self._rate = settings, RateLimit(settings.rate)

    async def read(self, request: Request) -> None:
        """Require a key that allows reading, if there are keys."""
        self._enter(request)

    def may_write(self, request: Request) -> bool:
        """Whether a request that may read may also change the catalog."""
        return self._settings.may_write(request.state.access)

    async def write(self, request: Request) -> None:
        """Require that this request may change the catalog."""
        self._enter(request)
        if not self.may_write(request):
            is_reader = request.state.access == "read"
            reason = "This key allows reading only." if is_reader else "Start it with --allow-writes."
            raise ProblemError(403, "This server does not accept changes from this request", reason)

    async def own(self, request: Request) -> None:
        """Require a key of the user who started the server."""
        if self._settings.owner.access_of(_key_of(request)) is None:
            raise ProblemError(401, "This key does not open this route", "Only the user who started the server has it.")

    def _enter(self, request: Request) -> None:
        self._check_source(request)
        request.state.access = None
        caller = request.client.host if request.client else ""
        if self._settings.keys:
            found = self._settings.keys.access_of(_key_of(request))
            if found is None:
                self._check_rate(f"unknown {caller}")
                raise ProblemError(
                    401,
                    "An API key is required",
                    "Send it as: Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
            request.state.access, caller = found
            request.state.key = caller
        self._check_rate(caller)

    def _check_source(self, request: Request) -> None:
        """Refuse unknown names of this host, and, without keys, changes that a page of another origin sends.

        Browsers send forms to any host without asking it first; CORS only keeps the answer from the page.
        """
        host = request.headers.get("host", "").lower()
        name = host_name(host)
        if self._settings.hosts and name not in self._settings.hosts:
            raise ProblemError(
                421,
                "The server has another name",
                f"{name!r:.100} is not one of this server's names. Start it with --allowed-host, or with a key.",
            )
        origin = request.headers.get("origin")
        is_own = request.headers.get("sec-fetch-site") == "same-origin" or origin in (None, *self._settings.origins)
        if self._settings.keys or is_own or request.method in ("GET", "HEAD"):
            return
        if str(origin).partition("://")[2].lower() != host:
            raise ProblemError(
                403, "This origin is not allowed", f"Start the server with --origin {terminal_safe(str(origin))[:100]}."
            )

    def _check_rate(self, caller: str) -> None:
        if wait := self._rate.wait(caller):
            raise ProblemError(
                429,
                "Too many requests",
                f"This server allows {self._settings.rate:g} requests per second. Try again later.",
                {"Retry-After": str(max(1, round(wait)))},
            )


def _key_of(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
