"""Clients that attack: slow ones, cut bodies, oversized uploads, and files that grow when they are decoded."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from .client import Client
from .load import Calls
from .server import started, unidiff_command

__all__ = ["attack"]

BODY_SECONDS = 5  # --timeout of the attacked server
WAIT_SECONDS = 40.0  # for the server to end a slow connection
Answers = Counter[str]


def attack(catalog: Path, work: Path, slow: int, bombs: int) -> dict[str, Any]:
    """Attack a server, and search meanwhile.

    Args:
        catalog: the folder of the catalog.
        work: a folder for the log.
        slow: the number of slow clients.
        bombs: how often each harmful body is sent.

    Returns:
        The answers of each attack, the searches meanwhile, and the memory.
    """
    command = unidiff_command(catalog, "--allow-writes", "--timeout", str(BODY_SECONDS))
    with started(command, work / "attack.log") as server:
        warm = asyncio.run(_searches(server.port, 1.0))
        before = server.memory()
        result = asyncio.run(_slow_clients(server.port, slow))
        server.reset_peak()
        result["harmful"] = asyncio.run(_harmful(server.port, bombs))
        result["peak_memory"], after = server.peak_memory(), asyncio.run(_searches(server.port, 1.0))
        result |= {"warm": warm.summary(1.0), "after": after.summary(1.0)}
        return result | {"memory_before": before, "memory_after": server.memory()}


async def _searches(port: int, seconds: float) -> Calls:
    """Search ten times per second."""
    client, calls, end = Client(port), Calls(), time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        try:
            status, _ = await client.post("/v1/search", {"text": "red boots", "limit": 3})
            calls.add(str(status), time.perf_counter() - begun)
        except ConnectionError:
            calls.add("lost", time.perf_counter() - begun)
        await asyncio.sleep(0.1)
    client.close()
    return calls


async def _slow_clients(port: int, count: int) -> dict[str, Any]:
    """A third each: silent, slow with headers, slow with a body."""
    answers: dict[str, Answers] = {"silent": Counter(), "slow headers": Counter(), "slow body": Counter()}
    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        ends = [
            tasks.create_task(_slow_client(port, kind, counter))
            for _ in range(count // 3)
            for kind, counter in answers.items()
        ]
        searching = tasks.create_task(_searches(port, BODY_SECONDS + 8.0))
    return {
        "slow": {kind: dict(counter) for kind, counter in answers.items()},
        "slow_clients": len(ends),
        "longest_s": round(max(each.result() for each in ends) - start, 1),
        "searches": searching.result().summary(BODY_SECONDS + 8.0),
    }


async def _slow_client(port: int, kind: str, answers: Answers) -> float:
    """Send a byte per second until the server ends the connection. Returns when that was."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if kind == "slow body":
        writer.write(head + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    elif kind == "slow headers":
        writer.write(head)
    answering = asyncio.create_task(_received(reader))
    deadline = time.perf_counter() + WAIT_SECONDS
    while not answering.done() and time.perf_counter() < deadline:
        if kind != "silent":
            writer.write(b"x")
        await asyncio.wait({answering}, timeout=1.0)
    answers[_status_of(answering)] += 1
    writer.close()
    return time.perf_counter()


async def _received(reader: asyncio.StreamReader) -> bytes:
    """All that arrives until the connection ends, also by a reset."""
    received = b""
    with suppress(OSError):
        while part := await reader.read(65536):
            received += part
    return received


def _status_of(answering: asyncio.Task[bytes]) -> str:
    if not answering.done():
        answering.cancel()
        return "held"
    return answering.result()[9:12].decode() or "closed"


async def _harmful(port: int, times: int) -> dict[str, dict[str, int]]:
    """Send each harmful request some times. Returns the answers by attack."""
    found: dict[str, Answers] = {}
    for name, request in _requests():
        answers = found.setdefault(name, Counter())
        for _ in range(times):
            answers[await _answer(port, request)] += 1
    return {name: dict(answers) for name, answers in found.items()}


async def _answer(port: int, request: bytes) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answering = asyncio.create_task(_received(reader))
    try:
        writer.write(request)
        await writer.drain()
    except OSError:  # the server has answered and closed before it read everything
        pass
    await asyncio.wait({answering}, timeout=WAIT_SECONDS)
    writer.close()
    return _status_of(answering)


def _requests() -> Iterator[tuple[str, bytes]]:
    image = _png(64, 64)
    for cut in (1, 30, len(image) // 2):
        yield "truncated image", _post("search", {"image": _base64(image[:cut])})
        yield "truncated image, adding", _post("items", {"items": [{"image": _base64(image[:cut])}]})
    for name, bomb in _bombs():
        yield name, _post("search", {"image": _base64(bomb)})
        yield name, _post("generate", {"prompt": "x", "image": _base64(bomb)})
        yield name, _post("items", {"items": [{"image": _base64(bomb)}]})
        yield name, _post("embeddings", {"input": [{"image": _base64(bomb)}]})
    whole = _post("search", {"text": "x" * 1000})
    yield "truncated body", whole[:-500]
    yield "oversized body", _post("search", {"text": "x" * (40 << 20)})
    yield "oversized body in chunks", _chunked(b"x" * (40 << 20))
    yield "nested JSON", _raw("search", b"[" * 1_000_000)
    yield "nested JSON", _raw("generate", b'{"a":' * 1_000_000)
    yield "nested filter", _raw("search", b'{"text":"x","where":' + b'{"not":' * 5000 + b"{}" + b"}" * 5001)
    yield "many ids", _post("search", {"like": list(range(100_000))})
    yield "form of 100,000 parts", _form(100_000)
    yield "long URL", b"GET /v1/browse?where=" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    yield "many headers", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n"
    yield "no HTTP", b"\x16\x03\x01\x02\x00" + b"\x00" * 500


def _bombs() -> Iterator[tuple[str, bytes]]:
    yield "PNG that claims 60,000 x 60,000 pixels", _png_header(60_000, 60_000)
    yield "PNG of 100 million pixels", _png(10_000, 10_000)
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "TIFF", compression="group4")
    yield "TIFF of 900 million pixels", buffer.getvalue()
    yield "GIF that claims 65,535 x 65,535 pixels", b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + b"\x00" * 6 + b";"


def _png(width: int, height: int) -> bytes:
    Image.MAX_IMAGE_PIXELS = None
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _post(path: str, body: Any) -> bytes:
    return _raw(path, json.dumps(body).encode())


def _raw(path: str, content: bytes, kind: str = "application/json") -> bytes:
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _chunked(content: bytes) -> bytes:
    head = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n"


def _form(parts: int) -> bytes:
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    return _raw("search", part * parts + b"--x--\r\n", "multipart/form-data; boundary=x")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
