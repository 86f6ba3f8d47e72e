"""A small HTTP client. It keeps one connection, and costs little, since the server needs the same cores."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

__all__ = ["CALL_SECONDS", "Client"]

CALL_SECONDS = 120.0


class Client:
    """One connection to 127.0.0.1, opened again when the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """As `request`."""
        return await self.request("POST", path, body)

    async def request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Send JSON. Returns the status and the body of the answer. Raises ConnectionError if there is none."""
        content = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return await self._call(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            with suppress(OSError):
                self._streams[1].close()
            self._streams = None

    async def _call(self, request: bytes) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                if self._streams is None or self._streams[0].at_eof():
                    self.close()
                    self._streams = await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer = self._streams
                writer.write(request)
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").lower().split("\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                if "connection: close" in lines:
                    self.close()
                return int(lines[0].split()[1]), body
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(f"no answer: {error!r}") from error
