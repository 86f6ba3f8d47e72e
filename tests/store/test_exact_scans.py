"""Scans of copies of the vectors that match a filter, or of all: they follow every write and stay within their limits.

`test_contract.py` and `test_filters.py` compare their results with brute force.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import DIM, ScanningStore, record

from unidiff_sdk.errors import StoreError
from unidiff_sdk.store import Record, VectorQuery
from unidiff_sdk.store.edge import exact_scans
from unidiff_sdk.store.edge.exact_scans import ExactScans
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.filters import parse

RED = parse({"color": "red"})
QUERY = record(10_000).vector


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EdgeStore]:
    """A store that gives every filter a copy."""
    store = EdgeStore(tmp_path / "vectors", DIM)
    store._scans = ExactScans(DIM, 0, 10_000)
    yield store
    store.close()


@pytest.fixture
def engine_calls(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each search that the engine answers."""
    calls: list[int] = []
    ask = store._query_batch
    monkeypatch.setattr(store, "_query_batch", lambda *asked: calls.append(1) or ask(*asked))
    return calls


def warm(store: EdgeStore, where: Any = RED) -> None:
    """Search until the filter has a copy."""
    for _ in range(60):
        store.query(QUERY, limit=1, where=where)


def best_red(records: dict[str, Record], limit: int) -> list[str]:
    red = [one for one in records.values() if one.payload["color"] == "red"]
    return [one.id for one in sorted(red, key=lambda one: (-float(one.vector @ QUERY), one.id))][:limit]


def test_copy_follows_random_writes(store: EdgeStore, engine_calls: list[int]) -> None:
    """Additions, replacements, deletions and changes of color, among them more than the copy collects."""
    rng, records = random.Random(0), {}

    def write(numbers: list[int]) -> None:
        new = [record(n, color=rng.choice(["red", "red", "blue"]), step=rng.randrange(10**6)) for n in numbers]
        moved = [Record(one.id, record(rng.randrange(10**6)).vector, one.payload) for one in new]
        store.upsert(moved)
        records.update((one.id, one) for one in moved)

    write(list(range(200)))
    warm(store)
    engine_calls.clear()
    for step in range(120):
        write(rng.choices(range(300), k=rng.choice([1, 1, 2, 40])))
        removed = rng.choices(list(records), k=rng.choice([0, 1, 3]))
        store.delete([*removed, str(uuid.UUID(int=10**9))])
        for id in removed:
            records.pop(id, None)
        found = store.query(QUERY, limit=25, where=RED)
        assert [one.id for one in found] == best_red(records, 25), step
        assert [one.payload for one in found] == [records[one.id].payload for one in found]
    assert not engine_calls


def test_copy_is_read_again_after_more_writes_than_it_can_follow(
    store: EdgeStore, engine_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_scans, "_LOG", 50)
    records = {one.id: one for one in (record(n, color="red") for n in range(100))}
    store.upsert(list(records.values()))
    warm(store)
    new = [record(n, color="red") for n in range(100, 180)]
    store.upsert(new)
    records.update((one.id, one) for one in new)
    engine_calls.clear()
    for _ in range(6):
        assert [one.id for one in store.query(QUERY, limit=30, where=RED)] == best_red(records, 30)
    assert 0 < len(engine_calls) < 6


def test_copy_survives_optimizing(store: EdgeStore, engine_calls: list[int]) -> None:
    records = {one.id: one for one in (record(n, color="red") for n in range(150))}
    store.upsert(list(records.values()))
    warm(store)
    engine_calls.clear()
    store.optimize()
    assert [one.id for one in store.query(QUERY, limit=30, where=RED)] == best_red(records, 30)
    gone = best_red(records, 1)
    store.delete(gone)
    del records[gone[0]]
    assert [one.id for one in store.query(QUERY, limit=30, where=RED)] == best_red(records, 30)
    assert not engine_calls


def test_searches_during_writes_miss_nothing_that_was_written_before(store: EdgeStore) -> None:
    """One thread moves the nearest record back and forth and replaces it. Others must see its latest finished state."""
    store.upsert([record(n, color="red", version=0) for n in range(300)])
    warm(store)
    nearest, finished, errors = str(uuid.UUID(int=10**7)), [0], []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                before = finished[0]
                found = store.query(QUERY, limit=5, where=RED)
                assert len(found) == 5
                versions = [one.payload["version"] for one in found if one.id == nearest]
                assert all(version >= before for version in versions)
                assert not versions or found[0].id == nearest
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(1, 200):
        color = "red" if version % 2 else "blue"
        store.upsert([Record(nearest, QUERY, {"color": color, "version": version})])
        finished[0] = version
        found = store.query(QUERY, limit=1, where=RED)
        assert (found[0].id == nearest) == (version % 2 == 1)
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []


def test_scan_is_discarded_if_a_write_ends_meanwhile(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is deleted between the scan and the reading of its payload must not shorten the page."""
    records = {one.id: one for one in (record(n, color="red") for n in range(100))}
    store.upsert(list(records.values()))
    warm(store)
    gone, read = best_red(records, 1), store.read_scored

    def delete_first(ranked: Any, search: Any) -> Any:
        monkeypatch.undo()
        store.delete(gone)
        return read(ranked, search)

    monkeypatch.setattr(store, "read_scored", delete_first)
    found = store.query(QUERY, limit=10, where=RED)
    assert [one.id for one in found] == best_red(records, 11)[1:]


def test_engine_answers_while_a_write_is_in_progress(store: EdgeStore, engine_calls: list[int]) -> None:
    store.upsert([record(n, color="red") for n in range(100)])
    warm(store)
    engine_calls.clear()
    with store._scans.following([record(0).id]):
        assert len(store.query(QUERY, limit=10, where=RED)) == 10
    assert len(engine_calls) == 1
    assert len(store.query(QUERY, limit=10, where=RED)) == 10
    assert len(engine_calls) == 1


def test_filters_of_equal_python_values_have_separate_copies(store: EdgeStore, engine_calls: list[int]) -> None:
    """1 and True are equal in Python, but not in a filter."""
    store.upsert([record(0, n=1), record(1, n=True), record(2, n=1.0)])
    for value, numbers in ((1, {0, 2}), (True, {1}), (1.0, {0, 2})):
        where = parse({"n": value})
        warm(store, where)
        engine_calls.clear()
        assert {one.id for one in store.query(QUERY, limit=5, where=where)} == {record(n).id for n in numbers}
        assert not engine_calls


def copied_bytes(store: EdgeStore) -> int:
    return sum(copy.bytes for copy in store._scans._copies.values())


def test_copies_stay_within_the_budget(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.upsert([record(n, color="red", third=n % 3) for n in range(300)])
    warm(store, parse({"third": 0}))
    one_copy = copied_bytes(store)
    assert one_copy >= 100 * 4 * DIM
    monkeypatch.setattr(exact_scans, "BUDGET", round(2.5 * one_copy))
    for third in (1, 2, 0, 1):
        where = parse({"third": third})
        warm(store, where)
        assert one_copy <= copied_bytes(store) <= exact_scans.BUDGET
        assert {one.payload["third"] for one in store.query(QUERY, limit=200, where=where)} == {third}
    monkeypatch.setattr(exact_scans, "_FILTERS", 4)
    for n in range(20):
        store.query(QUERY, limit=1, where=parse({"third": {"gt": n}}))
        assert len(store._scans._copies) <= 4


@pytest.mark.parametrize(
    ("fewest", "most", "expected"), [(0, 100, True), (0, 99, False), (100, 200, True), (101, 200, False)]
)
def test_only_filters_that_match_a_suitable_number_get_a_copy(
    store: EdgeStore, engine_calls: list[int], fewest: int, most: int, expected: bool
) -> None:
    store._scans = ExactScans(DIM, fewest, most)
    store.upsert([record(n, color="red") for n in range(100)])
    warm(store)
    engine_calls.clear()
    assert len(store.query(QUERY, limit=200, where=RED)) == 100
    assert (not engine_calls) == expected
    assert (copied_bytes(store) > 0) == expected


def test_growing_copy_is_released_above_the_limit(store: EdgeStore) -> None:
    store._scans = ExactScans(DIM, 0, 100)
    store.upsert([record(n, color="red") for n in range(90)])
    warm(store)
    assert copied_bytes(store) > 0
    for start in range(90, 150, 10):
        store.upsert([record(n, color="red") for n in range(start, start + 10)])
        assert len(store.query(QUERY, limit=200, where=RED)) == start + 10
    assert copied_bytes(store) == 0


def test_long_filters_get_no_copy(store: EdgeStore) -> None:
    store.upsert([record(n, n=str(n)) for n in range(100)])
    warm(store, parse({"n": list(map(str, range(100)))}))
    assert copied_bytes(store) == 0


@pytest.mark.parametrize(("size", "expected"), [(99, True), (100, True), (101, False)])
def test_small_store_gets_a_copy_of_all_vectors(
    store: EdgeStore, engine_calls: list[int], monkeypatch: pytest.MonkeyPatch, size: int, expected: bool
) -> None:
    monkeypatch.setattr(exact_scans, "SMALL", 100 * 4 * DIM)
    store._scans = ExactScans(DIM, 1000, 10_000)  # the least number of matches is one of filters
    records = [record(n) for n in range(size)]
    store.upsert(records)
    warm(store, None)
    engine_calls.clear()
    new = Record(record(500).id, QUERY, {})
    for written, gone in (([], []), ([new], [records[0].id]), ([], [new.id])):
        store.upsert(written)
        store.delete(gone)
        records = [one for one in [*records, *written] if one.id not in gone]
        best = sorted(records, key=lambda one: -float(one.vector @ QUERY))
        assert [one.id for one in store.query(QUERY, limit=20)] == [one.id for one in best[:20]]
    assert (not engine_calls) == expected


def test_repeated_searches_of_a_small_store_have_the_same_scores(store: EdgeStore) -> None:
    store.upsert([record(n) for n in range(200)])
    first = store.query(QUERY, limit=50)
    assert all(store.query(QUERY, limit=50) == first for _ in range(5))


def test_scan_applies_every_option_of_a_query(store: EdgeStore, engine_calls: list[int]) -> None:
    records = [record(n, color="red", n=n) for n in range(100)]
    store.upsert(records)
    warm(store)
    engine_calls.clear()
    ranking = sorted(records, key=lambda one: -float(one.vector @ QUERY))
    least = float(ranking[29].vector @ QUERY) - 1e-6
    (found,) = store.query_batch(
        [
            VectorQuery(
                QUERY,
                50,
                offset=2,
                where=RED,
                exclude=(ranking[0].id, ranking[5].id),
                min_score=least,
                with_payload=False,
                with_vectors=True,
            )
        ]
    )
    expected = [one for k, one in enumerate(ranking[:30]) if k not in (0, 5)][2:]
    assert [one.id for one in found] == [one.id for one in expected]
    assert all(one.payload == {} for one in found)
    np.testing.assert_allclose([one.vector for one in found], [one.vector for one in expected], atol=1e-7)
    assert not engine_calls


def test_closed_store_refuses_scans_and_holds_no_copies(tmp_path: Path) -> None:
    store = ScanningStore(tmp_path / "vectors")
    store.upsert([record(n, color="red") for n in range(10)])
    store.query(QUERY, limit=3, where=RED)
    assert copied_bytes(store) > 0
    store.close()
    assert copied_bytes(store) == 0
    with pytest.raises(StoreError, match="closed"):
        store.query(QUERY, limit=3, where=RED)
