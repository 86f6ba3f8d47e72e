"""HTTP/1.1 on a socket, for clients that send slowly or nothing at all."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from unidiff_sdk.serve.problems import PROBLEM, ProblemError

__all__ = ["TimedProtocol"]

TOO_SLOW = ProblemError(408, "The request arrives too slowly", "Send the whole request at once.")


class TimedProtocol(H11Protocol):
    """Closes a connection whose next request line and headers do not arrive in time. uvicorn waits for them forever.

    The middleware limits the time for a body.
    """

    HEADER_SECONDS = 10.0

    _timer: asyncio.TimerHandle | None = None
    _is_new = True  # no request has arrived yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._start_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, unless a request is running."""
        if not self._is_running():
            self._start_waiting()
        super().data_received(data)
        if self._is_running():
            self._is_new = False
            self._stop_waiting()

    def _is_running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_waiting(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.HEADER_SECONDS, self._refuse)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        if self._is_new:
            body = json.dumps(TOO_SLOW.content(None)).encode()
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: {PROBLEM}\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()
