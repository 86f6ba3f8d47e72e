"""Every kind of store that a catalog can have, for the suites that run over all of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unidiff_sdk.store import Record, Store

DIM = 8


def edge(path: Path) -> Store:
    from unidiff_sdk.store.edge.store import EdgeStore

    return EdgeStore(path / "vectors", DIM)


def client(path: Path) -> Store:
    """The code of the server path, over qdrant-client's local mode."""
    from qdrant_client import QdrantClient

    from unidiff_sdk.store.server.store import ServerStore

    return ServerStore(QdrantClient(":memory:"), "contract", DIM, "fingerprint")


def server(path: Path) -> Store:
    """A real server, where QDRANT_URL names one."""
    from qdrant_client import QdrantClient

    from unidiff_sdk.store.server.store import ServerStore

    return ServerStore(QdrantClient(os.environ["QDRANT_URL"]), f"contract-{uuid.uuid4()}", DIM, "fingerprint")


BACKENDS: list[Callable[[Path], Store]] = [edge, client] + ([server] if "QDRANT_URL" in os.environ else [])


def record(name: int, **payload: object) -> Record:
    """An item of its own direction, a function of its name."""
    vector = np.random.default_rng(name).normal(size=DIM).astype(np.float32)
    return Record(str(uuid.UUID(int=name + 1)), vector / np.linalg.norm(vector), dict(payload))
