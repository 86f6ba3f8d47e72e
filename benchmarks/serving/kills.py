"""Processes killed while clients write: what was answered with 201 must be stored."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from unidiff_sdk import Catalog

from .client import Client
from .server import Server, started, unidiff_command

__all__ = ["kill_under_writes"]

WRITERS = 4


def kill_under_writes(catalog: Path, work: Path, trials: int, seed: int) -> dict[str, Any]:
    """Kill a server at random times while clients add, change and delete items, and compare what it stored.

    Args:
        catalog: the folder of the catalog, which is changed.
        work: a folder for the log.
        trials: how often.
        seed: of the times.

    Returns:
        The number of trials, of acknowledged writes, and those that are lost.
    """
    random, written, lost = Random(seed), 0, []
    for trial in range(trials):
        with started(unidiff_command(catalog, "--allow-writes"), work / "kill.log") as server:
            state = asyncio.run(_write_until_killed(server, trial, random.uniform(0.3, 2.0)))
        written += sum(state.counts.values())
        lost += _missing(catalog, state)
    return {"trials": trials, "acknowledged": written, "lost": len(lost), "examples": lost[:5]}


class _State:
    """What the server acknowledged: items by id with their image and column, and deleted ids."""

    def __init__(self) -> None:
        self.items: dict[str, tuple[bytes, int]] = {}
        self.deleted: set[str] = set()
        self.unsure: set[str] = set()  # a change of these was sent, but not answered
        self.counts = {"added": 0, "changed": 0, "deleted": 0}


async def _write_until_killed(server: Server, trial: int, seconds: float) -> _State:
    state = _State()
    writers = [asyncio.create_task(_write(server.port, f"{trial}-{number}", state)) for number in range(WRITERS)]
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.kill)
    await asyncio.gather(*writers)
    return state


async def _write(port: int, name: str, state: _State) -> None:
    """Add items, change every second one and delete every fourth, until the server is gone."""
    client = Client(port)
    for n in range(10_000):
        id, image = f"{name}-{n}", _png(f"{name}-{n}")
        item = {"id": id, "image": base64.b64encode(image).decode(), "text": f"item {n}", "columns": {"stock": n}}
        state.unsure.add(id)
        try:
            if (await client.post("/v1/items", {"items": [item]}))[0] == 201:
                state.items[id] = (image, n)
                state.counts["added"] += 1
            if n % 2 and (await client.request("PATCH", f"/v1/items/{id}", {"columns": {"stock": -n}}))[0] == 200:
                state.items[id] = (image, -n)
                state.counts["changed"] += 1
            if n % 4 == 0 and (await client.request("DELETE", "/v1/items", {"ids": [id]}))[0] == 200:
                del state.items[id]
                state.deleted.add(id)
                state.counts["deleted"] += 1
        except ConnectionError:
            return
        state.unsure.discard(id)


def _missing(catalog: Path, state: _State) -> list[str]:
    """What differs from the acknowledged state. A write without an answer may be stored or not."""
    found = []
    with Catalog(catalog, create=False) as opened:
        for id, (image, stock) in state.items.items():
            hit = opened.get(id)
            if hit is None:
                found += [] if id in state.unsure else [f"{id} is lost"]
            elif hashlib.sha256(hit.image_bytes()).digest() != hashlib.sha256(image).digest():
                found.append(f"{id} has another image")
            elif hit.payload["stock"] != stock and id not in state.unsure:
                found.append(f"{id} has {json.dumps(hit.payload)}; acknowledged: {stock}")
        found += [f"{id} is back" for id in state.deleted if opened.get(id) is not None]
    return found


def _png(name: str) -> bytes:
    """A small image that depends on the name."""
    pixels = hashlib.sha256(name.encode()).digest() * 6
    buffer = io.BytesIO()
    Image.frombytes("RGB", (8, 8), pixels).save(buffer, "PNG")
    return buffer.getvalue()
