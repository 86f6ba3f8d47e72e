"""A store in a folder, searched by Qdrant Edge inside this process."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import qdrant_edge as edge

from unidiff_sdk._internal.lifetimes import Owner, keep_in_child
from unidiff_sdk._internal.memory import RESERVE, free_space, require_free_space
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import StoreError, UniDiffError
from unidiff_sdk.store.filters import Clause, Compare, index_kinds, translate
from unidiff_sdk.store.indexes import PayloadIndexes
from unidiff_sdk.store.ordering import Ranked, Window, in_total_order, ranked_by_value, read_page, records_in_order
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.protocol import (
    CANDIDATES,
    CAPTION,
    RRF_K,
    VECTOR,
    Record,
    ScoredRecord,
    Vector,
    VectorQuery,
    check_query,
    check_records,
)

from .conditions import condition
from .deletions import GraphState
from .exact_scans import FEWEST, ExactScans
from .growth import ESSENTIAL, PLENTY, UNFLUSHED, growth_of, index_growth, opening_growth, optimizing_growth
from .optimizer import optimize_in_subprocess
from .page_cache import warm_page_cache
from .quantization import RESCORE, check_quantization, stored_quantization
from .shard import (
    FULL_SCAN_KB,
    INDEX_TYPES,
    TEXT_INDEX,
    index_kinds_of,
    mirror_indexes,
    open_shard,
    stored_full_scan_kb,
)
from .shard_versions import ShardVersions

__all__ = ["EdgeStore"]

T = TypeVar("T")

_FLOAT = 4  # bytes
_SAMPLE = 64  # records by which the size of all is estimated
_REPLAY_BATCH = 64  # points copied to a new shard at a time, which takes a few milliseconds


class EdgeStore:
    """A `Store` in a folder, created if the folder has none. One process can open the folder at a time.

    The engine is thread-safe. This class adds locks for writes, which an `optimize` in another thread must not miss,
    and for closing.

    Args:
        path: the folder of the store (`shard_versions` has its layout).
        dim: the length of the vectors.
        quantization: of a new store: "scalar" (int8) or None (`quantization`). An existing store keeps its own.
        full_scan_kb: of a new store: items that match a filter are scanned instead of searched through the graph if
            their vectors take at most this many kilobytes.
        build_index: builds the search index of a shard in a folder. By default in a child process.
        create: create a missing store. If False, a missing one is an error.

    Attributes:
        quantization: the quantization of the store.
        revision: increases with each write.

    Raises:
        StoreError: the folder is in use, not writable, damaged or missing, or its store has another quantization or
            vectors of another length.
        OptionError: `quantization` is not supported.
    """

    def __init__(
        self,
        path: Path,
        dim: int,
        quantization: str | None = None,
        *,
        full_scan_kb: int = FULL_SCAN_KB,
        build_index: Callable[[Path], None] = optimize_in_subprocess,
        create: bool = True,
    ) -> None:
        self.path, self.dim = path, dim
        self._build_index = build_index
        self._writing = threading.RLock()
        self._optimizing = threading.Lock()
        self._written: set[str] | None = None  # ids written since `optimize` copied the shard
        self._replaced: tuple[edge.EdgeShard, Path] | None = None
        self._closed = False
        self._unflushed = 0  # ids written since the last flush
        self.revision = 0
        self._versions = ShardVersions(path, create=create)
        try:
            with _StoreErrors(path, None):
                self._shard = open_shard(self._versions.current, dim, quantization, full_scan_kb)
                self._versions.activate(self._versions.current)
                self.quantization = stored_quantization(self._versions.current)
                self._full_scan_kb = stored_full_scan_kb(self._versions.current)
                self._indexes = PayloadIndexes(index_kinds_of(self._shard))
                self._graphs = GraphState.measure(self._shard, self._versions.current)
                most = 1024 * (self._full_scan_kb or FULL_SCAN_KB) // (_FLOAT * dim)
                self._scans = ExactScans(dim, FEWEST, most)
            check_quantization(quantization, self.quantization, path)
        except UniDiffError:
            self._versions.release()
            raise
        self._owner = Owner(f"The store at {path}")
        keep_in_child(self, "_shard", "_replaced")

    # -------------------------------------------------------------------------------------------- reading

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[ScoredRecord]:
        return self.query_batch([VectorQuery(vector, limit, offset, where)])[0]

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        with self._engine():
            for search in searches:
                check_query(search.vector, self.dim)
            scanned = [self._scans.search(search, self) for search in searches]
        others = [search for search, found in zip(searches, scanned, strict=True) if found is None]
        answers = iter(in_total_order(others, self._query_batch, self.retrieve) if others else [])
        return [next(answers) if found is None else found for found in scanned]

    def _query_batch(self, searches: Sequence[VectorQuery], windows: Sequence[Window]) -> list[list[ScoredRecord]]:
        """The results in the order of the engine, which is undefined between equal scores."""
        # The engine runs a single query faster than a batch of one. A search is faster still, because it reads the
        # payloads in the same step. It cannot fuse rankings.
        is_single = len(searches) == 1
        is_search = is_single and searches[0].text is None
        kind = edge.SearchRequest if is_search else edge.QueryRequest
        requests = [self._request(search, window, kind) for search, window in zip(searches, windows, strict=True)]
        with self._engine() as shard:
            if is_single:
                answers = [shard.search(*requests) if is_search else shard.query(*requests)]
            else:
                answers = shard.query_batch(edge.QueryBatchRequest(requests))
        return [
            [
                ScoredRecord.of_point(point, point.score, _vector(point) if search.with_vectors else None)
                for point in points
            ]
            for search, points in zip(searches, answers, strict=True)
        ]

    def _request(self, search: VectorQuery, window: Window, kind: Callable[..., Any]) -> Any:
        conditions = self._filter(search.where, search.exclude)
        query: Any = edge.Query.Nearest(search.vector.tolist(), using=VECTOR)
        options = self._graphs.search_options(self.dim, self._full_scan_kb, search.ef, search.exact)
        params = _search_params(self.quantization is not None, **options)
        fusion: dict[str, Any] = {}
        if search.text is not None:
            self._indexes.ensure(CAPTION, "text", self)
            rankings = query, edge.TextQuery(CAPTION, search.text)
            fusion["prefetches"] = [
                edge.Prefetch(CANDIDATES, query=ranking, filter=conditions, params=params) for ranking in rankings
            ]
            weights = [2 * (1 - search.bm25_weight), 2 * search.bm25_weight]
            query = edge.Fusion.Rrf(RRF_K + 1, weights)  # + 1: the engine counts ranks from 0
        return kind(
            query=query,
            limit=window.size,
            offset=window.start,
            filter=conditions,
            params=params,
            score_threshold=search.min_score,
            with_payload=search.with_payload,
            with_vector=search.with_vectors,
            **fusion,
        )

    def order_by(
        self, column: str, kind: str, *, descending: bool, limit: int, offset: int, where: Clause | None = None
    ) -> list[Record]:
        self._indexes.ensure(column, kind, self)
        direction = edge.Direction.Desc if descending else edge.Direction.Asc
        conditions = self._filter(where)

        def fetch(window: Window) -> list[Ranked]:
            request = edge.QueryRequest(
                query=edge.OrderBy(column, direction), limit=window.size, offset=window.start, filter=conditions
            )
            with self._engine() as shard:
                return [ranked_by_value(point, descending) for point in shard.query(request)]

        return records_in_order(self.retrieve, read_page(fetch, offset, limit))

    def facet(self, column: str, kind: str, *, limit: int, where: Clause | None = None) -> dict[str | bool, int]:
        self._indexes.ensure(column, kind, self)
        with self._engine() as shard:
            request = edge.FacetRequest(column, limit, exact=True, filter=self._filter(where))
            return {hit.value: hit.count for hit in shard.facet(request).hits if isinstance(hit.value, str | bool)}

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        with self._engine() as shard:
            return [_record(point) for point in shard.retrieve(list(ids), True, True)]

    def read_matches(
        self, where: Clause | None, limit: int, start: Any = None, only: Sequence[str] = ()
    ) -> tuple[list[str], Vector, Any]:
        conditions = self._filter(where, only=only)
        request = edge.ScrollRequest(offset=start, limit=limit, filter=conditions, with_payload=False, with_vector=True)
        with self._engine() as shard:
            points, end = shard.scroll(request)
        records = [record for point in points if (record := _record(point)).vector.size]
        vectors = np.array([record.vector for record in records], np.float32).reshape(-1, self.dim)
        return [record.id for record in records], vectors, end

    def read_scored(self, ranked: Sequence[tuple[float, str]], search: VectorQuery) -> list[ScoredRecord]:
        with self._engine() as shard:
            points = shard.retrieve([id for _, id in ranked], search.with_payload, search.with_vectors)
        if len(points) < len(ranked):  # some were deleted meanwhile; otherwise the points are in the order of the ids
            known = {str(point.id): point for point in points}
            ranked = [(score, id) for score, id in ranked if id in known]
            points = [known[id] for _, id in ranked]
        return [
            ScoredRecord(id, score, point.payload or {}, _vector(point))
            for (score, id), point in zip(ranked, points, strict=True)
        ]

    def scroll(self, batch_size: int = 256, where: Clause | None = None) -> Iterator[list[Record]]:
        offset, conditions = None, self._filter(where)
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=batch_size, filter=conditions, with_payload=True, with_vector=True
            )
            with self._engine() as shard:
                points, offset = shard.scroll(request)
            if points:
                yield [_record(point) for point in points]
            if offset is None:
                return

    def count(self, where: Clause | None = None) -> int:
        with self._engine() as shard:
            return int(shard.count(edge.CountRequest(exact=True, filter=self._filter(where))))

    def unindexed_count(self) -> int:
        return self._measured().unindexed

    def deleted_share(self, tolerance: float = 0.0) -> float:
        graphs = self._graphs
        exact = self._measured() if graphs.written > tolerance * graphs.in_graphs else graphs
        return exact.deleted_share

    def _measured(self) -> GraphState:
        with self._write([]) as shard:
            self._graphs = GraphState.measure(shard, self._versions.current)
            return self._graphs

    # -------------------------------------------------------------------------------------------- writing

    def upsert(self, records: Sequence[Record]) -> None:
        check_records(records, self.dim)
        points = [edge.Point(r.id, {VECTOR: r.vector.tolist()}, r.payload) for r in records]
        with self._write([r.id for r in records], lambda: growth_of((r.payload for r in records), self.dim)) as shard:
            shard.update(edge.UpdateOperation.upsert_points(points))

    def delete(self, ids: Sequence[str]) -> None:
        with self._write(ids, reserve=ESSENTIAL) as shard:
            shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def index(self, column: str, kind: str) -> None:
        self._indexes.ensure(column, kind, self)

    def create_index(self, column: str, kind: str) -> None:
        schema = TEXT_INDEX if kind == "text" else INDEX_TYPES[kind]
        with self._write([]) as shard:
            # Deleting needs an index of a system column, and must be possible where little space is left.
            is_system = column.startswith(SYSTEM)
            sample = [payload.get(SYSTEM, payload) if is_system else payload for payload in self._sample()]
            growth = index_growth(sample, shard.info().points_count)
            reserve = ESSENTIAL if is_system else RESERVE
            require_free_space(self.path, growth, f"an index of the column {column!r}", reserve=reserve)
            shard.update(edge.UpdateOperation.create_field_index(column, schema))
            self._flush_if_scarce(shard)

    def has_column(self, column: str) -> bool:
        return bool(next(self.scroll(1, Compare(column, "exists", True)), []))

    def drop_index(self, column: str) -> None:
        with self._write([]) as shard:
            shard.update(edge.UpdateOperation.delete_field_index(column))

    def close(self) -> None:
        if not self._owner.is_current:
            return
        with self._optimizing, self._writing:
            if not self._closed:
                self._closed = True
                self._scans.clear()
                try:
                    with _StoreErrors(self.path, None):
                        self._shard.flush()
                        self._shard.close()
                    self._close_replaced()
                except StoreError as error:
                    if free_space(self.path) >= ESSENTIAL:
                        raise
                    del self._shard  # releases its files
                    warn(
                        f"{self.path} was closed on a full disk. No data is lost: what was not written yet is in the "
                        f"log, which is replayed when the catalog is opened again. ({error})"
                    )
                finally:
                    self._versions.release()

    # -------------------------------------------------------------------------------------------- optimizing

    def optimize(self) -> None:
        """Merge segments and build the HNSW index of a copy of the shard, then replace the shard by the copy.

        Searches and writes continue meanwhile; writes wait only while the files are copied. The global interpreter
        lock is held only while the finished copy is loaded. A kill at any time leaves the shard as it was.
        """
        self._owner.check()
        with self._optimizing:
            self._close_replaced()
            copy = self._versions.next_folder()
            growth = optimizing_growth(self._versions.current, self._sample(), self.count(), self.dim)
            require_free_space(self.path, growth, "building the search index")
            fresh = None
            try:
                self._copy_shard(copy)
                self._build_index(copy)
                with _StoreErrors(self.path, None):
                    require_free_space(self.path, opening_growth(copy), "opening the new search index")
                    warm_page_cache(copy)
                    fresh = edge.EdgeShard.load(str(copy))
                    self._catch_up(fresh)
                    self._switch_to(fresh, copy)
                    fresh = None
            finally:
                self._written = None
                if fresh is not None:
                    fresh.close()
                if self._versions.current != copy:
                    self._versions.remove(copy)

    def _copy_shard(self, copy: Path) -> None:
        """Copy the shard while nothing is written, and record the ids of later writes.

        The copy is in the state that a crash would leave. The write-ahead log repairs it when it is opened. Flushing
        first would stop every thread for longer.
        """
        with self._write([]), _StoreErrors(self.path, None):
            # The engine prepares the next segment of its log under this name and then renames it.
            shutil.copytree(self._versions.current, copy, ignore=shutil.ignore_patterns("tmp-open-*"))
            self._written = set()

    def _catch_up(self, fresh: edge.EdgeShard) -> None:
        """Apply to a new shard what was written since it was copied, while writing continues."""
        while self._written is not None and len(self._written) > _REPLAY_BATCH:
            with self._writing:
                written, self._written = self._written, set()
            self._replay(sorted(written), fresh)

    def _switch_to(self, fresh: edge.EdgeShard, folder: Path) -> None:
        """Apply the last writes and replace the current shard."""
        with self._write([]) as old:
            self._replay(sorted(self._written or ()), fresh)
            mirror_indexes(old, fresh)
            self._replaced = old, self._versions.current
            self._versions.activate(folder)
            self._shard, self._graphs = fresh, GraphState.measure(fresh, folder)

    def _replay(self, ids: Sequence[str], fresh: edge.EdgeShard) -> None:
        """Make points of a new shard equal to those of the current one; deleted points are deleted."""
        for start in range(0, len(ids), _REPLAY_BATCH):
            batch = ids[start : start + _REPLAY_BATCH]
            points = self._shard.retrieve(list(batch), True, True)
            deleted = set(batch) - {str(point.id) for point in points}
            growth = growth_of((point.payload or {} for point in points), self.dim)
            require_free_space(self.path, growth, "copying concurrent changes to the new search index")
            fresh.update(edge.UpdateOperation.delete_points(sorted(deleted)))
            fresh.update(
                edge.UpdateOperation.upsert_points(
                    [edge.Point(point.id, point.vector or {}, point.payload) for point in points]
                )
            )

    def _close_replaced(self) -> None:
        """Close the previous shard. This waits for the disk with the GIL held, so it is not done at the switch."""
        if self._replaced:
            shard, folder = self._replaced
            self._replaced = None
            with _StoreErrors(self.path, None):
                shard.close()
            self._versions.remove(folder)

    # -------------------------------------------------------------------------------------------- the engine

    def _engine(self) -> _StoreErrors[edge.EdgeShard]:
        """The open shard, in a `with` statement that converts its errors."""
        self._owner.check()
        if self._closed:
            raise StoreError(f"The store at {self.path} is closed. Open the catalog again.")
        return _StoreErrors(self.path, self._shard)

    @contextlib.contextmanager
    def _write(
        self, ids: Sequence[str], growth: Callable[[], int] = lambda: 0, *, reserve: int = RESERVE
    ) -> Iterator[edge.EdgeShard]:
        """The shard, locked for writing the points with these ids.

        Args:
            ids: the points; none if only files are copied or indexes changed.
            growth: estimates the bytes that will be written.
            reserve: bytes of disk space that must remain free.
        """
        self._owner.check()
        with self._writing, self._engine() as shard:
            if ids and free_space(self.path) < PLENTY:
                required = growth() + opening_growth(self._versions.current)
                require_free_space(self.path, required, "a write to the catalog", reserve=reserve)
            self.revision += bool(ids)
            self._graphs.written += len(ids)
            if self._written is not None:
                self._written.update(ids)
            with self._scans.following(ids):
                yield shard
            if ids:
                self._unflushed += len(ids)
                self._flush_if_scarce(shard)
            if self._graphs.is_stale:
                self._graphs = GraphState.measure(shard, self._versions.current)

    def _sample(self) -> list[dict[str, Any]]:
        """The payloads of some records."""
        return [record.payload for record in next(self.scroll(_SAMPLE), [])]

    def _flush_if_scarce(self, shard: edge.EdgeShard) -> None:
        """Write what waits in memory while the disk has room for it. Its files are mapped into memory, too."""
        if self._unflushed >= UNFLUSHED or free_space(self.path) < PLENTY:
            shard.flush()
            self._unflushed = 0

    def _filter(
        self, where: Clause | None, exclude: Sequence[str] = (), only: Sequence[str] = ()
    ) -> edge.Filter | None:
        if where is None and not exclude and not only:
            return None
        must: list[Any] = []
        if where is not None:
            self._indexes.ensure_for_filter(index_kinds(where), self)
            must.append(translate(where, edge.Filter, condition))
        if only:
            must.append(edge.HasIdCondition(set(only)))
        return edge.Filter(must=must, must_not=[edge.HasIdCondition(set(exclude))] if exclude else None)


@lru_cache(maxsize=64)
def _search_params(rescored: bool, **options: Any) -> edge.SearchParams:
    """The engine's parameters of a search, which most searches have in common."""
    quantization = RESCORE if rescored else None
    return edge.SearchParams(acorn=edge.AcornSearchParams(enable=True), quantization=quantization, **options)


def _vector(point: edge.ScoredPoint | edge.Record) -> Vector | None:
    """The vector of a point, if the search asked for it."""
    return np.asarray(point.vector[VECTOR], np.float32) if point.vector else None  # type: ignore[call-overload]


def _record(point: Any) -> Record:
    vector = (point.vector or {}).get(VECTOR, [])  # a damaged record may lack it; `images.checking` reports that
    return Record(str(point.id), np.asarray(vector, np.float32), point.payload or {})


class _StoreErrors(Generic[T]):
    """Converts the bare Exceptions of the engine to StoreErrors.

    It is a class because `contextlib.contextmanager` takes five times as long, several times in each search.

    Args:
        path: the folder of the store.
        target: what the `with` statement binds.
    """

    __slots__ = ("_path", "_target")

    def __init__(self, path: Path, target: T) -> None:
        self._path, self._target = path, target

    def __enter__(self) -> T:
        return self._target

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UniDiffError):
            raise StoreError(f"The store at {self._path} failed: {error}") from error
