"""What surrounds every request: its id, limits of size and time, headers, metrics, and one line in the log."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .problems import PROBLEM, ProblemError

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
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Surrounds an application.

    Args:
        app: the application.
        metrics: counts the requests.
        max_body: the largest body of a request, in bytes. A larger one is answered with 413, without being read.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int) -> None:
        self._app, self._metrics, self._max_body = app, metrics, max_body

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
            route = _route(scope)
            self._metrics.observe(scope["method"], route, status, seconds)
            entry = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 1),
                "key": scope["state"].get("key"),
                **scope["state"].get("log", {}),
            }
            access_log.info("%s", json.dumps({name: value for name, value in entry.items() if value is not None}))

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a body of limited size."""
        stated = Headers(scope=scope).get("content-length", "0")
        if not stated.isdecimal() or len(stated) > 18 or int(stated) > self._max_body:
            await self._refuse(scope, send)
            return
        received, has_started = 0, False

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise self._too_large()
            return message

        async def send_started(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive_limited, send_started)
        except ProblemError:  # raised while a body was received, where the application does not handle it
            if has_started:
                raise
            await self._refuse(scope, send)

    def _too_large(self) -> ProblemError:
        return ProblemError(413, "The request is too large", f"Send at most {self._max_body:,} bytes.")

    async def _refuse(self, scope: Scope, send: Send) -> None:
        body = json.dumps(self._too_large().content(scope["state"]["request_id"])).encode()
        headers = [(b"content-type", PROBLEM.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _request_id(headers: Headers) -> str:
    """The id that a proxy gave to the request, if it is a plain one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)


def _route(scope: MutableMapping[str, Any]) -> str:
    """The path with the names of its parameters: neither metrics nor logs hold what callers write into it."""
    return str(getattr(scope.get("route"), "path", "other"))
