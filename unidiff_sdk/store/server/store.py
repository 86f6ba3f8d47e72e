"""A store in a collection of a Qdrant server or cluster."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from qdrant_client import QdrantClient, models

from unidiff_sdk._internal.lifetimes import Owner, keep_in_child
from unidiff_sdk.errors import ForbiddenError, StoreError
from unidiff_sdk.store.filters import Clause, Compare, index_kinds, translate
from unidiff_sdk.store.indexes import PayloadIndexes
from unidiff_sdk.store.ordering import Ranked, Window, in_total_order, ranked_by_value, read_page, records_in_order
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
from .connection import ServerOptions
from .points import Points, check_progress
from .retries import check_confirmed, exceeds_limit, failure, interrupt

__all__ = ["ServerStore"]

R = TypeVar("R")

# `scoring` stores what BM25 needs, in addition to what `contains` needs.
_TEXT_INDEX = models.TextIndexParams(
    type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.WORD, lowercase=True, scoring=True
)
# Payload indexes are created after the graph, which therefore has no links for them. ACORN finds the items that match a
# filter nevertheless (`edge.shard.FULL_SCAN_KB`).
_ACORN = models.AcornSearchParams(enable=True)


def _base(collection: str) -> str:
    """The name of a catalog's first collection. Those of reindexed catalogs append the fingerprint of the bundle."""
    return re.sub(r"-[0-9a-f]{12}$", "", collection)


class ServerStore:
    """A `Store` in a collection, created if the server has none of that name.

    The metadata of the collection hold the fingerprint of the bundle, so that every client checks it.

    Args:
        client: a client, such as from `connection.connect`. The local mode `QdrantClient(":memory:")` serves tests.
        collection: the name of the collection.
        dim: the length of the vectors.
        fingerprint: of the bundle that makes the vectors.
        options: the layout of a new collection.
        create: create a missing collection. If False, a missing one is an error.
        is_record: (id, payload) to whether this SDK stored that point. Other clients of a shared server may have
            stored others: these are skipped with a warning, and never changed. `count` and `facet` include them until
            another call has met them. Default: all points count as stored by this SDK.

    Raises:
        StoreError: the server failed, the collection was not made by UniDiff, or it was made with another bundle.
    """

    def __init__(
        self,
        client: QdrantClient,
        collection: str,
        dim: int,
        fingerprint: str,
        options: ServerOptions | None = None,
        *,
        create: bool = True,
        is_record: Callable[[str, Any], bool] = lambda id, payload: True,
    ) -> None:
        options = options or ServerOptions()
        self.client, self.collection, self.dim = client, collection, dim
        self._alias = options.alias
        self._reading, self._writing = options.read_parameters(), options.write_parameters()
        self._points = Points(collection, dim, is_record)
        self._owner = Owner(f'The connection to the collection "{collection}"')
        keep_in_child(self, "client")
        self._lock = threading.Lock()
        self._closed = False
        self.revision = 0
        with self._engine():
            if not client.collection_exists(collection):
                if not create:
                    raise StoreError(
                        f'The server has no collection "{collection}", which holds the vectors of this catalog. '
                        "Restore it from a snapshot, or check the URL and collection=."
                    )
                self._create(options, fingerprint)
        self._indexes = PayloadIndexes(self._check(fingerprint))

    def _create(self, options: ServerOptions, fingerprint: str) -> None:
        vectors = models.VectorParams(size=self.dim, distance=models.Distance.DOT, on_disk=options.on_disk or None)
        try:
            self.client.create_collection(
                self.collection,
                vectors_config={VECTOR: vectors},
                metadata={"unidiff": {"fingerprint": fingerprint}},
                **options.collection_parameters(),
            )
        except Exception:
            # Another process created it first, or the request succeeded, its response was lost, and it was retried.
            if not self.client.collection_exists(self.collection):
                raise

    def _check(self, fingerprint: str) -> dict[str, str]:
        """Check that the collection belongs to this bundle. Returns its payload indexes: column -> kind."""
        with self._engine():
            info = self.client.get_collection(self.collection)
            vectors, metadata = info.config.params.vectors, info.config.metadata
            params = vectors.get(VECTOR) if isinstance(vectors, dict) else None
            indexes = {key: str(index.data_type.value) for key, index in info.payload_schema.items()}
        match metadata:
            case {"unidiff": {"fingerprint": str() as stored}} if params is not None:
                pass
            case _:
                raise StoreError(
                    f'The collection "{self.collection}" was not made by UniDiff. Choose another name: '
                    "Catalog(url, collection=…)."
                )
        if stored != fingerprint or params.size != self.dim:
            raise StoreError(
                f'The collection "{self.collection}" was indexed with another bundle: fingerprint '
                f"{stored[:12]!r} and {params.size} dimensions, not {fingerprint[:12]!r} and {self.dim}. "
                "Open it with that bundle, or use a new collection: Catalog(url, collection=…)."
            )
        if params.distance != models.Distance.DOT or params.multivector_config is not None:
            raise StoreError(
                f'The collection "{self.collection}" compares its vectors by {params.distance.value}, or has several '
                "of them for each item. UniDiff needs one vector and the dot product. Use a new collection: "
                "Catalog(url, collection=…)."
            )
        return indexes

    # -------------------------------------------------------------------------------------------- reading

    def query(self, vector: Vector, *, limit: int, offset: int = 0, where: Clause | None = None) -> list[ScoredRecord]:
        return self.query_batch([VectorQuery(vector, limit, offset, where)])[0]

    def query_batch(self, searches: Sequence[VectorQuery]) -> list[list[ScoredRecord]]:
        return self._complete(lambda: in_total_order(searches, self._query_batch, self._retrieve))

    def _query_batch(self, searches: Sequence[VectorQuery], windows: Sequence[Window]) -> list[list[ScoredRecord]]:
        """The results in the order of the server, which is undefined between equal scores."""
        requests = [self._request(search, window) for search, window in zip(searches, windows, strict=True)]
        with self._engine():
            responses = self.client.query_batch_points(self.collection, requests, **self._reading)
            return [
                self._points.scored_records(response.points, search)
                for response, search in zip(responses, searches, strict=True)
            ]

    def _request(self, search: VectorQuery, window: Window) -> models.QueryRequest:
        check_query(search.vector, self.dim)
        conditions = self._filter(search.where, search.exclude)
        params = models.SearchParams(acorn=_ACORN, hnsw_ef=search.ef, exact=search.exact)
        query: Any = search.vector.tolist()
        prefetch = None
        if search.text is not None:
            self._indexes.ensure(CAPTION, "text", self)
            rankings = {VECTOR: query, CAPTION: models.TextQuery(text=search.text)}
            prefetch = [
                models.Prefetch(query=ranking, using=using, limit=CANDIDATES, filter=conditions, params=params)
                for using, ranking in rankings.items()
            ]
            weights = [2 * (1 - search.bm25_weight), 2 * search.bm25_weight]
            query = models.RrfQuery(rrf=models.Rrf(k=RRF_K + 1, weights=weights))  # + 1: ranks from 0
        return models.QueryRequest(
            query=query,
            prefetch=prefetch,
            using=None if prefetch else VECTOR,
            limit=window.size,
            offset=window.start,
            filter=conditions,
            params=params,
            score_threshold=search.min_score,
            with_payload=search.with_payload,
            with_vector=search.with_vectors,
        )

    def order_by(
        self, column: str, kind: str, *, descending: bool, limit: int, offset: int, where: Clause | None = None
    ) -> list[Record]:
        self._indexes.ensure(column, kind, self)
        direction = models.Direction.DESC if descending else models.Direction.ASC
        query = models.OrderByQuery(order_by=models.OrderBy(key=column, direction=direction))

        def fetch(window: Window) -> list[Ranked]:
            conditions = self._filter(where)
            with self._engine():
                response = self.client.query_points(
                    self.collection,
                    query=query,
                    limit=window.size,
                    offset=window.start,
                    query_filter=conditions,
                    with_payload=False,
                    **self._reading,
                )
                return [ranked_by_value(point, descending) for point in response.points]

        return self._complete(lambda: records_in_order(self._retrieve, read_page(fetch, offset, limit)))

    def facet(self, column: str, kind: str, *, limit: int, where: Clause | None = None) -> dict[str | bool, int]:
        self._indexes.ensure(column, kind, self)
        conditions = self._filter(where)
        with self._engine():
            response = self.client.facet(
                self.collection, column, facet_filter=conditions, limit=limit, exact=True, **self._reading
            )
        return {hit.value: hit.count for hit in response.hits if isinstance(hit.value, str | bool)}

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        records = self._retrieve(ids)
        self._points.warn_about_foreign()
        return records

    def _retrieve(self, ids: Sequence[str]) -> list[Record]:
        wanted = set(ids)
        with self._engine():
            points = self.client.retrieve(
                self.collection, list(ids), with_payload=True, with_vectors=True, **self._reading
            )
            return [record for record in self._points.records(points) if record.id in wanted]

    def scroll(self, batch_size: int = 256, where: Clause | None = None) -> Iterator[list[Record]]:
        offset, conditions = None, self._filter(where)
        while True:
            with self._engine():
                points, following = self.client.scroll(
                    self.collection,
                    scroll_filter=conditions,
                    limit=batch_size,
                    offset=offset,
                    with_payload=True,
                    with_vectors=True,
                    **self._reading,
                )
                check_progress([point.id for point in points], offset, following)
                records = self._points.records(points)
            self._points.warn_about_foreign()
            if records:
                yield records
            if following is None:
                return
            offset = following

    def count(self, where: Clause | None = None) -> int:
        conditions = self._filter(where)
        with self._engine():
            return max(0, self.client.count(self.collection, count_filter=conditions, exact=True).count)

    @property
    def foreign(self) -> tuple[Any, ...]:
        """Ids of points that are no items or have no vector, as far as they were met. All methods skip them."""
        return self._points.foreign

    def unindexed_count(self) -> int:
        """0: the server builds its index by itself."""
        return 0

    def deleted_share(self, tolerance: float = 0.0) -> float:
        """0: the server removes deleted vectors from its index by itself."""
        return 0.0

    # -------------------------------------------------------------------------------------------- writing

    def upsert(self, records: Sequence[Record]) -> None:
        check_records(records, self.dim)
        if not records:
            return  # the server refuses an empty request
        points = [models.PointStruct(id=r.id, vector={VECTOR: r.vector.tolist()}, payload=r.payload) for r in records]
        with self._changing(), self._engine():
            self._upsert(points)

    def _upsert(self, points: list[models.PointStruct]) -> None:
        """Store points, in halves if the server allows no request of this size. What is stored stays stored."""
        try:
            check_confirmed(self.client.upsert(self.collection, points, wait=True, **self._writing))
        except Exception as error:
            if len(points) == 1 or not exceeds_limit(error):
                raise
            half = len(points) // 2
            self._upsert(points[:half])
            self._upsert(points[half:])

    def delete(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        with self._changing(), self._engine():
            selector = models.PointIdsList(points=list(ids))
            check_confirmed(self.client.delete(self.collection, selector, wait=True, **self._writing))

    def index(self, column: str, kind: str) -> None:
        self._indexes.ensure(column, kind, self)

    def create_index(self, column: str, kind: str) -> None:
        schema = _TEXT_INDEX if kind == "text" else models.PayloadSchemaType(kind)
        with self._indexing(column), self._engine():
            check_confirmed(self.client.create_payload_index(self.collection, column, schema, wait=True))

    def has_column(self, column: str) -> bool:
        return bool(next(self.scroll(1, Compare(column, "exists", True)), []))

    def drop_index(self, column: str) -> None:
        with self._indexing(column), self._engine():
            check_confirmed(self.client.delete_payload_index(self.collection, column, wait=True))

    def publish(self) -> None:
        """Let the alias of the options lead to this collection, if it does not yet.

        Raises:
            StoreError: it leads to the collection of another catalog, or is the name of a collection.
        """
        if self._alias is None:
            return
        with self._engine():
            leads_to = {alias.alias_name: alias.collection_name for alias in self.client.get_aliases().aliases}
            current = leads_to.get(self._alias)
            if current == self.collection:
                return
            if current is not None and _base(current) != _base(self.collection):
                raise StoreError(
                    f'The alias "{self._alias}" leads to the collection "{current}", which is not of this catalog. '
                    "Choose another name: ServerOptions(alias=…)."
                )
            delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self._alias))
            create = models.CreateAliasOperation(
                create_alias=models.CreateAlias(collection_name=self.collection, alias_name=self._alias)
            )
            self.client.update_collection_aliases([create] if current is None else [delete, create])

    def optimize(self) -> None:
        """Do nothing: the server builds its index in the background."""

    def interrupt(self) -> None:
        """End the pauses between attempts of running calls, which then raise StoreError. Call it before `close`."""
        if self._owner.is_current:
            interrupt(self.client)

    def close(self) -> None:
        if not self._owner.is_current:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self.client.close()

    # -------------------------------------------------------------------------------------------- the server

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """A write. One that failed may have been stored, in part or later."""
        try:
            yield
        finally:
            self.revision += 1

    @contextlib.contextmanager
    def _indexing(self, column: str) -> Iterator[None]:
        """Say what to do if the API key may not change the index of a column."""
        try:
            yield
        except ForbiddenError as error:
            raise ForbiddenError(
                f'The API key may not index the column "{column}" of the collection "{self.collection}". Index it once '
                "with a key that may write: Catalog.create_indexes()."
            ) from error

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        """Convert every failure of the client or the server to a StoreError."""
        self._owner.check()
        if self._closed:
            raise StoreError(f'The connection to the collection "{self.collection}" is closed. Open the catalog again.')
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            failed = failure(self.client, self.collection, error)
            raise failed from failed.__cause__

    def _complete(self, read: Callable[[], R]) -> R:
        """The result of a read without points of others. It is read again if it met new ones: their places are free."""
        while True:
            known = len(self._points.foreign)
            result = read()
            if len(self._points.foreign) == known:
                return result
            self._points.warn_about_foreign()

    def _filter(self, where: Clause | None, exclude: Sequence[str] = ()) -> models.Filter | None:
        excluded = [*exclude, *self._points.foreign]
        if where is None and not excluded:
            return None
        must: list[Any] = []
        if where is not None:
            self._indexes.ensure_for_filter(index_kinds(where), self)
            must.append(translate(where, models.Filter, condition))
        return models.Filter(must=must, must_not=[models.HasIdCondition(has_id=excluded)] if excluded else None)
