"""Search: encode and mix the query, ask the store, arrange the results in pages."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL.Image import Image

from unidiff_sdk._internal.json_values import plain_number
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Record, ScoredRecord, Store, Vector, VectorQuery
from unidiff_sdk.store.filters import AllOf, AnyOf, Clause, Compare, Not, column_path, parse
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.payload import system_of
from unidiff_sdk.store.protocol import CANDIDATES

from .columns import column_kinds, facet_counts, ordered, value_at
from .cursors import Cursor
from .duplicates import near_duplicates
from .filter_kinds import warn_about_filter
from .mixing import NEUTRAL_TEXTS, ModalityGap, add_imagined, consensus, mean_direction, mix
from .options import MAX_LIMIT, SearchOptions, check_page
from .query import Query, open_image
from .reranking.diversity import diversify, group_of
from .reranking.reranker import Reranked, Reranker
from .results import Hit, Page

__all__ = ["Searcher"]

_SAMPLE = 512  # items; the standard deviation of their scores is accurate to 3 %
_CAPTIONS = 32  # of these items, whose mean estimates what all captions share
_CURSOR_OVERLAP = 16  # items read again before the position of a cursor


@dataclass
class _Sample:
    """Embeddings and captions of a catalog of `count` items; `gap` once a query with a text has needed it."""

    count: int
    vectors: Vector
    captions: list[str]
    gap: ModalityGap | None = None


class Searcher:
    """Searches and lists the items of one store, with one encoder. Safe to use from several threads.

    Args:
        store: the items.
        encoder: returns the encoder; called only if a text or an image must be encoded.
        make_hit: (payload, score) to a hit.
        generate: (texts, n) to n images of each text, in the order of the texts.
        reranker: returns the reranker; called only for searches with `rerank`.
    """

    def __init__(
        self,
        store: Store,
        encoder: Callable[[], Encoder],
        make_hit: Callable[[dict[str, Any], float], Hit],
        generate: Callable[[Sequence[str], int], list[Image]],
        reranker: Callable[[], Reranker],
    ) -> None:
        self.store, self._reranker = store, reranker
        self._encoder, self._make_hit, self._generate = encoder, make_hit, generate
        self._sample: _Sample | None = None
        self._lock = threading.Lock()

    def search(self, queries: Sequence[Query], options: SearchOptions) -> list[Page]:
        """One page for each query, all with the same options.

        Raises:
            OptionError: a named item or the column to group by does not exist, a vector has the wrong size, the cursor
            is invalid, or a query without text is to be ranked by words.
        """
        started = time.perf_counter()
        if options.hybrid and any(query.text is None for query in queries):
            raise OptionError("hybrid= ranks by the words of a text, and a query has none. Give a text, or omit it.")

        # 1. Whether the queries can be re-ranked, and where the previous page ended.
        if options.rerank:
            _check_rerank(queries)
            self._reranker()  # raises for a bundle that cannot
        cursors = [
            Cursor.read(options.cursor, _digest(query, options), self.store.dim) if options.cursor else None
            for query in queries
        ]

        # 2. Encode and mix.
        vectors = self._query_vectors(queries, cursors)

        # 3. Ask the store, for one more hit than the limit: it shows whether there is another page.
        searches = [_nearest(query, vector, options) for query, vector in zip(queries, vectors, strict=True)]
        if options.rerank:
            results = self._reranked(queries, searches, options, cursors)
        else:
            results = self._ranked(searches, options, cursors)

        if options.group_by is not None:
            self._require_column(options.group_by, results)

        # 4. Pages.
        took_ms = 1000 * (time.perf_counter() - started)
        warn_about_filter(self.store, options.clause)
        return [
            self._page(query, search, options, cursor, found, took_ms)
            for query, search, cursor, found in zip(queries, searches, cursors, results, strict=True)
        ]

    def browse(self, where: Mapping[str, Any] | None, order_by: str | None, limit: int, offset: int) -> Page:
        """A page of the items that match a filter, in the order of a column. Raises OptionError, FilterError."""
        started = time.perf_counter()
        limit, offset = plain_number(limit), plain_number(offset)
        check_page(limit, offset)
        clause = parse(where)
        records: Iterable[Record]
        if order_by is None:
            records = islice(chain.from_iterable(self.store.scroll(where=clause)), offset, offset + limit)
        else:
            records = ordered(self.store, order_by, clause, limit, offset)
        hits = tuple(self._make_hit(record.payload, 1.0) for record in records)
        warn_about_filter(self.store, clause)
        return Page(hits, offset, limit, 1000 * (time.perf_counter() - started))

    def facets(self, column: str, where: Mapping[str, Any] | None, limit: int) -> dict[str | bool | int | float, int]:
        """Count the items with each value of a column. Raises OptionError, FilterError."""
        limit = plain_number(limit)
        check_page(limit, 0)
        clause = parse(where)
        warn_about_filter(self.store, clause)
        return facet_counts(self.store, column, clause, limit)

    def duplicates(self, threshold: float, where: Mapping[str, Any] | None) -> list[tuple[Hit, ...]]:
        """Groups of near-duplicates, largest first. Raises OptionError, FilterError."""
        clause = parse(where)
        warn_about_filter(self.store, clause)
        groups = near_duplicates(self.store, threshold, clause)
        return [tuple(self._make_hit(found.payload, found.score) for found in group) for group in groups]

    def get(self, id: str | int) -> Hit | None:
        """The item with an id, or None. Raises OptionError."""
        records = self.store.retrieve([key_of(id)])
        return self._make_hit(records[0].payload, 1.0) if records else None

    def count(self, where: Mapping[str, Any] | None) -> int:
        """The number of items that match a filter. Raises FilterError."""
        clause = parse(where)
        warn_about_filter(self.store, clause)
        return self.store.count(clause)

    # -------------------------------------------------------------------------------------------- the query vector

    def _query_vectors(self, queries: Sequence[Query], cursors: Sequence[Cursor | None]) -> list[Vector]:
        """A vector for each query. All texts are encoded in one batch, and all images."""
        known = [None if cursor is None else cursor.vector for cursor in cursors]
        pending = [query for query, vector in zip(queries, known, strict=True) if vector is None]
        by_text = self._encode_texts(pending)
        by_imagined = self._encode_imagined(pending, by_text)
        by_image = self._encode_images(pending)
        by_item = self._item_vectors(pending)

        def parts_of(query: Query) -> dict[str, Vector]:
            parts: dict[str, Vector] = {}
            if query.text is not None:
                parts["text"] = by_text[query.text]
                if query.imagine:
                    parts["imagined"] = by_imagined[query.text, query.imagine]
            if query.image is not None:
                parts["image"] = by_image[query.image.sha256]
            if query.like:
                parts["like"] = mean_direction(by_item[key_of(id)] for id in query.like)
            if query.vector is not None:
                parts["vector"] = self._checked(query.vector)
            if query.unlike:
                parts["unlike"] = mean_direction(by_item[key_of(id)] for id in query.unlike)
            if query.without:
                parts["without"] = mean_direction(by_text[text] for text in query.without)
            return parts

        return [
            self._mixed(parts_of(query), query.weights) if vector is None else vector
            for query, vector in zip(queries, known, strict=True)
        ]

    def _mixed(self, parts: Mapping[str, Vector], weights: Mapping[str, float]) -> Vector:
        given = {part: vector for part, vector in parts.items() if part != "imagined"}
        if len(given) > 1:
            vector = mix(given, weights, self._gap("text" in given or "without" in given))
        else:
            ((part, vector),) = given.items()
            vector = -vector if part in ("unlike", "without") else vector
        if "imagined" not in parts or not weights["imagined"]:
            return vector
        return add_imagined(vector, parts["imagined"], given, weights, self._gap(False))

    def _encode_texts(self, queries: Sequence[Query]) -> dict[str, Vector]:
        """The embeddings of all texts of the queries. A single text is cached by the encoder."""
        texts = list(dict.fromkeys(text for q in queries for text in ((q.text,) if q.text else ()) + q.without))
        if not texts:
            return {}
        encoder = self._encoder()
        if long := encoder.too_long(texts):
            warn(
                f"{len(long)} of {len(texts)} texts are longer than the {encoder.bundle.max_tokens} tokens of the "
                "encoder, so their ends are ignored. Shorten them."
            )
        vectors = encoder.encode_texts(texts) if len(texts) > 1 else [encoder.encode_text(texts[0])]
        return dict(zip(texts, vectors, strict=True))

    def _encode_imagined(
        self, queries: Sequence[Query], by_text: Mapping[str, Vector]
    ) -> dict[tuple[str, int], Vector]:
        """The consensus of the images generated from each text, by the text and the number of images."""
        vectors: dict[tuple[str, int], Vector] = {}
        for n in sorted({query.imagine for query in queries if query.imagine}):
            texts = list(dict.fromkeys(query.text for query in queries if query.imagine == n and query.text))
            encoder = self._encoder()
            embeddings = encoder.encode_images(self._generate(texts, n)).reshape(len(texts), n, -1)
            scale = encoder.bundle.logit_scale
            for text, images in zip(texts, embeddings, strict=True):
                vectors[text, n] = consensus(images, by_text[text], scale)
        return vectors

    def _encode_images(self, queries: Sequence[Query]) -> dict[str, Vector]:
        """The embeddings of the images of the queries, by hash. Those of stored items are read from the store."""
        images = {query.image.sha256: query.image for query in queries if query.image is not None}
        vectors: dict[str, Vector] = {}
        if hits := [image for image in images.values() if isinstance(image, Hit)]:
            for record in self.store.retrieve([key_of(hit.id) for hit in hits]):
                vectors.setdefault(system_of(record.payload)["sha256"], record.vector)
        if missing := [sha256 for sha256 in images if sha256 not in vectors]:
            opened = [open_image(image) if isinstance(image := images[key], Hit) else image for key in missing]
            encoded = self._encoder().encode_images([image.decoded for image in opened])
            vectors.update(zip(missing, encoded, strict=True))
        return vectors

    def _item_vectors(self, queries: Sequence[Query]) -> dict[str, Vector]:
        """The embeddings of the items that the queries name, by key."""
        ids = {key_of(id): id for query in queries for id in (*query.like, *query.unlike)}
        if not ids:
            return {}
        vectors = {record.id: record.vector for record in self.store.retrieve(list(ids))}
        if missing := [repr(id) for key, id in ids.items() if key not in vectors]:
            raise OptionError(f"like= or unlike=: this catalog has no item {', '.join(missing[:5])}")
        return vectors

    def _checked(self, vector: Vector) -> Vector:
        if len(vector) != self.store.dim:
            raise OptionError(
                f"vector= has {len(vector)} dimensions: give {self.store.dim}, the size of this catalog's embeddings"
            )
        return vector

    def _gap(self, with_text: bool) -> ModalityGap:
        """The sample that a mix is scaled by; taken again when the catalog has doubled or halved in size."""
        count = self.store.count()
        with self._lock:
            if self._sample is None or not self._sample.count / 2 < count < 2 * self._sample.count:
                records = next(self.store.scroll(_SAMPLE), [])  # in the order of hashed ids, so a random sample
                vectors = np.array([record.vector for record in records], np.float32).reshape(-1, self.store.dim)
                captions = (record.payload.get("text") for record in records)
                self._sample = _Sample(count, vectors, list(islice(filter(None, captions), _CAPTIONS)))
            sample = self._sample
            if with_text and sample.gap is None:
                texts = self._encoder().encode_texts([*NEUTRAL_TEXTS, *sample.captions])
                neutral, captioned = texts[: len(NEUTRAL_TEXTS)], texts[len(NEUTRAL_TEXTS) :]
                caption_mean = captioned.sum(axis=0) / max(len(captioned), 1)
                sample.gap = ModalityGap(sample.vectors, caption_mean, neutral.mean(axis=0))
            zero = np.zeros(self.store.dim, np.float32)
            return sample.gap or ModalityGap(sample.vectors, zero, zero)

    # -------------------------------------------------------------------------------------------- the ranking

    def _ranked(
        self, searches: Sequence[VectorQuery], options: SearchOptions, cursors: Sequence[Cursor | None]
    ) -> list[list[ScoredRecord]]:
        pairs = list(zip(searches, cursors, strict=True))
        if options.diversity is not None:
            return [self._diversified(search, options, cursor) for search, cursor in pairs]
        if options.group_by is not None:
            return [self._grouped(search, options, cursor) for search, cursor in pairs]
        if options.cursor is not None:
            return [self._continued(search, cursor) for search, cursor in pairs]
        if options.hybrid:
            return [self._query(search) for search in searches]
        return self.store.query_batch(searches)

    def _reranked(
        self,
        queries: Sequence[Query],
        searches: Sequence[VectorQuery],
        options: SearchOptions,
        cursors: Sequence[Cursor | None],
    ) -> list[list[ScoredRecord]]:
        """Results whose best items are re-ranked. All queries start at the same item, because a batch has no cursor."""
        reranker = self._reranker()
        count = reranker.settings.candidates if options.rerank is True else options.rerank
        start, limit = cursors[0].shown if cursors and cursors[0] else options.offset, options.limit + 1

        def from_item(offset: int, limit: int) -> list[list[ScoredRecord]]:
            moved = [replace(search, offset=offset, limit=limit) for search in searches]
            return self._ranked(moved, replace(options, offset=0, cursor=None), [None] * len(searches))

        if start >= count:
            return from_item(start, limit)
        found = from_item(0, max(count, start + limit))
        texts = [query.text or "" for query in queries]
        reranked = reranker.rerank([(text, items[:count]) for text, items in zip(texts, found, strict=True)])
        return [[*best, *items[count:]][start : start + limit] for best, items in zip(reranked, found, strict=True)]

    def _continued(self, search: VectorQuery, cursor: Cursor | None) -> list[ScoredRecord]:
        """The results after a cursor, whatever was added or deleted in between."""
        assert cursor is not None
        if cursor.score is None:
            return self._query(replace(search, offset=cursor.shown))
        # Start shortly before the end of the page; earlier if that is already past it.
        start, size = max(0, cursor.shown - _CURSOR_OVERLAP), search.limit + 2 * _CURSOR_OVERLAP
        while True:
            found = self._query(replace(search, offset=start, limit=size))
            if start and not (found and cursor.passed(found[0].score)):
                start //= 2
                continue
            rest = [scored for scored in found if not cursor.covers(scored)]
            if len(rest) >= search.limit or len(found) < size:
                return rest[: search.limit]
            size *= 2

    def _grouped(self, search: VectorQuery, options: SearchOptions, cursor: Cursor | None) -> list[ScoredRecord]:
        """The best item of each group, best first."""
        assert options.group_by is not None
        path = column_path(options.group_by)
        start = cursor.shown if cursor and cursor.score is None else search.offset
        wanted = search.offset + (cursor.shown if cursor else 0) + search.limit
        best: dict[str, ScoredRecord] = {}
        size = CANDIDATES if search.text is not None else min(4 * wanted, MAX_LIMIT)
        where = search.where
        while True:
            found = self._query(replace(search, where=where, offset=0, limit=size))
            before = len(best)
            for scored in found:
                best.setdefault(group_of(scored.payload, options.group_by) or scored.id, scored)
            may_have_more = len(found) == size and search.text is None
            groups = [scored for scored in best.values() if not (cursor and cursor.covers(scored))]
            if len(groups) >= start + search.limit or not may_have_more:
                break
            # Exclude the groups found so far, or search deeper if no filter can name them.
            where = _excluding(
                search.where, path, [value_at(scored.payload, options.group_by) for scored in best.values()]
            )
            if len(best) == before:
                if size == MAX_LIMIT:
                    break
                size = min(2 * size, MAX_LIMIT)
        return sorted(groups, key=lambda scored: (-scored.score, scored.id))[start : start + search.limit]

    def _require_column(self, group_by: str, results: Iterable[Sequence[ScoredRecord]]) -> None:
        """Raise OptionError if no item has the column to group by, so that it would have no effect."""
        found = list(chain.from_iterable(results))
        if not found or any(value_at(scored.payload, group_by) is not None for scored in found):
            return
        if not self.store.count(Compare(column_path(group_by), "exists", True)):
            known = ", ".join(column_kinds(self.store))
            raise OptionError(f"group_by={group_by!r:.60}: no item has this column. Columns: {known}")

    def _diversified(self, search: VectorQuery, options: SearchOptions, cursor: Cursor | None) -> list[ScoredRecord]:
        """Candidates selected for variety. Their number depends on `limit` alone, so that pages are consistent."""
        assert options.diversity is not None
        pool = min(max(100, 5 * options.limit), CANDIDATES if search.text is not None else MAX_LIMIT)
        found = self._query(replace(search, offset=0, limit=pool, with_vectors=True))
        if not found:
            return []
        start = cursor.shown if cursor else search.offset
        scores = np.array([scored.score for scored in found], np.float32)
        vectors = np.array([scored.vector for scored in found])
        return [found[k] for k in diversify(scores, vectors, options.diversity, start + search.limit)[start:]]

    def _query(self, search: VectorQuery) -> list[ScoredRecord]:
        if search.text is None:
            return self.store.query_batch([search])[0]
        # Fused scores are often equal, and engines return equal scores in any order; pages need a stable one.
        everything = replace(search, limit=2 * CANDIDATES, offset=0, with_payload=False, with_vectors=False)
        ranked = sorted(self.store.query_batch([everything])[0], key=lambda scored: (-scored.score, scored.id))
        shown = ranked[search.offset : search.offset + search.limit]
        records = {record.id: record for record in self.store.retrieve([scored.id for scored in shown])}
        return [
            replace(scored, payload=records[scored.id].payload, vector=records[scored.id].vector)
            for scored in shown
            if scored.id in records
        ]

    # -------------------------------------------------------------------------------------------- the page

    def _page(
        self,
        query: Query,
        search: VectorQuery,
        options: SearchOptions,
        before: Cursor | None,
        found: list[ScoredRecord],
        took_ms: float,
    ) -> Page:
        shown = found[: options.limit]
        offset = before.shown if before else options.offset
        vector = search.vector if len(query.parts) > 1 else None  # a mix depends on the content of the catalog
        end = partial(_cursor_after, query, options, before, shown, offset + len(shown), vector)
        hits = tuple([self._make_hit(scored.payload, scored.score) for scored in shown])
        if options.rerank:
            hits = tuple(map(_with_gain, hits, shown))
        return Page(hits, offset, options.limit, took_ms, end if len(found) > len(shown) else None)


def _with_gain(hit: Hit, scored: ScoredRecord) -> Hit:
    """A hit with what re-ranking has found, if the item was among those re-ranked."""
    if isinstance(scored, Reranked):
        return replace(hit, rerank_score=scored.rerank_score, gain=scored.gain)
    return hit


def _check_rerank(queries: Sequence[Query]) -> None:
    for query in queries:
        if query.text is None or not query.weights["text"]:
            parts = ", ".join(part for part in query.parts if query.weights[part])
            raise OptionError(
                f"rerank= compares images with a text, but this query searches by {parts}: give a text with a weight "
                "above 0, or search without rerank="
            )


def _nearest(query: Query, vector: Vector, options: SearchOptions) -> VectorQuery:
    if options.hybrid and query.text is None:
        raise OptionError(f"hybrid={options.hybrid:g} ranks by captions as well: give a text")
    return VectorQuery(
        vector,
        limit=options.limit + 1,
        offset=options.offset,
        where=options.clause,
        exclude=query.examples,
        min_score=options.min_score,
        text=query.text if options.hybrid else None,
        bm25_weight=options.hybrid,
        ef=options.ef,
        exact=options.exact,
    )


def _cursor_after(
    query: Query,
    options: SearchOptions,
    before: Cursor | None,
    shown: Sequence[ScoredRecord],
    total: int,
    vector: Vector | None,
) -> str:
    """The cursor of the page that ends with `shown`, after `total` items."""
    digest = _digest(query, options)
    if options.hybrid or options.rerank or options.diversity is not None:
        return str(Cursor(digest, total, vector=vector))
    return str(Cursor.after(before, digest, total, shown, vector))


def _digest(query: Query, options: SearchOptions) -> bytes:
    """8 bytes that identify a query and everything else that determines the order of its hits."""
    order: tuple[Any, ...] = (
        options.clause,
        options.min_score,
        options.diversity,
        options.group_by,
        options.hybrid,
    )
    if options.rerank:
        order += (options.rerank,)
    if options.ef is not None or options.exact:
        order += (options.ef, options.exact)
    return hashlib.sha256(query.digest() + repr(order).encode()).digest()[:8]


def _excluding(where: Clause | None, path: str, values: Sequence[Any]) -> Clause | None:
    """A filter that also excludes some values of a column. Lists and objects, which no filter can name, are ignored."""
    strings = tuple(value for value in values if isinstance(value, str))
    tests: list[Clause] = [Compare(path, "eq", value) for value in values if isinstance(value, (bool, int, float))]
    if strings:
        tests.append(Compare(path, "in", strings))
    if not tests:
        return where
    none_of_them = Not(AnyOf(tuple(tests)))
    return none_of_them if where is None else AllOf((where, none_of_them))
