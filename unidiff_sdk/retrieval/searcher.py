"""A search from the checked query to the page: encode, mix, ask the store, arrange what it found."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL.Image import Image

from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import ScoredRecord, Store, Vector, VectorQuery
from unidiff_sdk.store.filters import AllOf, AnyOf, Clause, Compare, Not, column_path
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.protocol import CANDIDATES

from .cursors import Cursor
from .imagination import agreed
from .options import MAX_LIMIT, SearchOptions
from .query import NEUTRAL_TEXTS, Gap, Query, beside, mix, picture_of, unit
from .ranking import diversify, group_of, value_at
from .results import Hit, Page

__all__ = ["Searcher"]

SAMPLE = 512  # items by which a mix is balanced: a spread estimated from so many is right to 3 %
CAPTIONS = 32  # of those, whose captions tell what captions have in common


@dataclass
class _Sample:
    """Of a catalog of `count` items some vectors and captions; and the gap, once a text has asked for it."""

    count: int
    vectors: Vector
    captions: list[str]
    gap: Gap | None = None


class Searcher:
    """Searches one store by one encoder. Safe to use from several threads.

    Args:
        store: what is searched.
        encoder: called when a text or a picture must be encoded; a query by ids or a vector opens no model.
        hit: makes a Hit of a payload and a score.
        draw: (texts, n) to n pictures of each, those of the first text first.
    """

    def __init__(
        self,
        store: Store,
        encoder: Callable[[], Encoder],
        hit: Callable[[dict[str, Any], float], Hit],
        draw: Callable[[Sequence[str], int], list[Image]],
    ) -> None:
        self.store, self._encoder, self._hit, self._draw = store, encoder, hit, draw
        self._sample: _Sample | None = None
        self._lock = threading.Lock()

    def search(self, queries: Sequence[Query], options: SearchOptions) -> list[Page]:
        """One page for each query, all with the same options."""
        started = time.perf_counter()

        # 1. Where the page before ended, if there was one.
        cursors = [
            Cursor.read(options.cursor, _digest(query, options), self.store.dim) if options.cursor else None
            for query in queries
        ]

        # 2. Encode and mix.
        vectors = self._vectors(queries, cursors)

        # 3. Ask the store; one more than wanted tells whether there is another page.
        searches = [self._nearest(query, vector, options) for query, vector in zip(queries, vectors, strict=True)]
        if options.diversity is not None:
            answers = [self._diverse(search, options, cursor) for search, cursor in zip(searches, cursors, strict=True)]
        elif options.group_by is not None:
            answers = [self._grouped(search, options, cursor) for search, cursor in zip(searches, cursors, strict=True)]
        elif options.cursor is not None:
            answers = [self._continued(search, cursor) for search, cursor in zip(searches, cursors, strict=True)]
        elif options.hybrid:
            answers = [self._ask(search) for search in searches]
        else:
            answers = self.store.query_batch(searches)

        # 4. Pages.
        took_ms = 1000 * (time.perf_counter() - started)
        return [
            self._page(query, search, options, cursor, found, took_ms)
            for query, search, cursor, found in zip(queries, searches, cursors, answers, strict=True)
        ]

    # -------------------------------------------------------------------------------------------- the query vector

    def _vectors(self, queries: Sequence[Query], cursors: Sequence[Cursor | None]) -> list[Vector]:
        """A vector for each query: all texts are encoded in one go (a lone one is remembered), all pictures too."""
        todo = [
            query for query, cursor in zip(queries, cursors, strict=True) if cursor is None or cursor.vector is None
        ]
        texts = list(dict.fromkeys(text for q in todo for text in ((q.text,) if q.text else ()) + q.without))
        of_text = {}
        if texts:
            encoder = self._encoder()
            rows = encoder.encode_texts(texts) if len(texts) > 1 else [encoder.encode_text(texts[0])]
            of_text = dict(zip(texts, rows, strict=True))
        of_imagined = self._imagined(todo, of_text)
        of_picture = self._pictures(todo)
        of_item = self._items(todo)

        vectors = []
        for query, cursor in zip(queries, cursors, strict=True):
            if cursor and cursor.vector is not None:
                vectors.append(cursor.vector)
                continue
            parts: dict[str, Vector] = {}
            if query.text is not None:
                parts["text"] = of_text[query.text]
                if query.imagine:
                    parts["imagined"] = of_imagined[query.text, query.imagine]
            if query.picture is not None:
                parts["image"] = of_picture[query.picture.sha256]
            if query.like:
                parts["like"] = unit(of_item[key_of(id)] for id in query.like)
            if query.vector is not None:
                parts["vector"] = self._checked(query.vector)
            if query.unlike:
                parts["unlike"] = unit(of_item[key_of(id)] for id in query.unlike)
            if query.without:
                parts["without"] = unit(of_text[text] for text in query.without)
            vectors.append(self._mixed(parts, query.weights))
        return vectors

    def _mixed(self, parts: dict[str, Vector], weights: Mapping[str, float]) -> Vector:
        asked = {part: vector for part, vector in parts.items() if part != "imagined"}
        if len(asked) > 1:
            vector = mix(asked, weights, self._gap("text" in asked or "without" in asked))
        else:
            ((part, vector),) = asked.items()
            vector = -vector if part in ("unlike", "without") else vector
        return beside(vector, parts["imagined"], weights, asked, self._gap(False)) if "imagined" in parts else vector

    def _imagined(self, queries: Sequence[Query], of_text: Mapping[str, Vector]) -> dict[tuple[str, int], Vector]:
        """What the pictures that are drawn of a text look like together, by the text and their number."""
        vectors: dict[tuple[str, int], Vector] = {}
        for n in sorted({query.imagine for query in queries if query.imagine}):
            texts = list(dict.fromkeys(query.text for query in queries if query.imagine == n and query.text))
            drawn = self._encoder().encode_images(self._draw(texts, n)).reshape(len(texts), n, -1)
            scale = self._encoder().bundle.logit_scale
            vectors.update(
                {(t, n): agreed(pictures, of_text[t], scale) for t, pictures in zip(texts, drawn, strict=True)}
            )
        return vectors

    def _pictures(self, queries: Sequence[Query]) -> dict[str, Vector]:
        """The vectors of the queries' pictures, by content hash; those of stored items are not encoded again."""
        wanted = {query.picture.sha256: query.picture for query in queries if query.picture is not None}
        vectors: dict[str, Vector] = {}
        if hits := [picture for picture in wanted.values() if isinstance(picture, Hit)]:
            for record in self.store.retrieve([key_of(hit.id) for hit in hits]):
                vectors.setdefault(record.payload[SYSTEM]["sha256"], record.vector)
        if missing := [sha256 for sha256 in wanted if sha256 not in vectors]:
            pictures = [wanted[sha256] for sha256 in missing]
            images = [picture_of(one).decoded if isinstance(one, Hit) else one.decoded for one in pictures]
            vectors.update(zip(missing, self._encoder().encode_images(images), strict=True))
        return vectors

    def _items(self, queries: Sequence[Query]) -> dict[str, Vector]:
        """The vectors of the items that queries name, by key."""
        ids = {key_of(id): id for query in queries for id in (*query.like, *query.unlike)}
        if not ids:
            return {}
        vectors = {record.id: record.vector for record in self.store.retrieve(list(ids))}
        if missing := [repr(id) for key, id in ids.items() if key not in vectors]:
            raise OptionError(f"like= or unlike=: there is no item {', '.join(missing[:5])} in this catalog")
        return vectors

    def _checked(self, vector: Vector) -> Vector:
        if len(vector) != self.store.dim:
            raise OptionError(f"vector= has {len(vector)} numbers; this catalog's have {self.store.dim}")
        return vector

    def _gap(self, with_text: bool) -> Gap:
        """What a mix is balanced by; taken anew when the catalog has doubled or halved."""
        count = self.store.count()
        with self._lock:
            if self._sample is None or not self._sample.count / 2 < count < 2 * self._sample.count:
                records = next(self.store.scroll(SAMPLE), [])  # ids are hashes, so the first are any
                vectors = np.array([record.vector for record in records], np.float32).reshape(-1, self.store.dim)
                captions = (record.payload.get("text") for record in records)
                self._sample = _Sample(count, vectors, list(islice(filter(None, captions), CAPTIONS)))
            sample = self._sample
            if with_text and sample.gap is None:
                texts = self._encoder().encode_texts([*NEUTRAL_TEXTS, *sample.captions])
                neutral, told = texts[: len(NEUTRAL_TEXTS)], texts[len(NEUTRAL_TEXTS) :]
                sample.gap = Gap(sample.vectors, told.sum(axis=0) / max(len(told), 1), neutral.mean(axis=0))
            zero = np.zeros(self.store.dim, np.float32)
            return sample.gap or Gap(sample.vectors, zero, zero)

    # -------------------------------------------------------------------------------------------- the ranking

    def _nearest(self, query: Query, vector: Vector, options: SearchOptions) -> VectorQuery:
        if options.hybrid and query.text is None:
            raise OptionError("hybrid= ranks by words too: give a text")
        return VectorQuery(
            vector,
            limit=options.limit + 1,
            offset=options.offset,
            where=options.clause,
            exclude=query.examples,
            min_score=options.min_score,
            text=query.text if options.hybrid else None,
            bm25_weight=options.hybrid,
        )

    def _continued(self, search: VectorQuery, cursor: Cursor | None) -> list[ScoredRecord]:
        """What comes after a cursor, whatever was added or deleted since."""
        assert cursor is not None
        if cursor.score is None:
            return self._ask(replace(search, offset=cursor.shown))
        # Start a little before the place where the page ended; earlier if that is already behind it.
        start, size = max(0, cursor.shown - 16), search.limit + 32
        while True:
            found = self._ask(replace(search, offset=start, limit=size))
            if start and not (found and cursor.passed(found[0].score)):
                start //= 2
                continue
            rest = [one for one in found if not cursor.covers(one)]
            if len(rest) >= search.limit or len(found) < size:
                return rest[: search.limit]
            size *= 2

    def _grouped(self, search: VectorQuery, options: SearchOptions, cursor: Cursor | None) -> list[ScoredRecord]:
        """The best item of each group, best first."""
        assert options.group_by is not None
        path = column_path(options.group_by)
        start = cursor.shown if cursor and cursor.score is None else options.offset
        wanted = options.offset + (cursor.shown if cursor else 0) + search.limit
        best: dict[str, ScoredRecord] = {}
        size = CANDIDATES if search.text is not None else min(4 * wanted, MAX_LIMIT)
        where = search.where
        while True:
            found = self._ask(replace(search, where=where, offset=0, limit=size))
            before = len(best)
            for one in found:
                best.setdefault(group_of(one.payload, options.group_by) or one.id, one)
            full = len(found) == size and search.text is None
            groups = [one for one in best.values() if not (cursor and cursor.covers(one))]
            if len(groups) >= start + search.limit or not full:
                break
            # More of the same groups are of no use: leave those out that a filter can name, or else look deeper.
            where = _without(search.where, path, [value_at(one.payload, options.group_by) for one in best.values()])
            if len(best) == before:
                if size == MAX_LIMIT:
                    break
                size = min(2 * size, MAX_LIMIT)
        return sorted(groups, key=lambda one: -one.score)[start : start + search.limit]

    def _diverse(self, search: VectorQuery, options: SearchOptions, cursor: Cursor | None) -> list[ScoredRecord]:
        """The best candidates, picked for variety. Their number hangs on `limit` alone, so that pages fit together."""
        assert options.diversity is not None
        pool = min(max(100, 5 * options.limit), CANDIDATES if search.text is not None else MAX_LIMIT)
        found = self._ask(replace(search, offset=0, limit=pool, with_vectors=True))
        if not found:
            return []
        start = cursor.shown if cursor else options.offset
        scores = np.array([one.score for one in found], np.float32)
        vectors = np.array([one.vector for one in found])
        return [found[k] for k in diversify(scores, vectors, options.diversity, start + search.limit)[start:]]

    def _ask(self, search: VectorQuery) -> list[ScoredRecord]:
        if search.text is None:
            return self.store.query_batch([search])[0]
        # Fused scores are often equal, and engines return equals in any order: pages need one that stays.
        everything = replace(search, limit=2 * CANDIDATES, offset=0, with_payload=False, with_vectors=False)
        ranked = sorted(self.store.query_batch([everything])[0], key=lambda one: (-one.score, one.id))
        shown = ranked[search.offset : search.offset + search.limit]
        records = {record.id: record for record in self.store.retrieve([one.id for one in shown])}
        return [
            replace(one, payload=records[one.id].payload, vector=records[one.id].vector)
            for one in shown
            if one.id in records
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
        cursor = None
        if len(found) > len(shown):
            digest, total = _digest(query, options), offset + len(shown)
            vector = search.vector if len(query.parts) > 1 else None
            if options.hybrid or options.diversity is not None:
                cursor = Cursor(digest, total, vector=vector)
            else:
                cursor = Cursor.after(before, digest, total, shown, vector)
        hits = tuple(self._hit(one.payload, one.score) for one in shown)
        return Page(hits, offset, options.limit, took_ms, str(cursor) if cursor else None)


def _digest(query: Query, options: SearchOptions) -> bytes:
    """8 bytes that identify a query and everything else that determines the order of its hits."""
    order = (options.clause, options.min_score, options.diversity, options.group_by, options.hybrid)
    return hashlib.sha256(query.digest() + repr(order).encode()).digest()[:8]


def _without(where: Clause | None, path: str, values: Sequence[Any]) -> Clause | None:
    """A filter, and none of some values; those that no filter can name (lists, objects) are passed over."""
    strings = tuple(value for value in values if isinstance(value, str))
    tests: list[Clause] = [Compare(path, "eq", value) for value in values if isinstance(value, (bool, int, float))]
    if strings:
        tests.append(Compare(path, "in", strings))
    if not tests:
        return where
    none_of_them = Not(AnyOf(tuple(tests)))
    return none_of_them if where is None else AllOf((where, none_of_them))
