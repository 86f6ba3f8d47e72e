"""What a catalogue asks of a vector store, whichever engine is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import StoreError
from .filters import Clause

__all__ = ["VECTOR", "Found", "Record", "Store", "Vector", "check_records"]

Vector = npt.NDArray[np.float32]

VECTOR = "image"  # a named vector, so that caption vectors can join it without a new collection


@dataclass(frozen=True)
class Record:
    """One stored item: a UUID, a unit embedding float32[dim] and a JSON payload."""

    id: str
    vector: Vector = field(repr=False, compare=False)
    payload: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """One search result: the dot product with the query is its score."""

    id: str
    score: float
    payload: dict[str, Any]


class Store(Protocol):
    """A set of records with exact-or-approximate search by dot product. Safe to use from several threads.

    Every failure is a StoreError. Filters are trees from `filters.parse`.
    """

    dim: int

    def upsert(self, records: Sequence[Record]) -> None:
        """Insert or replace; when it returns, the records survive a crash."""

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[Found]:
        """The records with the highest dot product with `vector` (float32[dim]; it need not be a unit vector)."""

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        """The records that exist among `ids`, in no particular order."""

    def scroll(self, batch_size: int = 256) -> Iterator[list[Record]]:
        """All records, in batches."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove records; ids that do not exist are ignored."""

    def count(self, where: Clause | None = None) -> int:
        """How many records satisfy the filter."""

    def optimize(self) -> None:
        """Build the search index over what has been added. May take minutes on large stores."""

    def close(self) -> None:
        """Write out everything and let go of the store. May be called twice."""


def check_records(records: Sequence[Record], dim: int) -> None:
    """Refuse vectors that an engine would store silently and then never find: wrong size, NaN, infinite."""
    for record in records:
        if record.vector.shape != (dim,):
            raise StoreError(
                f"Item {record.payload.get('id', record.id)!r} has a vector of shape {record.vector.shape}; "
                f"this store holds vectors of {dim} numbers."
            )
        if not np.isfinite(record.vector).all():
            raise StoreError(
                f"The embedding of item {record.payload.get('id', record.id)!r} holds NaN or infinity, so it was not "
                "stored. The bundle's image encoder overflows on this picture: try a bundle of fp32 precision."
            )
