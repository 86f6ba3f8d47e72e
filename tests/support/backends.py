"""The implementations of `Store`, for the tests that run over all of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unidiff_sdk.store import Record, Store

DIM = 8


def edge(path: Path) -> Store:
    """Qdrant Edge in a folder."""
    from unidiff_sdk.store.edge.store import EdgeStore

    return EdgeStore(path / "vectors", DIM)


def local_client(path: Path) -> Store:
    """`ServerStore` over the local mode of qdrant-client."""
    from qdrant_client import QdrantClient

    from unidiff_sdk.store.server.store import ServerStore

    return ServerStore(QdrantClient(":memory:"), "contract", DIM, "fingerprint")


def server(path: Path) -> Store:
    """`ServerStore` over the server at QDRANT_URL."""
    from qdrant_client import QdrantClient

    from unidiff_sdk.store.server.store import ServerStore

    return ServerStore(QdrantClient(os.environ["QDRANT_URL"]), f"contract-{uuid.uuid4()}", DIM, "fingerprint")


BACKENDS: list[Callable[[Path], Store]] = [edge, local_client] + ([server] if "QDRANT_URL" in os.environ else [])


def record(number: int, **payload: object) -> Record:
    """A record with a random unit vector. The number determines the id and the vector."""
    vector = np.random.default_rng(number).normal(size=DIM).astype(np.float32)
    return Record(str(uuid.UUID(int=number + 1)), vector / np.linalg.norm(vector), dict(payload))
