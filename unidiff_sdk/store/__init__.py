"""Vector stores and the image store: one protocol and one filter language over Qdrant Edge and a Qdrant server."""

from __future__ import annotations

from .protocol import Record, ScoredRecord, Store, Vector, VectorQuery

__all__ = ["Record", "ScoredRecord", "Store", "Vector", "VectorQuery"]
