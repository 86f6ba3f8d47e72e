"""Vector quantization in Qdrant Edge: none, or "scalar" (int8).

With "scalar", a search compares 8-bit integers and then rescores the best candidates with the float32 originals. The
integers take a quarter of the originals and are kept in memory. The originals stay on disk and are read for the best
candidates only. Scores are therefore exact; an item can be missed only if its rounded score keeps it out of the
candidates. `optimize` compresses the vectors. Until then, searches scan the originals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qdrant_edge as edge

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.errors import OptionError, StoreError
from unidiff_sdk.store.protocol import VECTOR

from .shard_versions import CONFIG

__all__ = ["RESCORE", "check_quantization", "stored_quantization", "vector_parameters"]

# Twice as many candidates as results, rescored with the originals.
RESCORE = edge.QuantizationSearchParams(rescore=True, oversampling=2.0)


def vector_parameters(quantization: str | None) -> dict[str, Any]:
    """Keyword arguments of `EdgeVectorParams` for "scalar" or None. Raises OptionError for any other value."""
    if quantization is None:
        # Cold: memory-mapped, but not read from end to end while the engine opens the files with the GIL held, which
        # took 90 ms for 100,000 vectors of 512 numbers. `warm_page_cache` reads them without the GIL.
        return {"memory": edge.Memory.Cold}
    if quantization != "scalar":
        raise OptionError(f"quantization={quantization!r}: a catalog in a folder supports 'scalar' (int8) or None")
    integers = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Pinned)
    return {"quantization_config": integers, "memory": edge.Memory.Cold}


def stored_quantization(shard: Path) -> str | None:
    """The quantization in a shard's configuration file: "scalar" or None."""
    config = read_json(shard / CONFIG, error=StoreError)
    return next(iter(config["vectors"][VECTOR].get("quantization_config") or {}), None)


def check_quantization(wanted: str | None, stored: str | None, path: Path) -> None:
    """Raise StoreError if a quantization is requested that differs from the one of the existing store."""
    if wanted not in (None, stored):
        raise StoreError(
            f"quantization={wanted!r}: the store at {path} was made with quantization={stored!r} and keeps it. "
            "Omit quantization=, or index into a new folder."
        )
