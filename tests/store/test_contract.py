"""The contract of the `Store` protocol, for every implementation."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.backends import BACKENDS, DIM, record

from unidiff_sdk.errors import StoreError
from unidiff_sdk.store import Record, ScoredRecord, Store, VectorQuery
from unidiff_sdk.store.filters import parse

# qdrant-client's local mode warns that payload indexes have no effect.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


@pytest.fixture(params=BACKENDS, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = request.param(tmp_path)
    yield store
    store.close()


def test_empty_store_answers_every_read(store: Store) -> None:
    assert store.count() == 0
    assert store.query(np.ones(DIM, np.float32), limit=5) == []
    assert store.retrieve([record(0).id]) == []
    assert list(store.scroll()) == []
    store.delete([record(0).id])


def test_retrieve_returns_what_was_upserted(store: Store) -> None:
    payload = {
        "text": "größe 💡",
        "n": 3,
        "x": 2.5,
        "yes": True,
        "none": None,
        "list": [1, "a"],
        "nested": {"a": {"b": 1}},
    }
    original = record(1, **payload)
    store.upsert([original])
    (stored,) = store.retrieve([original.id])
    assert stored.payload == payload
    np.testing.assert_allclose(stored.vector, original.vector, atol=1e-7)


def test_results_are_values(store: Store) -> None:
    """Whatever an engine converts only when it is read, results compare, copy and print as plain records."""
    store.upsert([record(1, n=1)])
    (found,) = store.query(record(1).vector, limit=1)
    plain = ScoredRecord(record(1).id, found.score, {"n": 1})
    assert pickle.loads(pickle.dumps(found)) == found == plain
    assert replace(found, score=2.0) == replace(plain, score=2.0) and repr(found) == repr(plain)
    assert not hasattr(found, "missing")


def test_query_ranks_by_dot_product(store: Store) -> None:
    records = [record(n) for n in range(200)]
    store.upsert(records)
    query = 3 * record(1000).vector  # a mix of queries does not have unit length
    scores = np.array([r.vector for r in records]) @ query
    best = np.argsort(-scores)
    found = store.query(query, limit=10)
    assert [f.id for f in found] == [records[k].id for k in best[:10]]
    np.testing.assert_allclose([f.score for f in found], scores[best[:10]], rtol=1e-5)
    assert [f.id for f in store.query(query, limit=5, offset=5)] == [f.id for f in found[5:]]
    assert store.query(query, limit=5, offset=500) == []


def test_query_batch_equals_single_queries(store: Store) -> None:
    records = [record(n, even=n % 2 == 0) for n in range(50)]
    store.upsert(records)
    searches = [
        VectorQuery(record(100).vector, 5),
        VectorQuery(record(101).vector, 3, offset=2, where=parse({"even": True})),
        VectorQuery(record(102).vector, 50, exclude=(records[3].id, records[4].id)),
        VectorQuery(record(103).vector, 50, min_score=0.3),
    ]
    plain, filtered, without, similar = store.query_batch(searches)
    single = store.query(searches[0].vector, limit=5)
    single_filtered = store.query(searches[1].vector, limit=3, offset=2, where=parse({"even": True}))
    for batch, alone in ((plain, single), (filtered, single_filtered)):
        assert [(f.id, f.payload) for f in batch] == [(f.id, f.payload) for f in alone]
        np.testing.assert_allclose([f.score for f in batch], [f.score for f in alone], rtol=1e-6)
    assert {r.id for r in records} - {f.id for f in without} == {records[3].id, records[4].id}
    scores = np.array([r.vector for r in records]) @ searches[3].vector
    assert {f.id for f in similar} == {r.id for r, score in zip(records, scores, strict=True) if score >= 0.3}
    (found,) = store.query_batch([VectorQuery(records[7].vector, 1, with_vectors=True)])[0]
    assert found.vector is not None and plain[0].vector is None
    np.testing.assert_allclose(found.vector, records[7].vector, atol=1e-7)


@pytest.mark.parametrize("weight", [0.5, 0.2, 0.9])
def test_hybrid_query_is_reciprocal_rank_fusion_of_dot_product_and_bm25(store: Store, weight: float) -> None:
    """Compared with the formulas: BM25 by Robertson and Zaragoza, and the fusion by Cormack et al."""
    captions = [
        "a red dress",
        "blue boots",
        "Red, red shoes!",
        "a long red striped summer dress",
        "green",
        "dress größe",
    ]
    records = [record(n, text=caption) for n, caption in enumerate(captions)]
    store.upsert([*records, record(50, other="no caption")])
    query = record(100).vector
    tokens = [re.findall(r"[^\W_]+", caption.lower()) for caption in captions]
    average = sum(map(len, tokens)) / len(tokens)
    bm25 = np.zeros(len(captions))
    for word in ("red", "größe"):
        containing = sum(word in document for document in tokens)
        idf = np.log(1 + (len(tokens) - containing + 0.5) / (containing + 0.5))
        for n, document in enumerate(tokens):
            often = document.count(word)
            bm25[n] += idf * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(document) / average))
    by_text = [n for n in np.argsort(-bm25) if bm25[n] > 0]
    by_vector = list(np.argsort(-np.array([r.vector for r in [*records, record(50)]]) @ query))
    expected = {
        n: sum(
            1 / (60 + (ranking.index(n) + 1) / ranking_weight)
            for ranking, ranking_weight in ((by_vector, 2 - 2 * weight), (by_text, 2 * weight))
            if n in ranking
        )
        for n in by_vector
    }
    ids = [*(r.id for r in records), record(50).id]
    (found,) = store.query_batch([VectorQuery(query, 10, text="RED größe", bm25_weight=weight)])
    assert {f.id: pytest.approx(f.score, abs=1e-6) for f in found} == {ids[n]: s for n, s in expected.items()}
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    (found,) = store.query_batch([VectorQuery(query, 10, text="red", where=parse({"text": {"contains": "dress"}}))])
    assert {f.id for f in found} == {ids[0], ids[3], ids[5]}


def test_order_by_sorts_numbers_and_dates(store: Store) -> None:
    records = [record(n, price=n / 2, day=f"2024-05-{10 + n}", even=n % 2 == 0) for n in range(6)]
    store.upsert([*records, record(9)])
    for column, kind in (("price", "float"), ("day", "datetime")):
        down = store.order_by(column, kind, descending=True, limit=10, offset=0)
        assert [r.id for r in down] == [r.id for r in reversed(records)]
        up = store.order_by(column, kind, descending=False, limit=2, offset=1, where=parse({"even": True}))
        assert [r.id for r in up] == [records[2].id, records[4].id]
        np.testing.assert_allclose(up[0].vector, records[2].vector, atol=1e-7)


def twins(count: int, copies: int) -> list[Record]:
    """Records in groups of equal vectors and prices. Their ids are in random order."""
    ids = np.random.default_rng(0).permutation(count)
    return [
        Record(record(int(ids[n])).id, record(n // copies).vector, {"price": n // copies, "n": n}) for n in range(count)
    ]


@pytest.mark.parametrize("copies", [5, 300])
def test_equal_scores_are_ordered_by_id_on_every_page(store: Store, copies: int) -> None:
    records = twins(300, copies)
    store.upsert(records[::2])
    store.upsert(records[1::2])
    query = record(1000).vector
    best = sorted(records, key=lambda r: (-round(float(r.vector @ query), 5), r.id))
    for limit in (7, 300):
        for with_payload in (True, False):
            pages = [VectorQuery(query, limit, start, with_payload=with_payload) for start in range(0, 310, limit)]
            found = [one for page in store.query_batch(pages) for one in page]
            assert [one.id for one in found] == [r.id for r in best]
            assert [one.payload for one in found] == [r.payload if with_payload else {} for r in best]
    (found,) = store.query_batch([VectorQuery(query, 9, offset=3, with_vectors=True)])
    np.testing.assert_allclose([one.vector for one in found], [r.vector for r in best[3:12]], atol=1e-6)


@pytest.mark.parametrize("descending", [True, False])
def test_order_by_orders_equal_values_by_id_on_every_page(store: Store, descending: bool) -> None:
    records = twins(200, 25)
    store.upsert(records)
    expected = sorted(records, key=lambda r: (-r.payload["price"] if descending else r.payload["price"], r.id))
    for limit in (11, 70):
        found = [
            one.id
            for start in range(0, 200, limit)
            for one in store.order_by("price", "float", descending=descending, limit=limit, offset=start)
        ]
        assert found == [r.id for r in expected]


def test_facet_counts_values(store: Store) -> None:
    store.upsert(
        [record(n, brand="Nord" if n % 3 else "Acme", tags=["a", "b"][: n % 3], sale=n == 1) for n in range(9)]
    )
    assert (
        store.count(parse({"brand": {"contains": "nord"}})) == 6
    )  # this creates a text index, the facet needs a keyword index
    assert store.facet("brand", "keyword", limit=10) == {"Nord": 6, "Acme": 3}
    assert store.facet("tags", "keyword", limit=10, where=parse({"brand": "Nord"})) == {"a": 6, "b": 3}
    assert store.facet("sale", "bool", limit=10) == {True: 1, False: 8}
    assert store.facet("brand", "keyword", limit=1) == {"Nord": 6}
    assert store.count(parse({"brand": {"contains": "nord"}})) == 6


def test_upsert_replaces_vector_and_payload(store: Store) -> None:
    store.upsert([record(1, color="red", old=1)])
    store.upsert([Record(record(1).id, record(2).vector, {"color": "blue"})])
    assert store.count() == 1
    (stored,) = store.retrieve([record(1).id])
    assert stored.payload == {"color": "blue"}
    np.testing.assert_allclose(stored.vector, record(2).vector, atol=1e-7)


def test_empty_arguments_are_accepted(store: Store) -> None:
    store.upsert([])
    store.delete([])
    assert store.retrieve([]) == [] and store.query_batch([]) == [] and store.count() == 0


def test_delete_removes_records_and_ignores_unknown_ids(store: Store) -> None:
    store.upsert([record(n) for n in range(4)])
    store.delete([record(1).id, record(3).id, record(77).id])
    assert store.count() == 2
    assert {r.id for batch in store.scroll() for r in batch} == {record(0).id, record(2).id}


def test_count_applies_the_filter(store: Store) -> None:
    store.upsert([record(n, color="red" if n % 3 else "blue") for n in range(9)])
    assert store.count(parse({"color": "blue"})) == 3


def test_scroll_yields_batches_ordered_by_id(store: Store) -> None:
    store.upsert([record(n, n=n) for n in range(25)])
    batches = list(store.scroll(batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert len({r.id for batch in batches for r in batch}) == 25
    ids = [r.id for batch in batches for r in batch]
    assert ids == sorted(ids)
    assert sum(map(len, store.scroll(4, parse({"n": {"lt": 7}})))) == 7


@pytest.mark.parametrize("vector", [np.full(DIM, np.nan), np.full(DIM, np.inf), np.ones(DIM + 1)])
def test_upsert_rejects_invalid_vectors_and_stores_nothing(store: Store, vector: np.ndarray) -> None:
    store.upsert([record(1)])
    with pytest.raises(StoreError, match=r"NaN or infinity|shape"):
        store.upsert([record(2), Record(record(3).id, vector.astype(np.float32), {"id": "bad"})])
    assert store.count() == 1


@pytest.mark.parametrize("vector", [np.full(DIM, np.nan), np.full(DIM, np.inf), np.ones(DIM + 1)])
def test_query_rejects_invalid_vectors(store: Store, vector: np.ndarray) -> None:
    store.upsert([record(1)])
    with pytest.raises(StoreError, match=f"{DIM} finite numbers"):
        store.query(vector.astype(np.float32), limit=1)


def test_optimize_keeps_all_records(store: Store) -> None:
    store.upsert([record(n) for n in range(100)])
    store.optimize()
    assert store.count() == 100
    assert store.query(record(5).vector, limit=1)[0].id == record(5).id


def test_closed_store_raises(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.count()


def test_sixteen_threads_read_and_write(store: Store, request: pytest.FixtureRequest) -> None:
    if "client" in request.node.name:
        pytest.skip("the local mode of qdrant-client is not thread-safe")
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for step in range(20):
                mine = record(1000 * thread + step, thread=thread)
                store.upsert([mine])
                assert store.query(mine.vector, limit=1, where=parse({"thread": thread}))[0].id == mine.id
                if step % 2:
                    store.delete([mine.id])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.count() == 160
