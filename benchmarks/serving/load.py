"""Clients that search at a fixed rate, alone and next to clients that generate.

The rate does not depend on the answers: a request that is due while an earlier one of the same client is still running
waits, and its latency counts from when it was due. Without that, a server that stops for a second would look fast,
because nobody asked it during that second (coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .client import Client
from .server import Server

__all__ = ["GENERATING", "SEARCHING", "Calls", "measure", "percentile"]

SEARCHING, GENERATING = 50, 4
STEPS, GUIDANCE = 20, 5.0
TYPES = ("dress", "coat", "boots", "shirt", "skirt", "jacket", "trousers")
COLORS = ("red", "green", "blue", "black", "white", "purple", "yellow", "brown")
QUERIES = [f"a {color} {type}" for color in COLORS for type in TYPES]


@dataclass
class Calls:
    """What became of the calls of one kind."""

    seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: str, seconds: float) -> None:
        """Count a call. The latency of one that failed counts, too."""
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)

    def summary(self, duration: float) -> dict[str, Any]:
        """The figures of a run of this duration."""
        return {
            "calls": len(self.seconds),
            "answered": self.outcomes["200"],
            "outcomes": dict(self.outcomes),
            "per_second": round(len(self.seconds) / duration, 2),
            "p50_ms": round(1000 * percentile(self.seconds, 50), 1),
            "p99_ms": round(1000 * percentile(self.seconds, 99), 1),
            "max_ms": round(1000 * max(self.seconds, default=0.0), 1),
        }


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of the values do not exceed. 0 without values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(server: Server, seconds: float, rate: float, *, generating: int) -> dict[str, Any]:
    """Search for some seconds, next to clients that generate.

    Args:
        server: the server.
        seconds: the duration.
        rate: searches per second, of all clients together.
        generating: clients that generate, each the next image when it has one.

    Returns:
        The figures of "search" and "generate", and "memory": (seconds, bytes), once per second.
    """
    return asyncio.run(_measure(server, seconds, rate, generating))


async def _measure(server: Server, seconds: float, rate: float, generating: int) -> dict[str, Any]:
    search, generate = Calls(), Calls()
    memory: list[tuple[float, int]] = []
    start = time.perf_counter() + 0.5
    async with asyncio.TaskGroup() as tasks:
        for client in range(SEARCHING):
            tasks.create_task(_search(server.port, client, start, seconds, rate, search))
        for client in range(generating):
            tasks.create_task(_generate(server.port, client, start + seconds, generate))
        tasks.create_task(_sample(server, start + seconds, memory))
    return {
        "search": search.summary(seconds),
        **({"generate": generate.summary(time.perf_counter() - start)} if generating else {}),
        "memory": [(round(at - start, 1), value) for at, value in memory],
    }


async def _search(port: int, number: int, start: float, seconds: float, rate: float, calls: Calls) -> None:
    client = Client(port)
    for n in itertools.count():
        due = start + (n * SEARCHING + number) / rate
        if due >= start + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        query = QUERIES[(n * SEARCHING + number) % len(QUERIES)]
        outcome = await _outcome(client, "/v1/search", {"text": query, "limit": 12}, b'"hits":[{')
        calls.add(outcome, time.perf_counter() - due)
    client.close()


async def _generate(port: int, number: int, end: float, calls: Calls) -> None:
    client = Client(port)
    for n in itertools.count():
        begun = time.perf_counter()
        if begun >= end:
            break
        body = {"prompt": QUERIES[(7 * n + number) % len(QUERIES)], "n": 1, "steps": STEPS, "guidance_scale": GUIDANCE}
        body["seed"] = 1000 * number + n
        outcome = await _outcome(client, "/v1/generate", body, b'"image":"')
        calls.add(outcome, time.perf_counter() - begun)
        if outcome != "200":
            await asyncio.sleep(0.1)
    client.close()


async def _outcome(client: Client, path: str, body: dict[str, Any], expected: bytes) -> str:
    """The status of a call; "empty" for an answer without what was asked for, "lost" without an answer."""
    try:
        status, answer = await client.post(path, body)
    except ConnectionError:
        return "lost"
    return "empty" if status == 200 and expected not in answer else str(status)


async def _sample(server: Server, end: float, memory: list[tuple[float, int]]) -> None:
    while (now := time.perf_counter()) < end:
        memory.append((now, server.memory()))
        await asyncio.sleep(1.0)
