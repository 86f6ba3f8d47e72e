"""Where the vectors live: one protocol, one filter language, Qdrant Edge or a Qdrant server behind them."""

from __future__ import annotations

from .protocol import Found, Nearest, Record, Store, Vector

__all__ = ["Found", "Nearest", "Record", "Store", "Vector"]
