"""`ServerStore` against a local HTTP server that fails, is slow, requests pauses and records its requests.

The contract of the store runs over qdrant-client's local mode and, if QDRANT_URL is set, over a real server
(`backends`, `test_contract`, `test_filters`). Only a real server can show that shards, replicas and quantization have
an effect, that searches are correct while its optimizer runs, what happens when a node of a cluster stops during a
request, gRPC beyond the choice of the channel, 16 threads on one client, and throughput.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models
from support.backends import DIM, record

from unidiff_sdk import OptionError, ServerOptions, StoreError
from unidiff_sdk.store.server import connection
from unidiff_sdk.store.server.store import ServerStore

INFO: dict[str, Any] = {
    "status": "green",
    "optimizer_status": "ok",
    "segments_count": 1,
    "points_count": 7,
    "config": {
        "params": {"vectors": {"image": {"size": DIM, "distance": "Dot"}}, "shard_number": 1},
        "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
        "optimizer_config": {
            "deleted_threshold": 0.2,
            "vacuum_min_vector_number": 1000,
            "default_segment_number": 0,
            "flush_interval_sec": 5,
        },
    },
    "payload_schema": {},
}


class FakeServer(ThreadingHTTPServer):
    """Responds like a Qdrant server with one collection of 7 points.

    Each request first takes one item of `failures`: an HTTP status, (status, Retry-After), "reset" (closes the
    connection) or a delay in seconds.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.exists = True
        self.failures: list[Any] = []
        self.fingerprint = "aaaa"
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not print the errors of connections that the tests close."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(
            (
                self.command,
                self.path,
                json.loads(body) if body else None,
                {k.lower(): v for k, v in self.headers.items()},
            )
        )
        if self.server.failures:
            failure = self.server.failures.pop(0)
            if failure == "reset":
                self.connection.close()
                return
            if isinstance(failure, float):
                time.sleep(failure)
            else:
                status, after = failure if isinstance(failure, tuple) else (failure, None)
                self._answer(status, {"status": {"error": "not now"}}, after)
                return
        path = self.path.split("?")[0]
        result: Any = True
        if path.endswith("/exists"):
            result = {"exists": self.server.exists}
        elif path.endswith("/count"):
            result = {"count": 7}
        elif path.endswith("/points"):
            result = {"operation_id": 1, "status": "completed"}
        elif self.command == "GET":
            result = INFO | {
                "config": INFO["config"] | {"metadata": {"unidiff": {"fingerprint": self.server.fingerprint}}}
            }
        self._answer(200, {"result": result, "status": "ok", "time": 0.0})

    do_POST = do_PUT = do_GET

    def _answer(self, status: int, content: Any, after: int | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if after is not None:
            self.send_header("Retry-After", str(after))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pauses() -> list[float]:
    """The pauses between two attempts, in seconds. The tests do not wait for them."""
    return []


def open_store(server: FakeServer, pauses: list[float], **options: Any) -> ServerStore:
    given = ServerOptions(**options)
    client = connection.connect(server.url, given, "the key", sleep=pauses.append)
    return ServerStore(client, "shop", DIM, "aaaa", given)


@pytest.mark.parametrize("failures", [[503], ["reset"], [502, "reset", 504], [(429, 3)]])
def test_transient_failures_are_retried(server: FakeServer, pauses: list[float], failures: list[Any]) -> None:
    store = open_store(server, pauses)
    server.failures = list(failures)
    assert store.count() == 7
    assert len(pauses) == len(failures)
    if failures == [(429, 3)]:
        assert pauses == [3]


def test_pauses_double_up_to_a_maximum(server: FakeServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, retries=9)
    server.failures = [503] * 9
    assert store.count() == 7
    for attempt, pause in enumerate(pauses):
        full = min(connection.MAX_BACKOFF, connection.INITIAL_BACKOFF * 2**attempt)
        assert full / 2 <= pause <= full


def test_last_failure_is_raised(server: FakeServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, retries=2)
    server.failures = [503] * 3
    before = len(server.requests)
    with pytest.raises(StoreError, match=r"(?s)Qdrant server failed.*503"):
        store.count()
    assert len(server.requests) - before == 3
    assert store.count() == 7


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_permanent_failures_are_not_retried(server: FakeServer, pauses: list[float], status: int) -> None:
    store = open_store(server, pauses)
    server.failures = [status]
    with pytest.raises(StoreError, match=str(status)):
        store.count()
    assert pauses == []


def test_timed_out_request_is_retried(server: FakeServer, pauses: list[float]) -> None:
    store = open_store(server, pauses, timeout=1, retries=1)
    server.failures = [2.5]
    started = time.perf_counter()
    assert store.count() == 7
    assert 0.9 < time.perf_counter() - started < 2.4
    assert len(pauses) == 1
    server.failures = [2.5, 2.5]
    with pytest.raises(StoreError, match="timed out"):
        store.count()


def test_lost_upsert_is_repeated_with_the_same_ids(server: FakeServer, pauses: list[float]) -> None:
    store = open_store(server, pauses)
    server.requests.clear()
    server.failures = ["reset"]
    store.upsert([record(1, color="red")])
    first, second = (body for _, path, body, _ in server.requests if "/points" in path)
    assert first == second and first["points"][0]["id"] == record(1).id


def test_api_key_is_sent(server: FakeServer, pauses: list[float]) -> None:
    open_store(server, pauses).count()
    assert {headers.get("api-key") for *_, headers in server.requests} == {"the key"}


def test_new_collection_has_the_requested_layout(server: FakeServer, pauses: list[float]) -> None:
    created = ("PUT", "/collections/shop")
    server.exists = False
    open_store(server, pauses, shards=3, replicas=2, quantization="scalar", on_disk=True)
    (body,) = (body for verb, path, body, _ in server.requests if (verb, path.split("?")[0]) == created)
    assert (body["shard_number"], body["replication_factor"]) == (3, 2)
    assert body["quantization_config"] == {"scalar": {"type": "int8", "always_ram": True}}
    assert body["vectors"] == {"image": {"size": DIM, "distance": "Dot", "on_disk": True}}
    server.requests.clear()
    open_store(server, pauses)
    (body,) = (body for verb, path, body, _ in server.requests if (verb, path.split("?")[0]) == created)
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


def test_grpc_is_used_if_requested(server: FakeServer, pauses: list[float]) -> None:
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
    secure = FakeServer()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    url = f"https://127.0.0.1:{secure.server_port}"
    options = ServerOptions(ca=certificate)
    assert ServerStore(connection.connect(url, options), "shop", DIM, "aaaa", options).count() == 7
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        ServerStore(connection.connect(url, ServerOptions(), sleep=pauses.append), "shop", DIM, "aaaa")
    assert pauses == [], "an invalid certificate is not transient"
    secure.shutdown()


def test_catalog_applies_the_options(tmp_path: Path, server: FakeServer) -> None:
    from support.toy_bundle import make_toy_bundle

    from unidiff_sdk import Bundle, Catalog

    bundle = make_toy_bundle(tmp_path / "bundle")
    server.fingerprint = Bundle.open(bundle).fingerprint
    server.failures = [503]
    options = ServerOptions(retries=1)
    with Catalog(server.url, bundle, images=tmp_path / "images", api_key="the key", server=options) as catalog:
        assert catalog.count() == 7
        server.failures = [503, 503]
        with pytest.raises(StoreError, match="503"):
            catalog.count()
    assert server.failures == [] and {headers.get("api-key") for *_, headers in server.requests} == {"the key"}


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
