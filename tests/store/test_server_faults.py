"""`ServerStore` against a server that misbehaves: every fault is a StoreError, and no unconfirmed write a success."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from support.backends import DIM, record
from support.misbehaving_server import MisbehavingServer, Request

from unidiff_sdk import ServerOptions, StoreError
from unidiff_sdk.store import Record
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.payload import SYSTEM, is_item
from unidiff_sdk.store.server import connection, points, retries, transport
from unidiff_sdk.store.server.store import ServerStore

pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")

KEY = "a-secret-key"


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    server = MisbehavingServer()
    yield server
    server.stop()


def open_store(
    server: MisbehavingServer, *, sleep: Callable[[float], object] | None = None, **given: Any
) -> ServerStore:
    options = ServerOptions(**{"retries": 1, "timeout": 1, **given})
    url = server.url.replace("//", f"//user:{KEY}@")
    return ServerStore(
        connection.connect(url, options, KEY, sleep=sleep), "shop", DIM, "aaaa", options, is_record=is_item
    )


def item(number: int, **columns: Any) -> Record:
    """A record with the payload of an item."""
    system = {"sha256": f"{number:064x}", "uri": "images/00/a.png"}
    return Record(key_of(number), record(number).vector, {"id": number, **columns, SYSTEM: system})


def with_result(**changes: Any) -> Callable[[Any], Any]:
    """A fault: the result with other values."""
    return lambda result: result | changes


def no_pause(seconds: float) -> None:
    """Do not wait."""


FAULTS: dict[str, Any] = {
    "overloaded": 503,
    "redirect": 302,
    "wrong key": 401,
    "server error": 500,
    "too many requests": (429, 7),
    "date in Retry-After": (429, "Sun, 29 Nov 2026 01:00:00 GMT"),
    "negative Retry-After": (429, -5),
    "huge Retry-After": (429, "9" * 400),
    "reset": "reset",
    "lost response": "lost",
    "page of a proxy": "html",
    "null": "null",
    "not json": "not json",
    "truncated": "truncated",
    "no result": lambda result: None,
    "another type": lambda result: f"the key is {KEY}",
    "deep": lambda result: {"count": [[[["x"]]]]},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["count", "upsert", "search"])
def test_every_fault_is_a_store_error_without_the_key(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture, fault: str, call: str
) -> None:
    store = open_store(server, sleep=no_pause)
    calls: dict[str, Callable[[], Any]] = {
        "count": store.count,
        "upsert": lambda: store.upsert([item(1)]),
        "search": lambda: store.query(record(1).vector, limit=3),
    }
    server.faults = [FAULTS[fault]] * 2
    with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match="The Qdrant server failed") as failed:
        calls[call]()
    assert f"at http://127.0.0.1:{server.server_port}: " in str(failed.value)
    seen = [str(failed.value), str(failed.value.__cause__), caplog.text]
    assert not any(KEY in text for text in seen)
    server.faults = []
    calls[call]()


@pytest.mark.parametrize("fault", ["trickle", "trickle head"])
def test_timeout_limits_the_whole_response(server: MisbehavingServer, fault: str) -> None:
    store = open_store(server, retries=0)
    server.faults = [fault]
    started = time.perf_counter()
    with pytest.raises(StoreError, match="timed out"):
        store.count()
    assert time.perf_counter() - started < 2.5


def test_size_of_a_response_is_limited(server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(server)
    monkeypatch.setattr(transport, "MAX_RESPONSE", 1 << 20)
    server.faults = ["endless"]
    with pytest.raises(StoreError, match=r"more than 1,048,576 bytes"):
        store.count()
    assert [request.path for request in server.requests].count("/collections/shop/points/count") == 1, "no repetition"


# ------------------------------------------------------------------------------------------------ unconfirmed writes

WRITES: dict[str, Callable[[ServerStore], None]] = {
    "upsert": lambda store: store.upsert([item(1)]),
    "delete": lambda store: store.delete([key_of(1)]),
    "create_index": lambda store: store.create_index("price", "float"),
    "drop_index": lambda store: store.drop_index("price"),
}


@pytest.mark.parametrize("status", ["acknowledged", "wait_timeout"])
@pytest.mark.parametrize("write", WRITES)
def test_write_that_is_not_complete_is_repeated_then_an_error(
    server: MisbehavingServer, write: str, status: str
) -> None:
    store = open_store(server, sleep=no_pause)
    revision = store.revision
    server.faults = [with_result(status=status)]
    WRITES[write](store)
    server.faults = [with_result(status=status)] * 2
    with pytest.raises(StoreError, match=f'not confirmed the write .status "{status}".*Repeat'):
        WRITES[write](store)
    assert server.faults == []
    changes = 2 if write in ("upsert", "delete") else 0
    assert store.revision - revision == changes, "the second call counts as well: its write may be stored later"


def test_client_that_does_not_retry_reports_unconfirmed_writes(server: MisbehavingServer) -> None:
    store = ServerStore(QdrantClient(server.url, check_compatibility=False), "shop", DIM, "aaaa")
    server.faults = [with_result(status="wait_timeout")]
    with pytest.raises(StoreError, match="not confirmed"):
        store.upsert([item(1)])


# ------------------------------------------------------------------------------------------------ pauses


def test_pauses_of_one_call_are_limited_in_total(server: MisbehavingServer) -> None:
    pauses: list[float] = []
    store = open_store(server, retries=9, sleep=pauses.append)
    server.faults = [(429, 40)] * 9
    with pytest.raises(StoreError, match="not now"):
        store.count()
    assert pauses == [40, 20] and sum(pauses) == retries.MAX_WAIT


def test_interrupt_ends_the_pause_of_a_running_call(server: MisbehavingServer) -> None:
    store = open_store(server)
    server.faults = [(429, 50)]
    threading.Timer(0.3, store.interrupt).start()
    started = time.perf_counter()
    with pytest.raises(StoreError, match="closed while waiting to repeat a request"):
        store.upsert([item(1)])
    assert time.perf_counter() - started < 10


# ------------------------------------------------------------------------------------------------ endless scrolls

ENDLESS: dict[str, Callable[[Any], Any]] = {
    "same offset": lambda result: {**result, "next_page_offset": result["points"][0]["id"]},
    "first page again": lambda result: {**result, "next_page_offset": str(uuid.UUID(int=1))},
    "empty pages": lambda result: {"points": [], "next_page_offset": str(uuid.UUID(int=2**127))},
    "number after UUIDs": lambda result: {**result, "next_page_offset": 7},
    "not an id": lambda result: {**result, "next_page_offset": "next"},
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_scroll_without_progress_is_an_error(server: MisbehavingServer, fault: str) -> None:
    store = open_store(server)
    store.upsert([item(n) for n in range(5)])
    server.choose = lambda request: ENDLESS[fault] if request.path.endswith("/scroll") else None
    with pytest.raises(StoreError, match=r"does not finish listing|not that of a Qdrant server"):
        list(store.scroll(2))


def test_scroll_that_ignores_the_offset_is_an_error(server: MisbehavingServer) -> None:
    store = open_store(server)
    store.upsert([item(n) for n in range(5)])

    def choose(request: Request) -> Any:
        if request.path.endswith("/scroll"):
            request.body.pop("offset", None)
        return None

    server.choose = choose
    with pytest.raises(StoreError, match="does not finish listing"):
        list(store.scroll(2))


# ------------------------------------------------------------------------------------------------ foreign points

VECTOR = [0.1] * DIM
OURS = item(99).payload
FOREIGN: dict[str, dict[str, Any]] = {
    "number as id": {"id": 7, "vector": {"image": VECTOR}, "payload": OURS},
    "no payload": {"id": str(uuid.UUID(int=5)), "vector": {"image": VECTOR}, "payload": None},
    "other payload": {"id": str(uuid.UUID(int=5)), "vector": {"image": VECTOR}, "payload": {"price": 3}},
    "id of another item": {"id": str(uuid.UUID(int=5)), "vector": {"image": VECTOR}, "payload": OURS},
    "boolean id": {"id": key_of(99), "vector": {"image": VECTOR}, "payload": {**OURS, "id": True}},
    "caption is a number": {"id": key_of(99), "vector": {"image": VECTOR}, "payload": {**OURS, "text": 7}},
    "hash is a number": {"id": key_of(99), "vector": {"image": VECTOR}, "payload": {**OURS, SYSTEM: {"sha256": 1}}},
    "system is a list": {"id": key_of(99), "vector": {"image": VECTOR}, "payload": {**OURS, SYSTEM: []}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_points_are_skipped_with_a_warning(server: MisbehavingServer, kind: str) -> None:
    store = open_store(server)
    store.upsert([item(n, price=n) for n in range(9)])
    foreign = FOREIGN[kind]
    payload = foreign["payload"] and {**foreign["payload"], "price": 4.5}
    server.client.upsert("shop", [models.PointStruct(**{**foreign, "payload": payload})])
    with pytest.warns(UserWarning, match=f"1 points .*'{foreign['id']}'"):
        found = store.query(np.array(VECTOR, np.float32), limit=9)
    assert {scored.id for scored in found} == {key_of(n) for n in range(9)}
    ordered = store.order_by("price", "float", descending=False, limit=4, offset=3)
    assert [found.payload["id"] for found in ordered] == [3, 4, 5, 6], "its place on the page is filled"
    assert {r.payload["id"] for page in store.scroll(2) for r in page} == set(range(9))
    assert store.count() == 9
    if not isinstance(foreign["id"], int):
        assert store.retrieve([foreign["id"]]) == []
    assert server.client.count("shop").count == 10, "it is still there"


@pytest.mark.parametrize(
    "vectors", [{}, {"other": VECTOR}, {"image": VECTOR[:-1]}, {"image": ["x"] * DIM}, VECTOR, None]
)
def test_points_without_a_usable_vector_are_skipped(server: MisbehavingServer, vectors: Any) -> None:
    store = open_store(server)
    store.upsert([item(n) for n in range(3)])

    def strip(result: Any) -> Any:
        found = result["points"] if isinstance(result, dict) else result
        for point in found:
            if point["id"] == key_of(1):
                point["vector"] = vectors
        return result

    server.choose = lambda request: strip if "/points" in request.path and request.method == "POST" else None
    with pytest.warns(UserWarning, match="1 points .* are skipped"):
        assert {r.payload["id"] for page in store.scroll() for r in page} == {0, 2}
    assert {r.payload["id"] for r in store.retrieve([key_of(n) for n in range(3)])} == {0, 2}


def test_too_many_foreign_points_are_an_error(server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(server)
    monkeypatch.setattr(points, "MAX_FOREIGN", 3)
    server.client.upsert("shop", [models.PointStruct(id=n, vector={"image": VECTOR}) for n in range(4)])
    with pytest.raises(StoreError, match=r"more than 3 points.*collection="):
        list(store.scroll())


def test_points_that_were_not_requested_are_ignored(server: MisbehavingServer) -> None:
    store = open_store(server)
    store.upsert([item(n) for n in range(3)])
    (other,) = server.client.retrieve("shop", [key_of(2)], with_vectors=True)
    server.faults = [lambda result: [other.model_dump(mode="json")]]
    assert store.retrieve([key_of(1)]) == []


BAD_RESULTS: dict[str, Callable[[Any], Any]] = {
    "too few": lambda result: [],
    "too many": lambda result: result * 2,
    "not a number": lambda result: [{"points": [{**result[0]["points"][0], "score": float("nan")}]}],
}


@pytest.mark.parametrize("fault", BAD_RESULTS)
def test_search_results_are_checked(server: MisbehavingServer, fault: str) -> None:
    store = open_store(server)
    store.upsert([item(n) for n in range(3)])
    server.faults = [BAD_RESULTS[fault]]
    with pytest.raises(StoreError, match="not that of a Qdrant server"):
        store.query(record(1).vector, limit=3)


@pytest.mark.parametrize("metadata", [None, {}, {"unidiff": None}, {"unidiff": {}}, {"unidiff": {"fingerprint": 7}}])
def test_collection_with_other_metadata_is_refused(server: MisbehavingServer, metadata: Any) -> None:
    open_store(server)

    def change(result: Any) -> Any:
        result["config"]["metadata"] = metadata
        return result

    server.choose = lambda request: change if request.method == "GET" and request.path.endswith("shop") else None
    with pytest.raises(StoreError, match="not made by UniDiff"):
        open_store(server)


def test_collection_with_another_distance_is_refused(server: MisbehavingServer) -> None:
    server.client.create_collection(
        "shop",
        {"image": models.VectorParams(size=DIM, distance=models.Distance.COSINE)},
        metadata={"unidiff": {"fingerprint": "aaaa"}},
    )
    with pytest.raises(StoreError, match=r"by Cosine.*dot product"):
        open_store(server)
