"""Qdrant Edge: the Qdrant engine inside this process, its data in one folder."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge

from unidiff_sdk.errors import StoreError, UniDiffError
from unidiff_sdk.store.filters import Box, Circle, Clause, Compare, bounds, index_kinds, translate
from unidiff_sdk.store.indexes import PayloadIndexes
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

from .optimizer import optimize_in_subprocess
from .page_cache import warm_page_cache
from .quantization import RESCORE, check_quantization, stored_quantization, vector_parameters
from .shard_versions import ShardVersions

__all__ = ["EdgeStore"]

_INDEX_KINDS = {
    "keyword": edge.PayloadSchemaType.Keyword,
    "float": edge.PayloadSchemaType.Float,
    "bool": edge.PayloadSchemaType.Bool,
    "datetime": edge.PayloadSchemaType.Datetime,
    "geo": edge.PayloadSchemaType.Geo,
    "text": edge.PayloadSchemaType.Text,
}
# `scoring` records what BM25 needs beside what `contains` needs.
_TEXT_INDEX = edge.TextIndexParams(tokenizer=edge.TokenizerType.Word, lowercase=True, scoring=True)

# The graph of an index: links of an item, and candidates for each; both as is the engine's custom.
LINKS, AT_BUILD = 16, 100
# What passes a filter is scanned if its vectors are no larger: 20,000 of 512 numbers. Above that the graph is searched,
# by ACORN (Patel et al. 2024), which steps over what does not pass. Without it, the few that pass are seldom linked
# to each other: where 10 % pass, three hits in ten were found.
FULL_SCAN_KB = 40_000

_CATCH_UP = 64  # points brought over at once: a few milliseconds


class EdgeStore:
    """A store in a folder; created if the folder has none.

    The engine locks itself (16 threads mixing upserts, searches and deletes are tested); guarded here are writes, which
    an `optimize` in another thread must not miss, and closing. One process may hold the folder at a time.

    Args:
        path: folder of the store (`generations`).
        dim: length of the vectors.
        quantization: how a store that is created compresses its vectors for searching (`quantization`).

    Raises:
        StoreError: the folder is in use, or its store was made with another quantization.
        OptionError: there is no such quantization.
    """

    def __init__(self, path: Path, dim: int, quantization: str | None = None) -> None:
        self.path, self.dim = path, dim
        self._writing = threading.RLock()
        self._optimizing = threading.Lock()
        self._written: set[str] | None = None  # while an index is built: the points that it will lack
        self._replaced: tuple[edge.EdgeShard, Path] | None = None
        self._closed = False
        self._versions = ShardVersions(path)
        try:
            with _translated(path):
                self._shard = _open(self._versions.current, dim, quantization)
                schema = self._shard.info().payload_schema
                self.quantization = stored_quantization(self._versions.current)
                check_quantization(quantization, self.quantization, path)
        except UniDiffError:
            self._versions.release()
            raise
        rescore = RESCORE if self.quantization else None
        self._params = edge.SearchParams(acorn=edge.AcornSearchParams(enable=True), quantization=rescore)
        names = {value: kind for kind, value in _INDEX_KINDS.items()}
        existing = {key: names[index.data_type] for key, index in schema.items() if index.data_type in names}
        self._indexes = PayloadIndexes(existing)

    def upsert(self, records: Sequence[Record]) -> None:
        check_records(records, self.dim)
        points = [edge.Point(r.id, {VECTOR: r.vector.tolist()}, r.payload) for r in records]
        with self._write([r.id for r in records]) as shard:
            shard.update(edge.UpdateOperation.upsert_points(points))

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[ScoredRecord]:
        return self.query_batch([VectorQuery(vector, limit, offset, where)])[0]

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        requests = [self._request(search) for search in searches]
        with self._engine() as shard:
            # One alone is planned faster than as a batch of one.
            answers = (
                shard.query_batch(edge.QueryBatchRequest(requests))
                if len(requests) != 1
                else [shard.query(requests[0])]
            )
        return [[_found(point) for point in points] for points in answers]

    def _request(self, search: VectorQuery) -> edge.QueryRequest:
        check_query(search.vector, self.dim)
        condition = self._filter(search.where, search.exclude)
        query: Any = edge.Query.Nearest(search.vector.tolist(), using=VECTOR)
        prefetches = None
        if search.text is not None:
            self._indexes.need(CAPTION, "text", self)
            lists = query, edge.TextQuery(CAPTION, search.text)
            prefetches = [edge.Prefetch(CANDIDATES, query=one, filter=condition, params=self._params) for one in lists]
            weights = [2 * (1 - search.bm25_weight), 2 * search.bm25_weight]
            query = edge.Fusion.Rrf(RRF_K + 1, weights)  # the engine counts ranks from 0
        return edge.QueryRequest(
            query=query,
            prefetches=prefetches,
            limit=search.limit,
            offset=search.offset,
            filter=condition,
            params=self._params,
            score_threshold=search.min_score,
            with_payload=search.with_payload,
            with_vector=search.with_vectors,
        )

    def order_by(
        self, column: str, kind: str, *, descending: bool, limit: int, offset: int, where: Clause | None = None
    ) -> list[Record]:
        self._indexes.need(column, kind, self)
        direction = edge.Direction.Desc if descending else edge.Direction.Asc
        request = edge.QueryRequest(
            query=edge.OrderBy(column, direction),
            limit=limit,
            offset=offset,
            filter=self._filter(where),
            with_payload=True,
            with_vector=True,
        )
        with self._engine() as shard:
            return [_record(point) for point in shard.query(request)]

    def facet(self, column: str, kind: str, *, limit: int, where: Clause | None = None) -> dict[str | bool, int]:
        self._indexes.need(column, kind, self)
        with self._engine() as shard:
            request = edge.FacetRequest(column, limit, exact=True, filter=self._filter(where))
            return {hit.value: hit.count for hit in shard.facet(request).hits if isinstance(hit.value, str | bool)}

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        with self._engine() as shard:
            return [_record(point) for point in shard.retrieve(list(ids), True, True)]

    def scroll(self, batch_size: int = 256, where: Clause | None = None) -> Iterator[list[Record]]:
        offset, condition = None, self._filter(where)
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=batch_size, filter=condition, with_payload=True, with_vector=True
            )
            with self._engine() as shard:
                points, offset = shard.scroll(request)
            if points:
                yield [_record(point) for point in points]
            if offset is None:
                return

    def delete(self, ids: Sequence[str]) -> None:
        with self._write(ids) as shard:
            shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def count(self, where: Clause | None = None) -> int:
        with self._engine() as shard:
            return int(shard.count(edge.CountRequest(exact=True, filter=self._filter(where))))

    def unindexed_count(self) -> int:
        with self._engine() as shard:
            info = shard.info()
        return int(info.points_count - info.indexed_vectors_count)

    def optimize(self) -> None:
        """Merge segments and build the HNSW index, in a child process and on a copy that is then swapped in.

        Searches and writes go on meanwhile; writes wait while the files are copied. All that the engine does here holds
        Python's global lock only while the finished copy is loaded. A kill at any moment leaves the shard as it was.
        """
        with self._optimizing:
            self._let_go_of_replaced()

            # 1. A copy, of a moment in which nothing is being written. It is what a crash would leave: the write-ahead
            # log makes it whole when it is opened. (Flushing first would stop every thread for longer.)
            copy = self._versions.following()
            fresh = None
            try:
                with self._write([]), _translated(self.path):
                    # The engine prepares the log's next piece under this name and renames it when it is made.
                    shutil.copytree(self._versions.current, copy, ignore=shutil.ignore_patterns("tmp-open-*"))
                    self._written = set()

                # 2. The index, without this process's global lock.
                optimize_in_subprocess(copy)

                # 3. What was written meanwhile: most of it while writing goes on, the rest with the swap.
                with _translated(self.path):
                    warm_page_cache(copy)
                    fresh = edge.EdgeShard.load(str(copy))
                    while len(self._written) > _CATCH_UP:
                        with self._writing:
                            written, self._written = self._written, set()
                        self._replay(sorted(written), fresh)
                    with self._write([]) as old:
                        self._replay(sorted(self._written), fresh)
                        _mirror_indexes(old, fresh)
                        self._replaced = old, self._versions.current
                        self._versions.switch(copy)
                        self._shard, fresh = fresh, None
            finally:
                self._written = None
                if fresh is not None:
                    fresh.close()
                if self._versions.current != copy:
                    self._versions.remove(copy)

    def _replay(self, ids: Sequence[str], fresh: edge.EdgeShard) -> None:
        """Bring points of a shard to what they are in this one, gone ones too."""
        for start in range(0, len(ids), _CATCH_UP):
            batch = ids[start : start + _CATCH_UP]
            points = self._shard.retrieve(list(batch), True, True)
            gone = set(batch) - {str(point.id) for point in points}
            fresh.update(edge.UpdateOperation.delete_points(sorted(gone)))
            fresh.update(
                edge.UpdateOperation.upsert_points(
                    [edge.Point(point.id, point.vector or {}, point.payload) for point in points]
                )
            )

    def _let_go_of_replaced(self) -> None:
        """Close the shard before this one. Not at the swap: closing waits for the disk, and holds the global lock."""
        if self._replaced:
            shard, folder = self._replaced
            self._replaced = None
            with _translated(self.path):
                shard.close()
            self._versions.remove(folder)

    def close(self) -> None:
        with self._optimizing, self._writing:
            if not self._closed:
                self._closed = True
                try:
                    with _translated(self.path):
                        self._shard.flush()
                        self._shard.close()
                    self._let_go_of_replaced()
                finally:
                    self._versions.release()

    @contextlib.contextmanager
    def _write(self, ids: Sequence[str]) -> Iterator[edge.EdgeShard]:
        with self._writing, self._engine() as shard:
            if self._written is not None:
                self._written.update(ids)
            yield shard

    @contextlib.contextmanager
    def _engine(self) -> Iterator[edge.EdgeShard]:
        if self._closed:
            raise StoreError(f"The store at {self.path} is closed.")
        with _translated(self.path):
            yield self._shard

    def _filter(self, where: Clause | None, exclude: Sequence[str] = ()) -> edge.Filter | None:
        if where is None and not exclude:
            return None
        must: list[Any] = []
        if where is not None:
            self._indexes.serve(index_kinds(where), self)
            must.append(translate(where, edge.Filter, _test))
        return edge.Filter(must=must, must_not=[edge.HasIdCondition(set(exclude))] if exclude else None)

    def create_index(self, column: str, kind: str) -> None:
        schema = _TEXT_INDEX if kind == "text" else _INDEX_KINDS[kind]
        with self._write([]) as shard:
            shard.update(edge.UpdateOperation.create_field_index(column, schema))

    def drop_index(self, column: str) -> None:
        with self._write([]) as shard:
            shard.update(edge.UpdateOperation.delete_field_index(column))


def _found(point: edge.ScoredPoint) -> ScoredRecord:
    vector = np.asarray(point.vector[VECTOR], np.float32) if point.vector else None  # type: ignore[call-overload]
    return ScoredRecord(str(point.id), point.score, point.payload or {}, vector)


def _open(path: Path, dim: int, quantization: str | None) -> edge.EdgeShard:
    if (path / "edge_config.json").is_file():
        warm_page_cache(path)
        return edge.EdgeShard.load(str(path))
    path.mkdir(parents=True, exist_ok=True)
    vectors = {VECTOR: edge.EdgeVectorParams(dim, edge.Distance.Dot, **vector_parameters(quantization))}
    graph = edge.HnswIndexConfig(LINKS, AT_BUILD, FULL_SCAN_KB)
    return edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=vectors, hnsw_config=graph))


def _mirror_indexes(old: edge.EdgeShard, fresh: edge.EdgeShard) -> None:
    """Give a shard the payload indexes of another; which differ only if one was made or dropped under way."""
    wanted, has = old.info().payload_schema, fresh.info().payload_schema
    for column in has.keys() - wanted.keys():
        fresh.update(edge.UpdateOperation.delete_field_index(column))
    for column, index in wanted.items():
        if column not in has or has[column].data_type != index.data_type:
            schema = index.params or index.data_type
            fresh.update(edge.UpdateOperation.create_field_index(column, schema))


def _record(point: Any) -> Record:
    return Record(str(point.id), np.asarray(point.vector[VECTOR], np.float32), point.payload or {})


def _test(test: Compare) -> Any:
    key, op, value = test.key, test.op, test.value
    if op == "empty":
        return edge.IsEmptyCondition(key)
    if op == "null":
        return edge.IsNullCondition(key)
    match value:
        case bool():
            # A Python bool is taken for an int by the binding and then matches nothing; numpy's bool is not.
            return edge.FieldCondition(key, match=edge.MatchValue(np.bool_(value)))  # type: ignore[arg-type]
        case str():
            words = op == "contains"
            return edge.FieldCondition(key, match=edge.MatchText(value) if words else edge.MatchValue(value))
        case tuple():
            return edge.FieldCondition(key, match=edge.MatchAny(list(value)))
        case datetime():
            moment = value.isoformat(timespec="microseconds")
            return edge.FieldCondition(key, range=edge.RangeDateTime(**dict.fromkeys(bounds(op), moment)))
        case Circle(lat, lon, radius):
            return edge.FieldCondition(key, geo_radius=edge.GeoRadius(edge.GeoPoint(lon, lat), radius))
        case Box(west, east, south, north):
            corners = edge.GeoPoint(west, north), edge.GeoPoint(east, south)
            return edge.FieldCondition(key, geo_bounding_box=edge.GeoBoundingBox(*corners))
        case _:
            return edge.FieldCondition(key, range=edge.RangeFloat(**dict.fromkeys(bounds(op), float(value))))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The engine raises bare Exceptions; say them as StoreErrors."""
    try:
        yield
    except UniDiffError:
        raise
    except Exception as error:
        raise StoreError(f"The store at {path} failed: {error}") from error
