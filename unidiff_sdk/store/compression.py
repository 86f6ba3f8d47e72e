"""Vectors of Qdrant Edge in 8-bit integers: a search goes through these, the float32 originals rank what it finds.

The integers are kept in memory, a quarter of the originals, which stay on disk and are read for the best candidates
only. So scores are exact cosines as without quantisation; what may be missed is an item whose rounded score left it out
of the candidates. Compression comes with `optimize`; until then the originals are scanned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qdrant_edge as edge

from ..errors import OptionError, StoreError
from .protocol import VECTOR

__all__ = ["RANKED_BY_ORIGINALS", "check_alike", "layout", "quantization_of"]

# Twice as many candidates as hits, ranked by the originals.
RANKED_BY_ORIGINALS = edge.QuantizationSearchParams(rescore=True, oversampling=2.0)


def layout(quantization: str | None) -> dict[str, Any]:
    """What `EdgeVectorParams` takes for "scalar" or None. Raises OptionError for anything else."""
    if quantization is None:
        return {}
    if quantization != "scalar":
        raise OptionError(f"quantization={quantization!r}: a catalogue in a folder takes 'scalar' (int8) or None")
    integers = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Pinned)
    return {"quantization_config": integers, "memory": edge.Memory.Cold}


def quantization_of(shard: Path) -> str | None:
    """How a shard was made, by its configuration on disk; a copy of it is made alike."""
    config = json.loads((shard / "edge_config.json").read_text(encoding="utf-8"))
    return next(iter(config["vectors"][VECTOR].get("quantization_config") or {}), None)


def check_alike(wanted: str | None, made_with: str | None, path: Path) -> None:
    """Raises StoreError if a quantisation is asked for that is not the one of the store that is there."""
    if wanted not in (None, made_with):
        raise StoreError(
            f"The store at {path} was made with quantization={made_with!r}, which it keeps: leave quantization= out, "
            "or index into a new folder."
        )
