"""An HTTP transport that limits the duration and the size of a whole response.

The timeouts of httpx limit each wait for data. A server that sends a byte now and then would never exceed them.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from .retries import ServerFault

__all__ = ["MAX_RESPONSE", "BoundedTransport"]

MAX_RESPONSE = 1 << 30
"""The most bytes of one response, before decompression. A page of 10,000 items with vectors has about 100 MB."""


class BoundedTransport(httpx.HTTPTransport):
    """The transport of httpx, with a limit of `timeout` seconds for sending a request and reading its response."""

    def __init__(self, timeout: float, *, verify: ssl.SSLContext | bool, limits: httpx.Limits) -> None:
        super().__init__(verify=verify, limits=limits)
        self._timeout = timeout
        self._budget = _Budget()
        # httpx has no parameter for the backend of its connection pool.
        self._pool._network_backend = _Backend(self._pool._network_backend, self._budget)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._budget.start(self._timeout)
        return super().handle_request(request)


class _Budget(threading.local):
    """What the request of this thread may still take. A request is sent and its response read in one thread."""

    deadline = math.inf
    received = 0

    def start(self, seconds: float) -> None:
        self.deadline, self.received = time.monotonic() + seconds, 0

    def seconds(self, timeout: float | None, expired: type[Exception]) -> float | None:
        """The longest time to wait now. Raises `expired` if there is none left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise expired("timed out: the whole response did not arrive in time")
        return min(left, timeout or left) if math.isfinite(left) else timeout

    def receive(self, size: int) -> None:
        self.received += size
        if self.received > MAX_RESPONSE:
            raise ServerFault(f"the response has more than {MAX_RESPONSE:,} bytes, which is the limit")


class _Backend(httpcore.NetworkBackend):
    def __init__(self, backend: httpcore.NetworkBackend, budget: _Budget) -> None:
        self._backend, self._budget = backend, budget

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(stream, self._budget)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._budget.seconds(timeout, httpcore.ReadTimeout))
        self._budget.receive(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._budget.seconds(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
