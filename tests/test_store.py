"""The contract of a store, over every back end."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from backends import BACKENDS, DIM, edge

from unidiff_sdk.errors import StoreError
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.filters import parse

# Local mode says that payload indexes have no effect on it.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


@pytest.fixture(params=BACKENDS, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = request.param(tmp_path)
    yield store
    store.close()


def record(name: int, **payload: object) -> Record:
    """An item of its own direction, a function of its name."""
    vector = np.random.default_rng(name).normal(size=DIM).astype(np.float32)
    return Record(str(uuid.UUID(int=name + 1)), vector / np.linalg.norm(vector), dict(payload))


def test_empty(store: Store) -> None:
    assert store.count() == 0
    assert store.query(np.ones(DIM, np.float32), limit=5) == []
    assert store.retrieve([record(0).id]) == []
    assert list(store.scroll()) == []
    store.delete([record(0).id])


def test_round_trip(store: Store) -> None:
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


def test_search_is_the_dot_product_in_order(store: Store) -> None:
    records = [record(n) for n in range(200)]
    store.upsert(records)
    query = 3 * record(1000).vector  # not of unit length: a mix of queries never is
    scores = np.array([r.vector for r in records]) @ query
    best = np.argsort(-scores)
    found = store.query(query, limit=10)
    assert [f.id for f in found] == [records[k].id for k in best[:10]]
    np.testing.assert_allclose([f.score for f in found], scores[best[:10]], rtol=1e-5)
    assert [f.id for f in store.query(query, limit=5, offset=5)] == [f.id for f in found[5:]]
    assert store.query(query, limit=5, offset=500) == []


def test_upsert_replaces(store: Store) -> None:
    store.upsert([record(1, colour="red", old=1)])
    store.upsert([Record(record(1).id, record(2).vector, {"colour": "blue"})])
    assert store.count() == 1
    (stored,) = store.retrieve([record(1).id])
    assert stored.payload == {"colour": "blue"}
    np.testing.assert_allclose(stored.vector, record(2).vector, atol=1e-7)


def test_delete(store: Store) -> None:
    store.upsert([record(n) for n in range(4)])
    store.delete([record(1).id, record(3).id, record(77).id])
    assert store.count() == 2
    assert {r.id for batch in store.scroll() for r in batch} == {record(0).id, record(2).id}


def test_count_with_a_filter(store: Store) -> None:
    store.upsert([record(n, colour="red" if n % 3 else "blue") for n in range(9)])
    assert store.count(parse({"colour": "blue"})) == 3


def test_scroll_in_batches(store: Store) -> None:
    store.upsert([record(n) for n in range(25)])
    batches = list(store.scroll(batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert len({r.id for batch in batches for r in batch}) == 25


@pytest.mark.parametrize("vector", [np.full(DIM, np.nan), np.full(DIM, np.inf), np.ones(DIM + 1)])
def test_unusable_vectors_are_refused_and_lose_nothing(store: Store, vector: np.ndarray) -> None:
    store.upsert([record(1)])
    with pytest.raises(StoreError, match=r"NaN or infinity|shape"):
        store.upsert([record(2), Record(record(3).id, vector.astype(np.float32), {"id": "bad"})])
    assert store.count() == 1


def test_optimize_keeps_everything(store: Store) -> None:
    store.upsert([record(n) for n in range(100)])
    store.optimize()
    assert store.count() == 100
    assert store.query(record(5).vector, limit=1)[0].id == record(5).id


def test_closed(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.count()


def test_sixteen_threads(store: Store, request: pytest.FixtureRequest) -> None:
    if "client" in request.node.name:
        pytest.skip("qdrant-client's local mode is not made for threads; its HTTP client is")
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


# ------------------------------------------------------------------------------------------------ Qdrant Edge alone


def test_edge_reopens(tmp_path: Path) -> None:
    store = edge(tmp_path)
    store.upsert([record(1, colour="red")])
    store.count(parse({"colour": "red"}))
    store.close()
    store = edge(tmp_path)
    assert store.retrieve([record(1).id])[0].payload == {"colour": "red"}
    store.close()


def test_edge_in_use(tmp_path: Path) -> None:
    store = edge(tmp_path)
    with pytest.raises(StoreError, match="in use by another"):
        edge(tmp_path)
    store.close()
    edge(tmp_path).close()


def test_edge_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_store import edge, record\n"
        "edge(Path(sys.argv[1])).upsert([record(n) for n in range(50)]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=False)
    store = edge(tmp_path)
    assert store.count() == 50
    store.close()


# ------------------------------------------------------------------------------------------------ qdrant-client alone


def test_a_collection_of_another_bundle_is_refused() -> None:
    from qdrant_client import QdrantClient, models

    from unidiff_sdk.store.server import ServerStore

    client = QdrantClient(":memory:")
    ServerStore(client, "shop", DIM, "aaaa")
    ServerStore(client, "shop", DIM, "aaaa")
    with pytest.raises(StoreError, match="another bundle"):
        ServerStore(client, "shop", DIM, "bbbb")
    client.create_collection("theirs", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.DOT))
    with pytest.raises(StoreError, match="not made by UniDiff"):
        ServerStore(client, "theirs", DIM, "aaaa")


def test_an_unreachable_server_is_one_sentence() -> None:
    from qdrant_client import QdrantClient

    from unidiff_sdk.store.server import ServerStore

    client = QdrantClient("http://127.0.0.1:9", check_compatibility=False)
    with pytest.raises(StoreError, match="Qdrant server"):
        ServerStore(client, "shop", DIM, "aaaa")
