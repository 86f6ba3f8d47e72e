"""The `Store` protocol: what a catalog needs from a vector store, whichever engine is behind it.

`edge.EdgeStore` and `server.ServerStore` implement it. `tests/store/test_contract.py` holds every implementation to it.
"""

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
    "MAX_DELETED_SHARE",
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

CAPTION = "text"  # the payload column that BM25 ranks by
VECTOR = "image"  # a named vector, so that caption vectors can be added later without a new collection

# Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): the constant k, and the length of each ranking.
RRF_K = 60
CANDIDATES = 500

# Above this deleted share of the search index, searches scan all vectors and the index is built again. It is also the
# share above which Qdrant removes deleted vectors from an index.
MAX_DELETED_SHARE = 0.2


@dataclass(frozen=True)
class Record:
    """One stored item.

    Attributes:
        id: a UUID (`ids.key_of`).
        vector: the embedding, float32[dim], of unit length.
        payload: JSON values by column (`payload` has the schema).
    """

    id: str
    vector: Vector = field(repr=False, compare=False)
    payload: dict[str, Any]


@dataclass(frozen=True)
class VectorQuery:
    """One search for the records with the highest dot product with a vector.

    Attributes:
        vector: float32[dim], of any length.
        limit: the maximum number of results, at least 1.
        offset: the number of best results to skip.
        where: only records that match this filter.
        exclude: ids to leave out.
        min_score: only records with at least this score.
        text: also rank by BM25 over the captions and fuse the two rankings, each of `CANDIDATES` records. A record
            scores the sum of 1 / (RRF_K + rank / weight) over the rankings that contain it. Ranks start at 1. The
            weights are 2 * (1 - bm25_weight) for the vector and 2 * bm25_weight for the text.
        bm25_weight: the share of the text in the fusion, between 0 and 1 exclusive.
        ef: candidates that the search index considers, at least `limit`. None: the engine's own number.
        exact: compare with every record instead of searching the index.
        with_payload: whether the results carry their payload.
        with_vectors: whether the results carry their vector.
    """

    vector: Vector = field(repr=False, compare=False)
    limit: int
    offset: int = 0
    where: Clause | None = None
    exclude: tuple[str, ...] = ()
    min_score: float | None = None
    text: str | None = None
    bm25_weight: float = 0.5
    ef: int | None = None
    exact: bool = False
    with_payload: bool = True
    with_vectors: bool = False


class FoundPoint(Protocol):
    """What an engine returns for one search result."""

    @property
    def id(self) -> Any:
        """The UUID; `str` of it is the id of the record."""

    @property
    def payload(self) -> dict[str, Any] | None:
        """The payload, if the query asked for it."""


@dataclass(frozen=True)
class ScoredRecord:
    """One search result.

    Attributes:
        id: the UUID of the record.
        score: the dot product with the query, or the fused score of a hybrid search.
        payload: the payload; {} unless the query asked for it.
        vector: float32[dim]; None unless the query asked for it.
    """

    id: str
    score: float
    payload: dict[str, Any]
    vector: Vector | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_point(cls, point: FoundPoint, score: float, vector: Vector | None) -> ScoredRecord:
        """A result that an engine returned. Its id is converted when it is first read, which few searches do."""
        record = object.__new__(cls)  # `cls(…)` sets each attribute of a frozen class by a call, for each result
        attributes = vars(record)
        attributes["_point"], attributes["score"] = point, score
        attributes["payload"], attributes["vector"] = point.payload or {}, vector
        return record

    def __getattr__(self, name: str) -> Any:  # only for attributes that were not set
        if name != "id" or "_point" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        vars(self)["id"] = id = str(vars(self).pop("_point").id)
        return id

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which a point of an engine may not allow."""
        return {"id": self.id} | vars(self)


class Store(Protocol):
    """A set of records that is searched by dot product. Safe to use from several threads.

    Every method raises StoreError if the engine fails or the store is closed. Filters are trees from `filters.parse`.

    Attributes:
        dim: the length of the vectors.
        revision: increases with each write through this object.
    """

    dim: int
    revision: int

    def upsert(self, records: Sequence[Record]) -> None:
        """Insert records or replace those with the same id. The records survive a crash once this returns.

        Raises:
            StoreError: a vector has the wrong shape or is not finite (nothing is stored), or the engine failed.
        """

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[ScoredRecord]:
        """Return the `limit` records with the highest dot product with `vector`, best first, after `offset` of them."""

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        """Run several searches in one call. Returns one list per search, best first.

        Raises:
            StoreError: a vector has the wrong shape or is not finite, or the engine failed.
        """

    def order_by(
        self, column: str, kind: str, *, descending: bool, limit: int, offset: int, where: Clause | None = None
    ) -> list[Record]:
        """Return records sorted by a column. Records without a value in it are left out.

        Args:
            column: a JSON path (`filters.column_path`).
            kind: "float" for a column of numbers, "datetime" for a column of dates.
            descending: largest first.
            limit: the maximum number of records.
            offset: the number of records to skip.
            where: only records that match this filter.
        """

    def facet(self, column: str, kind: str, *, limit: int, where: Clause | None = None) -> dict[str | bool, int]:
        """Count the values of a column: value -> number of records, the most common first.

        Args:
            column: a JSON path (`filters.column_path`).
            kind: "keyword" for a column of strings, "bool" for a column of booleans.
            limit: the maximum number of values.
            where: only records that match this filter.
        """

    def index(self, column: str, kind: str) -> None:
        """Create the index of a column that filters, facets, sorts and text rankings use, unless it exists.

        Args:
            column: a JSON path (`filters.column_path`).
            kind: "keyword", "float", "bool", "datetime", "geo" or "text". It replaces an index of another kind.
        """

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        """Return the records among `ids` that exist, in no particular order."""

    def scroll(self, batch_size: int = 256, where: Clause | None = None) -> Iterator[list[Record]]:
        """Iterate over all records that match the filter, in batches, ordered by id."""

    def delete(self, ids: Sequence[str]) -> None:
        """Delete records. Ids that do not exist are ignored."""

    def count(self, where: Clause | None = None) -> int:
        """Return the exact number of records that match the filter."""

    def unindexed_count(self) -> int:
        """Return the number of records that searches scan until `optimize` indexes them."""

    def deleted_share(self, tolerance: float = 0.0) -> float:
        """Return the share of the search index that is deleted or replaced: 0 to 1.

        The index takes space and time for deleted vectors until `optimize`.

        Args:
            tolerance: the result may be too high by this share. An exact one can wait for the disk.
        """

    def optimize(self) -> None:
        """Build the search index over all records. Searches and writes continue meanwhile. May take minutes."""

    def close(self) -> None:
        """Write everything to disk and release the store. Calling it again does nothing."""


def check_records(records: Sequence[Record], dim: int) -> None:
    """Raise StoreError for a vector of the wrong shape, or with NaN or infinity, which engines store but never find."""
    for record in records:
        id = record.payload.get("id", record.id)
        if record.vector.shape != (dim,):
            raise StoreError(
                f"Item {id!r} has a vector of shape {record.vector.shape}. This store holds vectors of shape ({dim},). "
                "Encode the item with the bundle of this catalog."
            )
        if not np.isfinite(record.vector).all():
            raise StoreError(
                f"The embedding of item {id!r} contains NaN or infinity, so it was not stored. The image encoder "
                "overflows on this image. Use a bundle with fp32 precision."
            )


def check_query(vector: Vector, dim: int) -> None:
    """Raise StoreError for a query of the wrong shape, or with NaN or infinity, which engines answer with nonsense."""
    # The product is finite unless a number is not, or is huge. It takes a fifth of the time of comparing each.
    if vector.shape != (dim,) or not (np.isfinite(vector.dot(vector)) or np.isfinite(vector).all()):
        raise StoreError(
            f"The query vector has shape {vector.shape} and {np.count_nonzero(~np.isfinite(vector))} values that are "
            f"NaN or infinite. It must have {dim} finite numbers. Encode the query with the bundle of this catalog."
        )
