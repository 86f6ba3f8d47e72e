"""The server path, against a loopback HTTP shim that fails, is slow, asks for patience and records what it is asked.

The contract of the store itself runs over qdrant-client's local mode and, where QDRANT_URL names one, over a real
server (`backends`, `test_store`, `test_filters`). Only a real server could show: that shards, replicas and
quantization do what the collection was created with; that searches are right while its optimizer runs; how it behaves
when a node of a cluster goes away in mid-request; gRPC beyond the choice of the channel; 16 threads on one client;
throughput.
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
from support.backends import DIM, record

from unidiff_sdk import OptionError, ServerOptions, StoreError
from unidiff_sdk.store.server import connection
from unidiff_sdk.store.server.store import ServerStore

INFO = {
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
        "metadata": {"unidiff": {"fingerprint": "aaaa"}},
    },
    "payload_schema": {},
}


class Shim(ThreadingHTTPServer):
    """Answers as a Qdrant server with one collection of 7 points; `trouble` comes first, one item a request.

    An item is an HTTP status, (status, Retry-After), "reset" (the connection is cut) or a number of seconds to wait.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.exists = True
        self.trouble: list[Any] = []
        self.asked: list[tuple[str, str, Any, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that the tests cut are no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Shim

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(
            (
                self.command,
                self.path,
                json.loads(body) if body else None,
                {k.lower(): v for k, v in self.headers.items()},
            )
        )
        if self.server.trouble:
            trouble = self.server.trouble.pop(0)
            if trouble == "reset":
                self.connection.close()
                return
            if isinstance(trouble, float):
                time.sleep(trouble)
            else:
                status, after = trouble if isinstance(trouble, tuple) else (trouble, None)
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
            result = INFO
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
def shim() -> Iterator[Shim]:
    server = Shim()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which are not slept."""
    taken: list[float] = []

    class Clock:
        sleep = staticmethod(taken.append)

    monkeypatch.setattr(connection, "time", Clock)
    return taken


def store_of(shim: Shim, **options: Any) -> ServerStore:
    given = ServerOptions(**options)
    return ServerStore(connection.connect(shim.url, given, "the key"), "shop", DIM, "aaaa", given)


@pytest.mark.parametrize("trouble", [[503], ["reset"], [502, "reset", 504], [(429, 3)]])
def test_what_passes_is_tried_again(shim: Shim, pauses: list[float], trouble: list[Any]) -> None:
    store = store_of(shim)
    shim.trouble = list(trouble)
    assert store.count() == 7
    assert len(pauses) == len(trouble)
    if trouble == [(429, 3)]:
        assert pauses == [3]


def test_pauses_double_and_are_capped(shim: Shim, pauses: list[float]) -> None:
    store = store_of(shim, retries=9)
    shim.trouble = [503] * 9
    assert store.count() == 7
    for attempt, pause in enumerate(pauses):
        full = min(connection.LONGEST_PAUSE, connection.FIRST_PAUSE * 2**attempt)
        assert full / 2 <= pause <= full


def test_in_the_end_it_is_an_error(shim: Shim, pauses: list[float]) -> None:
    store = store_of(shim, retries=2)
    shim.trouble = [503] * 3
    before = len(shim.asked)
    with pytest.raises(StoreError, match=r"(?s)Qdrant server failed.*503"):
        store.count()
    assert len(shim.asked) - before == 3
    assert store.count() == 7


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_what_does_not_pass_is_told_at_once(shim: Shim, pauses: list[float], status: int) -> None:
    store = store_of(shim)
    shim.trouble = [status]
    with pytest.raises(StoreError, match=str(status)):
        store.count()
    assert pauses == []


def test_a_slow_server_is_given_up_and_asked_again(shim: Shim, pauses: list[float]) -> None:
    store = store_of(shim, timeout=1, retries=1)
    shim.trouble = [2.5]
    started = time.perf_counter()
    assert store.count() == 7
    assert 0.9 < time.perf_counter() - started < 2.4
    assert len(pauses) == 1
    shim.trouble = [2.5, 2.5]
    with pytest.raises(StoreError, match="timed out"):
        store.count()


def test_an_upload_that_was_lost_is_repeated_under_the_same_ids(shim: Shim, pauses: list[float]) -> None:
    store = store_of(shim)
    shim.asked.clear()
    shim.trouble = ["reset"]
    store.upsert([record(1, colour="red")])
    first, second = (body for _, path, body, _ in shim.asked if "/points" in path)
    assert first == second and first["points"][0]["id"] == record(1).id


def test_the_key_is_sent(shim: Shim) -> None:
    store_of(shim).count()
    assert {headers.get("api-key") for *_, headers in shim.asked} == {"the key"}


def test_a_new_collection_is_laid_out_as_told(shim: Shim) -> None:
    shim.exists = False
    store_of(shim, shards=3, replicas=2, quantization="scalar", on_disk=True)
    (body,) = (body for verb, path, body, _ in shim.asked if verb == "PUT" and path.startswith("/collections/shop"))
    assert (body["shard_number"], body["replication_factor"]) == (3, 2)
    assert body["quantization_config"] == {"scalar": {"type": "int8", "always_ram": True}}
    assert body["vectors"] == {"image": {"size": DIM, "distance": "Dot", "on_disk": True}}
    shim.asked.clear()
    store_of(shim)
    (body,) = (body for verb, path, body, _ in shim.asked if verb == "PUT" and path.startswith("/collections/shop"))
    assert not {"shard_number", "replication_factor", "quantization_config"} & body.keys()


@pytest.mark.parametrize("quantization", [*connection.QUANTIZATIONS])
def test_each_quantization_is_one_that_the_client_knows(quantization: str) -> None:
    (name,) = ServerOptions(quantization=quantization).layout()["quantization_config"].model_dump()
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
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ServerOptions(**options)


def test_grpc_is_taken_where_asked_for(shim: Shim, pauses: list[float]) -> None:
    """Nothing listens on that port: the failure is the channel's, after all retries, in one sentence."""
    with pytest.raises(StoreError, match=r"(?s)Qdrant server failed.*(UNAVAILABLE|failed to connect|refused)"):
        store_of(shim, grpc=True, grpc_port=9, timeout=1, retries=2)
    assert len(pauses) == 2 and shim.asked == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_with_an_authority_of_ones_own(tmp_path: Path, shim: Shim, pauses: list[float]) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-out", certificate, "-keyout", key], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = Shim()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    url = f"https://127.0.0.1:{secure.server_port}"
    options = ServerOptions(ca=certificate)
    assert ServerStore(connection.connect(url, options), "shop", DIM, "aaaa", options).count() == 7
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        ServerStore(connection.connect(url, ServerOptions()), "shop", DIM, "aaaa")
    assert pauses == [], "a certificate does not become valid by waiting"
    secure.shutdown()


def test_the_catalog_takes_the_options(
    tmp_path: Path, shim: Shim, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.toy_bundle import make_toy_bundle

    from unidiff_sdk import Bundle, Catalog

    bundle = make_toy_bundle(tmp_path / "bundle")
    monkeypatch.setitem(INFO["config"]["metadata"]["unidiff"], "fingerprint", Bundle.open(bundle).fingerprint)  # type: ignore[index]
    shim.trouble = [503]
    options = ServerOptions(retries=1)
    with Catalog(shim.url, bundle, images=tmp_path / "pictures", api_key="the key", server=options) as catalog:
        assert len(pauses) == 1
        assert catalog.count() == 7
        shim.trouble = [503, 503]
        with pytest.raises(StoreError, match="503"):
            catalog.count()
