"""What surrounds every request: its id, limits of size and time, headers, metrics, and one line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unidiff_sdk.serve.metrics import Metrics
from unidiff_sdk.serve.problems import CLOSE, PROBLEM, RETRY, ProblemError

__all__ = ["RequestMiddleware", "access_log"]

access_log = logging.getLogger("unidiff_sdk.serve.access")

# The page uses nothing but its own files and images that it has received.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
HELD_BODIES = 16
"""All running requests together may have bodies of this many times the largest size. One more is answered with 429."""

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Those that metrics and logs name. A client can send any word as the method, and each would be kept."""

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Surrounds an application.

    Args:
        app: the application.
        metrics: counts the requests.
        max_body: the largest body of a request, in bytes. A larger one is answered with 413, without being read.
        timeout: seconds within which a body must arrive. A slower one is answered with 408.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int, timeout: float) -> None:
        self._app, self._metrics, self._max_body, self._timeout = app, metrics, max_body, timeout
        self._held = 0  # bytes of the bodies of all running requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._limited(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            route, method = _route(scope), scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.observe(method, route, status, seconds)
            entry = {
                "request_id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 1),
                "key": scope["state"].get("key"),
                **scope["state"].get("log", {}),
            }
            access_log.info("%s", json.dumps({name: value for name, value in entry.items() if value is not None}))

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a body that is limited in size and time."""
        stated = Headers(scope=scope).get("content-length", "0")
        if not stated.isdecimal() or len(stated) > 18 or int(stated) > self._max_body:
            await self._refuse(scope, send, self._too_large())
            return
        has_started = False

        async def send_started(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        body = _Body(receive, time.monotonic() + self._timeout)

        async def receive_limited() -> Message:
            size = body.received
            message = await body.receive()
            self._held += body.received - size
            if body.received > self._max_body:
                raise self._too_large()
            if self._held > HELD_BODIES * self._max_body:
                raise ProblemError(429, "Too many requests at the same time", "Try again later.", RETRY | CLOSE)
            return message

        try:
            await self._app(scope, receive_limited, send_started)
        except ProblemError as problem:  # raised while a body was received, where the application does not handle it
            if has_started:
                raise
            await self._refuse(scope, send, problem)
        finally:
            self._held -= body.received

    def _too_large(self) -> ProblemError:
        return ProblemError(413, "The request is too large", f"Send at most {self._max_body:,} bytes.", CLOSE)

    async def _refuse(self, scope: Scope, send: Send, problem: ProblemError) -> None:
        body = json.dumps(problem.content(scope["state"]["request_id"])).encode()
        headers = {"Content-Type": PROBLEM, "Content-Length": str(len(body)), **problem.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": problem.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


class _Body:
    """The body of a request as it arrives.

    Args:
        receive: receives its parts.
        deadline: when all of it must have arrived, in seconds of the monotonic clock.

    Attributes:
        received: its bytes up to now.
    """

    def __init__(self, receive: Receive, deadline: float) -> None:
        self._receive, self._deadline, self._is_complete, self.received = receive, deadline, False, 0

    async def receive(self) -> Message:
        """The next message. Raises ProblemError (408) after the deadline."""
        if self._is_complete:  # what follows is the end of the connection, at any time
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ProblemError(
                408, "The request arrives too slowly", "Its body took too long. Send it again.", CLOSE
            ) from None
        self.received += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message


def _request_id(headers: Headers) -> str:
    """The id that a proxy gave to the request, if it is a plain one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)


def _route(scope: MutableMapping[str, Any]) -> str:
    """The path with the names of its parameters: neither metrics nor logs hold what callers write into it."""
    return str(getattr(scope.get("route"), "path", "other"))
