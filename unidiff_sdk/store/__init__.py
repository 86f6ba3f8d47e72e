"""Where the vectors live: one protocol, one filter language, Qdrant Edge or a Qdrant server behind them."""

from __future__ import annotations

from .protocol import Record, ScoredRecord, Store, Vector, VectorQuery

__all__ = ["Record", "ScoredRecord", "Store", "Vector", "VectorQuery"]
