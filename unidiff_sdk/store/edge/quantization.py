"""How Qdrant Edge keeps vectors: as they are, or in 8-bit integers as well.

Of the latter a search goes through the integers, and the float32 originals rank what it finds. The integers are kept in
memory, a quarter of the originals, which stay on disk and are read for the best candidates only. So scores are exact
cosines as without quantization; what may be missed is an item whose rounded score left it out of the candidates.
Compression comes with `optimize`; until then the originals are scanned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qdrant_edge as edge

from unidiff_sdk.errors import OptionError, StoreError
from unidiff_sdk.store.protocol import VECTOR

__all__ = ["RESCORE", "check_quantization", "stored_quantization", "vector_parameters"]

# Twice as many candidates as hits, ranked by the originals.
RESCORE = edge.QuantizationSearchParams(rescore=True, oversampling=2.0)


def vector_parameters(quantization: str | None) -> dict[str, Any]:
    """What `EdgeVectorParams` takes for "scalar" or None. Raises OptionError for anything else."""
    if quantization is None:
        # Mapped all the same, but not read from end to end while the engine opens them, with Python's global lock held:
        # 100,000 of 512 numbers took 90 ms. `warm` reads them without the lock.
        return {"memory": edge.Memory.Cold}
    if quantization != "scalar":
        raise OptionError(f"quantization={quantization!r}: a catalog in a folder takes 'scalar' (int8) or None")
    integers = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=edge.Memory.Pinned)
    return {"quantization_config": integers, "memory": edge.Memory.Cold}


def stored_quantization(shard: Path) -> str | None:
    """How a shard was made, by its configuration on disk; a copy of it is made alike."""
    config = json.loads((shard / "edge_config.json").read_text(encoding="utf-8"))
    return next(iter(config["vectors"][VECTOR].get("quantization_config") or {}), None)


def check_quantization(wanted: str | None, made_with: str | None, path: Path) -> None:
    """Raises StoreError if a quantization is asked for that is not the one of the store that is there."""
    if wanted not in (None, made_with):
        raise StoreError(
            f"The store at {path} was made with quantization={made_with!r}, which it keeps: leave quantization= out, "
            "or index into a new folder."
        )
