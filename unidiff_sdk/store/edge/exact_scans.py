"""Exact scans of the records that match a filter, or of a small store, over copies of their vectors in memory.

The engine evaluates a filter in every search, and the matching vectors lie scattered over its files. Where 10,000 of
100,000 records match, that takes most of the time. A filter that is used repeatedly therefore gets a contiguous copy of
the matching vectors, and one pass of dot products ranks them. In a small store, handing a search to a thread of the
engine takes longer than comparing all vectors, so searches without a filter get a copy, too.

A copy is derived and never written to disk. That of a small store is read by the first search. Of any other one, each
search reads a part, so that no search waits for all of it. Afterwards it follows a log of the ids that were written.
While a copy is incomplete, while a write is in progress, or if one ended during the scan, the engine answers instead.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from unidiff_sdk.store.filters import Clause, comparisons
from unidiff_sdk.store.protocol import ScoredRecord, Vector, VectorQuery

__all__ = ["ExactScans", "MatchReader", "Matches"]

BUDGET = 128 << 20  # bytes of all copies
FEWEST = 1000  # matching records; the engine searches fewer in about the time of a scan
SMALL = 1 << 20  # bytes of the vectors of a store that is copied as a whole, at once
SHARE = 50  # searches that read a copy. Reading a 50th of it takes about as long as the engine's search.
_LEAST_BATCH = 64  # records
_FILTERS = 256  # that are remembered
_LOG = 2048  # written ids that copies can follow. After more, they are read again.
_VALUES = 64  # comparisons and strings of a filter. Longer ones would take long to look up.
_ID_BYTES = 200  # of an id and its place in two collections
_LOWEST = float(np.finfo(np.float32).min)
_SAMPLE = 1024  # scores that bound the best ones from below


class MatchReader(Protocol):
    """What a copy is read from."""

    def count(self, where: Clause | None = None) -> int:
        """The number of records that match."""

    def read_matches(
        self, where: Clause | None, limit: int, start: Any = None, only: Sequence[str] = ()
    ) -> tuple[list[str], Vector, Any]:
        """Read matching records in the order of their ids.

        Args:
            where: the filter; None for all records.
            limit: the maximum number of records.
            start: where the previous call ended.
            only: if given, read only records with these ids.

        Returns:
            The ids, the vectors float32[n, dim], and where to continue; None at the end.
        """

    def read_scored(self, ranked: Sequence[tuple[float, str]], search: VectorQuery) -> list[ScoredRecord]:
        """The records with these scores and ids that exist, with what the search asks for."""


@dataclass(frozen=True)
class Matches:
    """The vectors of the records that match a filter. Immutable, so that threads can scan it while another replaces it.

    Attributes:
        ids: the ids of `vectors`.
        vectors: float32[n, dim].
        rows: the index of each id.
        dead: the rows that were deleted or replaced.
        fresh_ids: the ids of `fresh`.
        fresh: records written after `vectors` was read: float32[m, dim].
    """

    ids: list[str]
    vectors: Vector
    rows: dict[str, int]
    dead: npt.NDArray[np.intp]
    fresh_ids: list[str]
    fresh: Vector

    @classmethod
    def of(cls, ids: list[str], vectors: Vector) -> Matches:
        """A copy without changes."""
        return cls(ids, vectors, {id: k for k, id in enumerate(ids)}, np.empty(0, np.intp), [], vectors[:0])

    def updated(self, changed: set[str], ids: Sequence[str], vectors: Vector) -> Matches:
        """The copy after writes: the records `changed` are replaced by those of them that match now."""
        rows = [self.rows[id] for id in changed if id in self.rows]
        dead = np.union1d(self.dead, np.array(rows, np.intp))
        kept = [k for k, id in enumerate(self.fresh_ids) if id not in changed]
        fresh_ids = [*(self.fresh_ids[k] for k in kept), *ids]
        fresh = np.concatenate([self.fresh[kept], vectors])
        if len(dead) + len(fresh_ids) <= len(self.ids) // 8:
            return Matches(self.ids, self.vectors, self.rows, dead, fresh_ids, fresh)
        alive = np.delete(np.arange(len(self.ids)), dead)
        return Matches.of([*(self.ids[k] for k in alive), *fresh_ids], np.concatenate([self.vectors[alive], fresh]))

    def ranked(self, query: Vector, count: int) -> list[tuple[float, str]]:
        """Scores and ids of the best `count` records and of all that score like the last of them, in any order.

        `vecdot` treats every row alike, so equal vectors have equal scores. A matrix product does not, and is slower.
        """
        query = np.asarray(query, np.float32)
        scores = np.vecdot(self.vectors, query)
        if len(self.dead):
            scores[self.dead] = -np.inf
        if self.fresh_ids:
            scores = np.concatenate([scores, np.vecdot(self.fresh, query)])
        best = np.flatnonzero(scores >= max(_kth_highest(scores, count), _LOWEST))
        split = len(self.ids)
        return [
            (score, self.ids[k] if k < split else self.fresh_ids[k - split])
            for k, score in zip(best.tolist(), scores[best].tolist(), strict=True)
        ]


def _kth_highest(scores: Vector, k: int) -> float:
    """The k-th highest score; the lowest if there are fewer."""
    k = min(k, len(scores))
    if k == 0:
        return 0.0
    if k <= _SAMPLE < len(scores):  # the k-th highest of some is a lower bound of the k-th highest of all
        scores = scores[scores >= np.partition(scores[:_SAMPLE], -k)[-k]]
    return float(np.partition(scores, -k)[-k])


@dataclass
class _Copy:
    """The copy of one filter.

    Attributes:
        position: the length of the log of writes that the copy reflects, or from which it is being read.
        used: when it was last used, for eviction.
        searches: with this filter so far.
        matches: the copy, once it is complete.
        size: the number of records that matched when reading began.
        unsuitable: whether too few or too many records match.
        ids: read so far.
        buffer: the vectors read so far: float32[at least len(ids), dim].
        start: where reading continues.
    """

    position: int
    used: int
    searches: int = 0
    matches: Matches | None = None
    size: int | None = None
    unsuitable: bool = False
    ids: list[str] = field(default_factory=list)
    buffer: Vector | None = None
    start: Any = None

    @property
    def bytes(self) -> int:
        """Memory, also of what is not read yet."""
        if self.matches:
            held, count = self.matches.vectors.nbytes + self.matches.fresh.nbytes, len(self.matches.ids)
        else:
            held, count = (self.buffer.nbytes, len(self.buffer)) if self.buffer is not None else (0, 0)
        return held + _ID_BYTES * count


class ExactScans:
    """The copies of one store. Safe to use from several threads.

    Args:
        dim: the length of the vectors.
        fewest, most: how many records must match a filter for a copy.
    """

    def __init__(self, dim: int, fewest: int, most: int) -> None:
        self._dim, self._fewest, self._most = dim, fewest, most
        self._copies: dict[str, _Copy] = {}
        self._clock = itertools.count()
        self._reading = threading.Lock()  # held while a copy is read or changed
        self._log: list[str] = []  # ids written since `_log_start` writes
        self._log_start = 0
        self._position = 0  # the number of ids written
        self._logging = threading.Lock()  # never held while the engine is called
        self._is_writing = False

    # -------------------------------------------------------------------------------------------- writing

    @contextmanager
    def following(self, ids: Sequence[str]) -> Iterator[None]:
        """Enclose a write of these ids. One write at a time."""
        if not ids:
            yield
            return
        self._is_writing = True
        try:
            yield
        finally:
            with self._logging:
                self._log.extend(ids)
                self._position += len(ids)
                if len(self._log) > _LOG:
                    self._log.clear()
                    self._log_start = self._position
            self._is_writing = False

    def _written_since(self, position: int) -> tuple[int, set[str] | None]:
        """The current position, and the ids written since an earlier one; None if the log no longer has them."""
        with self._logging:
            first = position - self._log_start
            return self._position, set(self._log[first:]) if first >= 0 else None

    def clear(self) -> None:
        """Release the memory."""
        self._copies = {}

    # -------------------------------------------------------------------------------------------- searching

    def search(self, search: VectorQuery, reader: MatchReader) -> list[ScoredRecord] | None:
        """The results of a search in total order: by score, and by id where scores are equal.

        Returns:
            The results; None if the engine must answer.
        """
        if search.text is not None or (key := _key(search.where)) is None:
            return None
        position = self._position
        if self._is_writing or (matches := self._matches(key, search.where, reader, position)) is None:
            return None
        ranked = matches.ranked(search.vector, search.offset + search.limit + len(search.exclude))
        ranked = [
            (score, id)
            for score, id in ranked
            if id not in search.exclude and (search.min_score is None or score >= search.min_score)
        ]
        ranked.sort(key=lambda one: (-one[0], one[1]))
        found = reader.read_scored(ranked[search.offset :][: search.limit], search)
        return None if self._is_writing or self._position != position else found

    def _matches(self, key: str, where: Clause | None, reader: MatchReader, position: int) -> Matches | None:
        """The matches of a filter at a position of the log, if they are known."""
        copy = self._copies.get(key)
        if copy is None or copy.matches is None or copy.position != position:
            if not self._reading.acquire(blocking=False):  # another thread is reading a copy
                return None
            try:
                copy = self._advanced(key, where, reader)
            finally:
                self._reading.release()
        copy.used = next(self._clock)
        return copy.matches if copy.position == position else None

    def _advanced(self, key: str, where: Clause | None, reader: MatchReader) -> _Copy:
        """The copy of a filter after another search: up to date, or one part further."""
        copy = self._copies.get(key)
        if copy is None or copy.position < self._log_start:
            copy = _Copy(self._position, next(self._clock), copy.searches if copy else 0)
            self._copies[key] = copy
            self._evict(copy)
        copy.searches += 1
        if copy.unsuitable or (copy.searches == 1 and where is not None):
            return copy
        if copy.matches is None:
            self._read_on(copy, where, reader)
        else:
            self._follow(copy, copy.matches, where, reader)
        return copy

    def _follow(self, copy: _Copy, matches: Matches, where: Clause | None, reader: MatchReader) -> None:
        """Bring a complete copy up to date."""
        position, changed = self._written_since(copy.position)
        if not changed:
            return  # another thread did it, or a write has cleared the log just now
        ids, vectors, _ = reader.read_matches(where, len(changed), only=sorted(changed))
        copy.matches, copy.position = matches.updated(changed, ids, vectors), position
        if len(copy.matches.ids) > self._limit(where):
            copy.matches, copy.unsuitable = None, True

    def _read_on(self, copy: _Copy, where: Clause | None, reader: MatchReader) -> None:
        """Read the next part of a copy. Reading begins with the number of matches."""
        if copy.size is None or copy.buffer is None:
            copy.size = reader.count(where)
            if not self._is_suitable(copy.size, where):
                copy.unsuitable = True
                return
            copy.buffer = np.empty((copy.size + copy.size // 8, self._dim), np.float32)  # some are added meanwhile
            self._evict(copy)
        part = len(copy.buffer) if where is None else copy.size // SHARE
        ids, vectors, copy.start = reader.read_matches(where, max(_LEAST_BATCH, part), copy.start)
        end = len(copy.ids) + len(ids)
        if end > len(copy.buffer):
            copy.buffer, copy.unsuitable = None, True
            return
        copy.buffer[len(copy.ids) : end] = vectors
        copy.ids += ids
        if copy.start is None:
            copy.matches = Matches.of(copy.ids, copy.buffer[:end])
            copy.buffer = None

    def _is_suitable(self, size: int, where: Clause | None) -> bool:
        """Whether a copy of this number of records is faster than the engine."""
        return (where is None or size >= self._fewest) and size <= self._limit(where)

    def _limit(self, where: Clause | None) -> int:
        """The maximum number of records of a copy."""
        return self._most if where is not None else min(self._most, SMALL // (4 * self._dim))

    def _evict(self, kept: _Copy) -> None:
        """Forget the copies that were not used for the longest time until the others fit into the limits."""
        oldest = sorted(self._copies.items(), key=lambda item: item[1].used)
        size = sum(copy.bytes for copy in self._copies.values())
        for key, copy in oldest:
            if len(self._copies) <= _FILTERS and size <= BUDGET:
                break
            if copy is not kept:
                size -= copy.bytes
                del self._copies[key]


def _key(where: Clause | None) -> str | None:
    """A string that identifies a filter; None if that would be long. Clauses compare 1 and True as equal."""
    if where is None:
        return ""
    values = 0
    for test in comparisons(where):
        values += len(test.value) if isinstance(test.value, tuple) else 1
        if values > _VALUES:
            return None
    return repr(where)
