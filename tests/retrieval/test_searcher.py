"""Pages, cursors, groups, diversity and thresholds over every store, against a plain computation."""

from __future__ import annotations

import base64
import random
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import BACKENDS, DIM

from unidiff_sdk import FilterError, Hit, OptionError, Page, SearchOptions
from unidiff_sdk.retrieval.cursors import Cursor
from unidiff_sdk.retrieval.options import MAX_LIMIT
from unidiff_sdk.retrieval.query import Query
from unidiff_sdk.retrieval.reranking.diversity import diversify
from unidiff_sdk.retrieval.searcher import Searcher
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import parse
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ImageStore

# qdrant-client's local mode warns that it ignores payload indexes.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


class HashEncoder:
    """An encoder whose text embeddings are random vectors seeded by the characters."""

    def encode_text(self, text: str) -> np.ndarray:
        return direction(sum(map(ord, text)))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([self.encode_text(text) for text in texts])

    def too_long(self, texts: list[str]) -> list[str]:
        return []


def direction(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def item(name: int, vector: np.ndarray | None = None, **payload: Any) -> Record:
    vector = direction(name) if vector is None else vector
    return Record(key_of(name), vector, {"id": name, **payload, "_unidiff": {"sha256": str(name), "uri": ""}})


@pytest.fixture(params=BACKENDS, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = request.param(tmp_path)
    yield store
    store.close()


def searcher(store: Store) -> Searcher:
    images = ImageStore(Path())

    def hit(payload: dict[str, Any], score: float) -> Hit:
        return Hit(payload["id"], score, payload.get("text"), payload, "", payload["_unidiff"]["sha256"], images)

    return Searcher(store, HashEncoder, hit, lambda texts, n: [], lambda: None)  # type: ignore[arg-type, return-value]


def page(store: Store, query: Query, **options: Any) -> Page:
    return searcher(store).search([query], SearchOptions(**options))[0]


def ids(hits: Any) -> list[Any]:
    return [hit.id for hit in hits]


def all_pages(store: Store, query: Query, **options: Any) -> list[Page]:
    """Every page from cursor to cursor, each from a new searcher, as in another process."""
    pages = [page(store, query, **options)]
    while pages[-1].cursor:
        pages.append(page(store, query, **options, cursor=pages[-1].cursor))
    return pages


QUERY = Query.of(vector=direction(10_000))


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": {"n": {"lt": 30}}},
        {"min_score": 0.1},
        {"group_by": "brand"},
        {"diversity": 0.5},
        {"hybrid": True},
        {"hybrid": 0.3, "group_by": "brand"},
    ],
)
def test_cursors_visit_the_whole_ranking(store: Store, options: dict[str, Any]) -> None:
    store.upsert([item(n, n=n, brand=f"brand {n % 23}", text="red" if n % 3 else "blue") for n in range(47)])
    query = Query.of("red")
    whole = page(store, query, limit=100, **options)
    assert whole.cursor is None and len(whole) > 14
    pages = all_pages(store, query, limit=7, **options)
    assert [id for part in pages for id in ids(part)] == ids(whole)
    assert [part.offset for part in pages] == [7 * k for k in range(len(pages))]
    assert ids(page(store, query, limit=5, offset=6, **options)) == ids(whole)[6:11]
    # The limit may change between pages.
    assert ids(page(store, query, limit=11, **options, cursor=pages[0].cursor)) == ids(whole)[7:18]


def test_cursors_stay_valid_while_items_are_added_and_deleted(store: Store) -> None:
    """No item is shown twice, and no item that was stored throughout is missed."""
    rng = np.random.default_rng(0)
    for mixed in (False, True):
        store.upsert([item(n) for n in range(120)])
        query = Query.of(vector=direction(1), without="stripes" if mixed else None)
        alive, shown, cursor, new = set(range(120)), [], None, 1000 + 1000 * mixed
        while True:
            part = page(store, query, limit=9, cursor=cursor)
            shown += ids(part)
            cursor = part.cursor
            if cursor is None:
                break
            gone = {int(n) for n in rng.choice(sorted(alive), 6, replace=False)}
            alive -= gone
            store.delete([key_of(n) for n in gone])
            store.upsert([item(new + k) for k in range(5)])
            new += 5
        assert len(shown) == len(set(shown))
        assert alive <= set(shown)
        store.delete([key_of(n) for n in [*range(120), *range(1000, new)]])


def test_cursors_among_equal_scores(store: Store) -> None:
    store.upsert([item(n, vector=direction(0)) for n in range(40)] + [item(50 + n) for n in range(10)])
    shown = [id for part in all_pages(store, Query.of(vector=direction(0)), limit=7) for id in ids(part)]
    assert sorted(shown) == sorted([*range(40), *range(50, 60)])
    shown = [id for part in all_pages(store, Query.of(vector=-direction(0)), limit=7) for id in ids(part)]
    assert sorted(shown) == sorted([*range(40), *range(50, 60)])


def test_cursor_of_another_search_is_refused(store: Store) -> None:
    store.upsert([item(n, n=n) for n in range(10)])
    cursor = page(store, QUERY, limit=3).cursor
    assert cursor
    assert len(page(store, QUERY, limit=3, cursor=cursor)) == 3
    for query, options in [
        (Query.of(vector=direction(3)), {}),
        (Query.of("red"), {}),
        (QUERY, {"where": {"n": {"lt": 5}}}),
        (QUERY, {"min_score": 0.0}),
        (QUERY, {"ef": 32}),
        (QUERY, {"exact": True}),
    ]:
        with pytest.raises(OptionError, match="belongs to another search"):
            page(store, query, limit=3, cursor=cursor, **options)
    assert ids(page(store, QUERY, limit=3, cursor="")) == ids(page(store, QUERY, limit=3))  # an empty URL parameter
    for text in ("x", cursor[:-8], cursor + "AAAA", "💡", cursor[::-1], 7):
        with pytest.raises(
            OptionError, match=r"not a cursor: give the attribute cursor of a Page|damaged, or from another catalog"
        ):
            page(store, QUERY, limit=3, cursor=text)


def test_forged_cursor_is_an_option_error() -> None:
    digest, dim = b"8 bytes.", 4
    valid = str(Cursor(digest, 7, 0.5, frozenset({str(uuid.UUID(int=1))}), np.ones(dim, np.float32)))
    data = base64.urlsafe_b64decode(valid + "=" * (-len(valid) % 4))
    for seed in range(400):
        rng = random.Random(seed)
        forged = bytearray(data)
        for _ in range(rng.choice([1, 2, 4])):
            forged[rng.randrange(len(forged))] = rng.randrange(256)
        del forged[rng.choice([len(forged), rng.randrange(len(forged))]) :]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read = Cursor.read(base64.urlsafe_b64encode(forged).decode().rstrip("="), digest, dim)
            except OptionError:
                continue
        assert str(replace(read, shown=read.shown + MAX_LIMIT))  # the next page has a cursor, too
    for shown in (2**31 + 1, 2**32 - 1):
        with pytest.raises(OptionError, match="damaged"):
            Cursor.read(str(Cursor(digest, shown)), digest, dim)


def test_cursor_round_trips_through_its_string() -> None:
    ties = frozenset(str(uuid.UUID(int=n)) for n in range(3))
    for cursor in (
        Cursor(b"12345678", 5),
        Cursor(b"12345678", 5, 0.25, ties),
        Cursor(b"12345678", 70_000, -0.5, ties, direction(0)),
    ):
        again = Cursor.read(str(cursor), b"12345678", DIM)
        assert (again.shown, again.score, again.ties) == (cursor.shown, cursor.score, cursor.ties)
        assert (again.vector is None) == (cursor.vector is None)
        if cursor.vector is not None:
            np.testing.assert_array_equal(again.vector, cursor.vector)


# ------------------------------------------------------------------------------------------------ ranking


def test_group_by_returns_the_best_hit_of_each_group(store: Store) -> None:
    """One brand holds the first 600 ranks, some items have no brand, one has a list."""
    records = [item(n, vector=unit(direction(1) + 0.01 * direction(n)), brand="Acme") for n in range(600)]
    records += [item(1000 + n, brand=["Nord", "Vellum", 7, True, None][n % 5]) for n in range(40)]
    records += [item(2000 + n) for n in range(3)] + [item(3000, brand=["a", "b"])]
    store.upsert(records)
    query = direction(1)
    best: dict[Any, Record] = {}
    for record in sorted(records, key=lambda r: -float(r.vector @ query)):
        brand = record.payload.get("brand")
        best.setdefault((type(brand), str(brand)) if brand is not None else record.id, record)
    expected = [record.payload["id"] for record in best.values()]
    assert ids(page(store, Query.of(vector=query), group_by="brand", limit=50)) == expected
    assert ids(page(store, Query.of(vector=query), group_by="brand", limit=3)) == expected[:3]
    assert ids(page(store, Query.of(vector=query), group_by="brand", limit=3, offset=2)) == expected[2:5]
    with pytest.raises(OptionError, match=r"group_by='nothing': no item has this column\. Columns: brand, id"):
        page(store, Query.of(vector=query), group_by="nothing")


def test_offset_pages_show_items_of_equal_score_once(store: Store) -> None:
    store.upsert([item(n, vector=direction(n // 5), size=n % 5) for n in range(100)])
    query = Query.of(vector=direction(1000))
    for options in ({}, {"group_by": "id"}):
        for limit in (7, 12, 24):
            shown = [
                i
                for start in range(0, 100, limit)
                for i in ids(page(store, query, limit=limit, offset=start, **options))
            ]
            assert len(shown) == 100 and set(shown) == set(range(100))
        keys = [key_of(one) for one in ids(page(store, query, limit=5, **options))]
        assert keys == sorted(keys)


def test_groups_before_a_cursor_hide_no_group_after_it(store: Store) -> None:
    near = [unit(direction(1) + 0.001 * n * direction(2)) for n in range(400)]
    store.upsert([item(n, vector=near[n], brand=f"brand {n // 20}") for n in range(100, 400)])
    query = Query.of(vector=direction(1))
    first = page(store, query, group_by="brand", limit=4)
    assert [hit.payload["brand"] for hit in first] == [f"brand {k}" for k in range(5, 9)]
    store.upsert([item(n, vector=near[n], brand=f"brand {n // 20}") for n in range(100)])
    second = page(store, query, group_by="brand", limit=4, cursor=first.cursor)
    assert [hit.payload["brand"] for hit in second] == [f"brand {k}" for k in range(9, 13)]
    assert second.cursor


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
def test_diversify_is_maximal_marginal_relevance(diversity: float) -> None:
    """Compare with the definition, evaluated step by step."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        vectors = np.array([direction(int(k)) for k in rng.integers(0, 1000, 25)])
        relevance = (vectors @ direction(5)).astype(np.float32)
        relative = (relevance - relevance.min()) / np.ptp(relevance)
        similarity = vectors @ vectors.T
        similarity = (similarity - similarity.min()) / np.ptp(similarity)
        selected = [int(np.argmax(relevance))]
        while len(selected) < 10:
            gains = {
                k: (1 - diversity) * relative[k] - diversity * max(similarity[k][p] for p in selected)
                for k in range(25)
                if k not in selected
            }
            selected.append(max(gains, key=lambda k: gains[k]))
        assert diversify(relevance, vectors, diversity, 10) == selected


def test_diversity_varies_the_hits_of_a_page(store: Store) -> None:
    similar = [item(n, vector=unit(direction(1) + 0.01 * direction(n))) for n in range(20)]
    store.upsert(similar + [item(100 + n) for n in range(60)])
    query = Query.of(vector=direction(1))
    assert ids(page(store, query, diversity=0.0)) == ids(page(store, query))
    assert set(ids(page(store, query))) <= set(range(20))
    varied = page(store, query, diversity=0.7)
    assert varied[0].id == page(store, query)[0].id
    assert sum(id < 20 for id in ids(varied)) < 4


def test_min_score_excludes_lower_scores(store: Store) -> None:
    records = [item(n) for n in range(60)]
    store.upsert(records)
    expected = {r.payload["id"] for r in records if r.vector @ direction(10_000) >= 0.2}
    assert set(ids(page(store, QUERY, min_score=0.2, limit=60))) == expected
    assert len(page(store, QUERY, min_score=1.5)) == 0


def test_examples_are_excluded_from_the_hits(store: Store) -> None:
    store.upsert([item(n) for n in range(30)])
    found = page(store, Query.of(like=[3, 4], unlike=5, vector=direction(3)), limit=30)
    assert set(ids(found)) == set(range(30)) - {3, 4, 5}


def test_batch_equals_single_searches(store: Store) -> None:
    store.upsert([item(n, text="red" if n % 2 else "blue", brand=n % 4) for n in range(40)])
    queries = [Query.of("red"), Query.of("red", without="stripes"), Query.of(like=3), QUERY]
    for options in ({}, {"group_by": "brand"}, {"diversity": 0.4}, {"offset": 3}):
        together = searcher(store).search(queries, SearchOptions(limit=6, **options))
        assert [ids(part) for part in together] == [ids(page(store, q, limit=6, **options)) for q in queries]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit=0"),
        ({"offset": -1}, "offset=-1"),
        ({"cursor": "x", "offset": 3}, "offset= and cursor= exclude each other"),
        ({"min_score": float("nan")}, "min_score=nan: give a finite number"),
        ({"min_score": True}, "min_score=True: give a finite number"),
        ({"min_score": 10**400}, "min_score is an integer of 1,329 bits"),
        ({"hybrid": 10**5000}, "hybrid is an integer of 16,610 bits"),
        ({"diversity": 1.5}, "diversity=1.5: give a number from 0"),
        ({"diversity": 0.5, "group_by": "brand"}, "diversity= and group_by= exclude each other"),
        ({"group_by": ""}, "group_by='': give the name of a column"),
        ({"ef": 0}, "ef=0: give an integer from 1 to 10,000, or None"),
        ({"ef": 10_001}, "ef=10001: give an integer from 1 to 10,000, or None"),
        ({"ef": 32.5}, "ef=32.5: give an integer from 1 to 10,000, or None"),
        ({"ef": True}, "ef=True: give an integer from 1 to 10,000, or None"),
        ({"exact": 1}, "exact=1: give True or False"),
        ({"exact": True, "ef": 32}, "exact= and ef= exclude each other"),
        ({"hybrid": 1.0}, "hybrid=1.0: give True, False, or a number from 0 to below 1"),
        ({"hybrid": "yes"}, "hybrid='yes': give True, False"),
        ({"hybrid": True, "min_score": 0.2}, "min_score= and hybrid= exclude each other"),
        ({"hybrid": True, "limit": 501}, "501: give at most 500 in total with hybrid="),
        ({"where": {"price": {"below": 3}}}, "Valid operators"),
    ],
)
def test_search_options_refuse_invalid_values(options: dict[str, Any], says: str) -> None:
    with pytest.raises((OptionError, FilterError), match=says):
        SearchOptions(**options)


@pytest.mark.parametrize("cursor", [np.array([1, 2]), b"abc", 7, ["a"]])
def test_options_refuse_a_cursor_that_is_no_string(cursor: Any) -> None:
    with pytest.raises(OptionError, match="give the attribute cursor of a Page"):
        SearchOptions(cursor=cursor)


def test_search_options_are_normalized_and_frozen() -> None:
    options = SearchOptions(where={"price": {"lt": 3}}, cursor="", hybrid=True)
    assert (options.limit, options.cursor, options.hybrid) == (10, None, 0.5)
    assert options.clause == parse({"price": {"lt": 3}})
    assert replace(options, limit=5, hybrid=False) == SearchOptions(limit=5, where={"price": {"lt": 3}})
    with pytest.raises(FrozenInstanceError):
        options.limit = 3  # type: ignore[misc]


def test_hybrid_needs_a_text(store: Store) -> None:
    with pytest.raises(OptionError, match="hybrid= ranks by the words of a text, and a query has none"):
        page(store, QUERY, hybrid=True)
