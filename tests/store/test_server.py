"""`ServerStore` against a local HTTP server that misbehaves and records its requests.

The contract of the store runs over qdrant-client's local mode and, if QDRANT_URL is set, over a real server
(`backends`, `test_contract`, `test_filters`). Only a real server can show that shards, replicas and quantization have
an effect, that searches are correct while its optimizer runs, what happens when a node of a cluster stops during a
request, gRPC beyond the choice of the channel, 16 threads on one client, and throughput.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models
from support.backends import DIM, record
from support.misbehaving_server import MisbehavingServer

from unidiff_sdk import OptionError, ServerOptions, StoreError
from unidiff_sdk.store import VectorQuery
from unidiff_sdk.store.server import connection, retries
from unidiff_sdk.store.server.store import ServerStore


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    """A server with a collection of 7 points."""
    server = MisbehavingServer()
    ServerStore(server.client, "shop", DIM, "aaaa").upsert([record(n) for n in range(7)])
    yield server
    server.stop()


@pytest.fixture
def pauses() -> list[float]:
    """The pauses between two attempts, in seconds. The tests do not wait for them."""
    return []


def open_store(server: MisbehavingServer, pauses: list[float], **options: Any) -> ServerStore:
    given = ServerOptions(**options)
    client = connection.connect(server.url, given, "the key", sleep=pauses.append)
    return ServerStore(client, "shop", DIM, "aaaa", given)


@pytest.mark.parametrize("failures", [[503], ["reset"], [502, "reset", 504], [(429, 3)]])
def test_transient_failures_are_retried(server: MisbehavingServer, pauses: list[float], failures: list[Any]) -> None:
    store = open_store(server, pauses)
    server.faults = list(failures)
    assert store.count() == 7
    assert len(pauses) == len(failures)
    if failures == [(429, 3)]:
        assert pauses == [3]


def test_pauses_double_up_to_a_maximum(server: MisbehavingServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, retries=9)
    server.faults = [503] * 9
    assert store.count() == 7
    for attempt, pause in enumerate(pauses):
        full = min(retries.MAX_BACKOFF, retries.INITIAL_BACKOFF * 2**attempt)
        assert full / 2 <= pause <= full


def test_last_failure_is_raised(server: MisbehavingServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, retries=2)
    server.faults = [503] * 3
    before = len(server.requests)
    with pytest.raises(StoreError, match=r"(?s)Qdrant server failed.*503"):
        store.count()
    assert len(server.requests) - before == 3
    assert store.count() == 7


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_permanent_failures_are_not_retried(server: MisbehavingServer, pauses: list[float], status: int) -> None:
    store = open_store(server, pauses)
    server.faults = [status]
    with pytest.raises(StoreError, match=str(status)):
        store.count()
    assert pauses == []


def test_timed_out_request_is_retried(server: MisbehavingServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, timeout=1, retries=1)
    server.faults = [2.5]
    started = time.perf_counter()
    assert store.count() == 7
    assert 0.9 < time.perf_counter() - started < 2.4
    assert len(pauses) == 1
    server.faults = [2.5, 2.5]
    with pytest.raises(StoreError, match="timed out"):
        store.count()


def test_lost_upsert_is_repeated_with_the_same_ids(server: MisbehavingServer, pauses: list[float]) -> None:
    store = open_store(server, pauses)
    server.requests.clear()
    server.faults = ["lost"]
    store.upsert([record(1, color="red")])
    first, second = (body for _, path, body, _ in server.requests if "/points" in path)
    assert first == second and first["points"][0]["id"] == record(1).id


def test_api_key_is_sent(server: MisbehavingServer, pauses: list[float]) -> None:
    open_store(server, pauses).count()
    assert {headers.get("api-key") for *_, headers in server.requests} == {"the key"}


def test_candidates_and_exact_searches_reach_the_server(server: MisbehavingServer, pauses: list[float]) -> None:
    store = open_store(server, pauses)
    server.requests.clear()
    vector = record(1).vector
    store.query_batch([VectorQuery(vector, 3), VectorQuery(vector, 3, ef=32), VectorQuery(vector, 3, exact=True)])
    (body,) = (body for _, path, body, _ in server.requests if path.endswith("/points/query/batch"))
    params = [search["params"] for search in body["searches"]]
    assert [one.get("hnsw_ef") for one in params] == [None, 32, None]
    assert [one.get("exact") for one in params] == [False, False, True]


def test_new_collection_has_the_requested_layout(server: MisbehavingServer, pauses: list[float]) -> None:
    created = ("PUT", "/collections/shop")
    server.client.delete_collection("shop")
    open_store(server, pauses, shards=3, replicas=2, quantization="scalar", on_disk=True)
    (body,) = (body for verb, path, body, _ in server.requests if (verb, path) == created)
    assert (body["shard_number"], body["replication_factor"]) == (3, 2)
    assert body["quantization_config"] == {"scalar": {"type": "int8", "always_ram": True}}
    assert body["vectors"] == {"image": {"size": DIM, "distance": "Dot", "on_disk": True}}
    server.requests.clear()
    server.client.delete_collection("shop")
    open_store(server, pauses)
    (body,) = (body for verb, path, body, _ in server.requests if (verb, path) == created)
    assert not {"shard_number", "replication_factor", "quantization_config"} & body.keys()


@pytest.mark.parametrize("quantization", [*connection.QUANTIZATIONS])
def test_each_quantization_is_supported_by_the_client(quantization: str) -> None:
    (name,) = ServerOptions(quantization=quantization).collection_parameters()["quantization_config"].model_dump()
    assert name == quantization


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": 0.5}, "timeout=0.5"),
        ({"retries": -1}, "retries=-1"),
        ({"shards": 0}, "shards=0"),
        ({"replicas": True}, "replicas=True"),
        ({"quantization": "int4"}, "scalar, binary, product"),
        ({"ca": "nowhere.pem"}, "no such file"),
        ({"ca": __file__, "grpc": True}, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
    ],
)
def test_options_are_validated(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ServerOptions(**options)


def test_grpc_is_used_if_requested(server: MisbehavingServer, pauses: list[float]) -> None:
    """No server listens on that port, so the channel fails after all retries."""
    with pytest.raises(StoreError, match=r"(?s)Qdrant server failed.*(UNAVAILABLE|failed to connect|refused)"):
        open_store(server, pauses, grpc=True, grpc_port=9, timeout=1, retries=2)
    assert len(pauses) == 2 and server.requests == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_with_a_private_certificate_authority(tmp_path: Path, pauses: list[float]) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-out", certificate, "-keyout", key], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = MisbehavingServer()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    url = f"https://127.0.0.1:{secure.server_port}"
    options = ServerOptions(ca=certificate)
    assert ServerStore(connection.connect(url, options), "shop", DIM, "aaaa", options).count() == 0
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        ServerStore(connection.connect(url, ServerOptions(), sleep=pauses.append), "shop", DIM, "aaaa")
    assert pauses == [], "an invalid certificate is not transient"
    secure.stop()


def test_catalog_applies_the_options(tmp_path: Path, server: MisbehavingServer) -> None:
    from support.toy_bundle import make_toy_bundle

    from unidiff_sdk import Catalog

    bundle = make_toy_bundle(tmp_path / "bundle")
    server.faults = [503]
    options = ServerOptions(retries=1)
    with Catalog(server.url, bundle, images=tmp_path / "images", api_key="the key", server=options) as catalog:
        assert catalog.count() == 0
        server.faults = [503, 503]
        with pytest.raises(StoreError, match="503"):
            catalog.count()
    assert server.faults == [] and {headers.get("api-key") for *_, headers in server.requests} == {"the key"}


def test_collection_of_another_bundle_is_refused() -> None:
    client = QdrantClient(":memory:")
    ServerStore(client, "shop", DIM, "aaaa")
    ServerStore(client, "shop", DIM, "aaaa")
    with pytest.raises(StoreError, match="another bundle"):
        ServerStore(client, "shop", DIM, "bbbb")
    client.create_collection("theirs", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.DOT))
    with pytest.raises(StoreError, match="not made by UniDiff"):
        ServerStore(client, "theirs", DIM, "aaaa")


def test_unreachable_server_is_a_store_error() -> None:
    client = QdrantClient("http://127.0.0.1:9", check_compatibility=False)
    with pytest.raises(StoreError, match="Qdrant server"):
        ServerStore(client, "shop", DIM, "aaaa")
