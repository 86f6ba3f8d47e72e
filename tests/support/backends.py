"""The implementations of `Store`, for the tests that run over all of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unidiff_sdk.store import Record, ScoredRecord, Store, VectorQuery
from unidiff_sdk.store.edge.exact_scans import ExactScans
from unidiff_sdk.store.edge.store import EdgeStore

DIM = 8


def edge(path: Path) -> Store:
    """Qdrant Edge in a folder."""
    return EdgeStore(path / "vectors", DIM)


class ScanningStore(EdgeStore):
    """Qdrant Edge that answers every search but hybrid ones from a copy of the matching vectors.

    A search is run until its filter has a copy.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, DIM)
        self._scans = ExactScans(DIM, 0, 10_000)

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        for _ in range(8):  # one to remember the filter, and one for each part of up to 64 records
            super().query_batch(searches)
        return super().query_batch(searches)


def scanning_edge(path: Path) -> Store:
    """Qdrant Edge in a folder, with scans of copies."""
    return ScanningStore(path / "vectors")


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


BACKENDS: list[Callable[[Path], Store]] = [edge, scanning_edge, local_client] + (
    [server] if "QDRANT_URL" in os.environ else []
)


def record(number: int, **payload: object) -> Record:
    """A record with a random unit vector. The number determines the id and the vector."""
    vector = np.random.default_rng(number).normal(size=DIM).astype(np.float32)
    return Record(str(uuid.UUID(int=number + 1)), vector / np.linalg.norm(vector), dict(payload))
