"""What a catalog asks of a vector store, whichever engine is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from unidiff_sdk.errors import StoreError

from .filters import Clause

__all__ = [
    "CANDIDATES",
    "CAPTION",
    "RRF_K",
    "VECTOR",
    "Record",
    "ScoredRecord",
    "Store",
    "Vector",
    "VectorQuery",
    "check_query",
    "check_records",
]

Vector = npt.NDArray[np.float32]

CAPTION = "text"  # the column of the payload that BM25 ranks by
VECTOR = "image"  # a named vector, so that caption vectors can join it without a new collection

# Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): how much the first ranks count, and how long each list is.
RRF_K = 60
CANDIDATES = 500


@dataclass(frozen=True)
class Record:
    """One stored item: a UUID, a unit embedding float32[dim] and a JSON payload."""

    id: str
    vector: Vector = field(repr=False, compare=False)
    payload: dict[str, Any]


@dataclass(frozen=True)
class VectorQuery:
    """One search: which records have the highest dot product with a vector.

    Attributes:
        vector: float32[dim]; it need not be a unit vector.
        limit, offset: how many, and how many of the best to pass over.
        where: only what satisfies this filter.
        exclude: ids that are left out.
        min_score: only what scores at least so much.
        words: rank by BM25 over the captions as well. The two lists, of `CANDIDATES` each, are fused: a record scores
            the sum of 1 / (RRF_K + rank / share) over the lists that have it, ranks from 1, the shares being
            2 * (1 - bm25) and 2 * bm25.
        with_payload, with_vectors: what the results bring.
    """

    vector: Vector = field(repr=False, compare=False)
    limit: int
    offset: int = 0
    where: Clause | None = None
    exclude: tuple[str, ...] = ()
    min_score: float | None = None
    text: str | None = None
    bm25_weight: float = 0.5  # between 0 and 1
    with_payload: bool = True
    with_vectors: bool = False


@dataclass(frozen=True)
class ScoredRecord:
    """One search result: the dot product with the query is its score."""

    id: str
    score: float
    payload: dict[str, Any]
    vector: Vector | None = field(default=None, repr=False, compare=False)


class Store(Protocol):
    """A set of records with exact-or-approximate search by dot product. Safe to use from several threads.

    Every failure is a StoreError. Filters are trees from `filters.parse`.
    """

    dim: int

    def upsert(self, records: Sequence[Record]) -> None:
        """Insert or replace; when it returns, the records survive a crash."""

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[ScoredRecord]:
        """The records with the highest dot product with `vector`, best first."""

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        """The results of several searches in one call, each best first."""

    def order_by(
        self, column: str, kind: str, *, descending: bool, limit: int, offset: int, where: Clause | None = None
    ) -> list[Record]:
        """The records by a column of numbers (kind "float") or dates ("datetime"); those without it are left out."""

    def facet(self, column: str, kind: str, *, limit: int, where: Clause | None = None) -> dict[str | bool, int]:
        """The commonest values of a column of strings (kind "keyword") or booleans ("bool"): value -> how many."""

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        """The records that exist among `ids`, in no particular order."""

    def scroll(self, batch_size: int = 256, where: Clause | None = None) -> Iterator[list[Record]]:
        """All records that satisfy the filter, in batches, in the order of their ids."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove records; ids that do not exist are ignored."""

    def count(self, where: Clause | None = None) -> int:
        """How many records satisfy the filter."""

    def unindexed_count(self) -> int:
        """How many records a search still scans, because `optimize` would change that."""

    def optimize(self) -> None:
        """Build the search index over what has been added; others search and write meanwhile. May take minutes."""

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


def check_query(vector: Vector, dim: int) -> None:
    """Refuse a query that an engine would answer with nothing or with nonsense: wrong size, NaN, infinite."""
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise StoreError(
            f"The query vector has shape {vector.shape} and {np.count_nonzero(~np.isfinite(vector))} numbers that are "
            f"NaN or infinite: this store is searched with {dim} finite numbers."
        )
