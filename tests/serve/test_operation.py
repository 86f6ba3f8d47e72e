"""Keys, limits, headers and logs; and the command on a real socket."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.misbehaving_server import MisbehavingServer

from unidiff_sdk import Catalog
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.cli.main import main
from unidiff_sdk.cli.servers.serve import _free_port
from unidiff_sdk.errors import OptionError
from unidiff_sdk.serve import ServerSettings, create_app
from unidiff_sdk.serve.limits import RateLimit
from unidiff_sdk.serve.settings import ApiKeys
from unidiff_sdk.serve.transport.protocol import TimedProtocol

READ, WRITE = "reading-key-0123456789", "writing-key-0123456789"
QUERY = {"text": "boots", "limit": 1}


@contextmanager
def served(catalog: Catalog, **options: object) -> Iterator[TestClient]:
    with TestClient(create_app(catalog, ServerSettings(**options)), raise_server_exceptions=False) as client:
        yield client


def test_keys_allow_reading_or_writing(catalog: Catalog) -> None:
    with served(catalog, keys=ApiKeys({READ: "read", WRITE: "write"}), allow_writes=True) as client:
        for headers, search, change in (
            ({}, 401, 401),
            ({"Authorization": "Bearer wrong-key-0123456789"}, 401, 401),
            ({"Authorization": f"Basic {READ}"}, 401, 401),
            ({"Authorization": f"Bearer {READ}"}, 200, 403),
            ({"X-Api-Key": READ}, 200, 403),
            ({"Authorization": f"bearer {WRITE}"}, 200, 404),
        ):
            assert client.post("/v1/search", json=QUERY, headers=headers).status_code == search
            assert client.delete("/v1/items/nothing", headers=headers).status_code == change
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == client.get("/").status_code == 200  # the page asks for the key
        assert client.post("/v1/search", json=QUERY).headers["www-authenticate"] == "Bearer"


def test_writing_is_off_by_default(catalog: Catalog) -> None:
    with served(catalog) as client:
        for method, path in (("POST", "/v1/items"), ("PATCH", "/v1/items/x"), ("DELETE", "/v1/items/x")):
            assert client.request(method, path, json={}).status_code == 403
        assert client.get("/v1/info").json()["writes"] is False
    with served(catalog, keys=ApiKeys({WRITE: "write"})) as client:
        assert client.delete("/v1/items/x", headers={"X-Api-Key": WRITE}).status_code == 403


def test_only_hashes_of_keys_are_kept(tmp_path: Path) -> None:
    keys = ApiKeys({READ: "read"})
    assert READ not in repr(vars(keys)) and READ not in repr(ServerSettings(keys=keys))
    file = tmp_path / "keys.txt"
    file.write_text(f"# ours\nread {hashlib.sha256(READ.encode()).hexdigest()}  # shop\n\n")
    assert ApiKeys.read(file).access_of(READ)[0] == "read" and ApiKeys.read(file).access_of(WRITE) is None
    for content in ("read secret", "admin " + "0" * 64, "read " + "0" * 63, "read " + "A" * 64):
        file.write_text(content)
        with pytest.raises(OptionError, match="line 1"):
            ApiKeys.read(file)
    for key in ("short", "with space 0123456789", "non-äscii-0123456789"):
        with pytest.raises(OptionError, match="printable ASCII"):
            ApiKeys({key: "read"})


@pytest.mark.parametrize("content", ["", "# none yet\n\n"])
def test_a_file_without_keys_is_not_a_server_without_keys(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.txt").write_text(content)
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "shop"), "--api-keys", str(tmp_path / "keys.txt")])
    assert result.exit_code == 2 and "there is no key in it" in result.stderr


@pytest.mark.parametrize("name", ["UNIDIFF_API_KEY", "UNIDIFF_READ_API_KEY"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_not_a_server_without_keys(tmp_path: Path, name: str, value: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "shop")], env={name: value})
    assert result.exit_code == 2 and f"{name} is empty" in result.stderr


def test_keys_and_rates_are_checked_before_bodies(catalog: Catalog) -> None:
    """FastAPI reads and parses the body of a route before its dependencies run: with wrong bodies, that is visible."""
    paths = ("search", "generate", "images/generations", "images/edits", "embeddings", "items")
    header = {"Content-Type": "application/json"}
    with served(catalog, keys=ApiKeys({READ: "read"}), allow_writes=True) as client:
        for path in paths:
            assert client.post(f"/v1/{path}", content=b"{", headers=header).status_code == 401
        for method, path in (("PATCH", "items/x"), ("DELETE", "items")):
            for headers, status in ((header, 401), (header | {"X-Api-Key": READ}, 403)):
                assert client.request(method, f"/v1/{path}", content=b"{", headers=headers).status_code == status
    with served(catalog, rate=0.5) as client:
        statuses = [client.post("/v1/generate", content=b"{", headers=header).status_code for _ in range(2)]
        assert statuses == [422, 429]


def test_what_a_key_may_do_is_said_for_that_key(catalog: Catalog) -> None:
    with served(catalog, keys=ApiKeys({READ: "read", WRITE: "write"}), allow_writes=True) as client:
        for key, may_write in ((READ, False), (WRITE, True)):
            assert client.get("/v1/info", headers={"X-Api-Key": key}).json()["writes"] is may_write


def test_unknown_methods_share_one_metric(catalog: Catalog) -> None:
    with served(catalog) as client:
        before = client.get("/metrics").text
        for number in range(50):
            assert client.request(f"ODD{number}", "/v1/search").status_code == 405
        added = client.get("/metrics").text
        assert "ODD" not in added and 'unidiff_requests_total{method="other"' in added
        assert len(added.splitlines()) - len(before.splitlines()) < 60


def test_allowed_hosts_are_compared_as_names(catalog: Catalog) -> None:
    with served(catalog, hosts=("Shop.Example:8443",)) as client:
        for host, status in (("shop.example", 200), ("SHOP.example:80", 200), ("other.example", 421)):
            assert client.get("/v1/columns", headers={"Host": host}).status_code == status


def test_searches_for_duplicates_keep_their_place_until_they_end(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can stop them. If their places became free after 504, they could take every thread that searches use."""
    finished = threading.Event()

    async def slow(*args: object, **options: object) -> list[object]:
        await in_thread(lambda: finished.wait(30))
        return []

    monkeypatch.setattr(type(catalog), "aduplicates", slow)
    with served(catalog, timeout=0.2) as client:
        statuses = [client.get("/v1/duplicates").status_code for _ in range(3)]
        assert statuses == [504, 504, 429]
        assert client.post("/v1/search", json=QUERY).status_code == 200
        finished.set()
        deadline = time.monotonic() + 30
        while client.get("/v1/duplicates").status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.get("/v1/duplicates").status_code == 200


@given(st.floats(0.1, 50), st.lists(st.floats(0, 3), max_size=60))
def test_the_rate_limit_holds_over_any_span(rate: float, pauses: list[float]) -> None:
    """Against the definition: within any span of t seconds at most burst + rate * t requests are allowed."""
    now, allowed = 0.0, []
    limit = RateLimit(rate, lambda: now)
    for pause in pauses:
        now += pause
        wait = limit.wait("caller")
        if wait == 0:
            allowed.append(now)
        else:
            assert 0 < wait <= 1 / rate + 1e-9
    burst = max(1.0, 2 * rate)
    for first in range(len(allowed)):
        for last in range(first, len(allowed)):
            assert last - first + 1 <= burst + rate * (allowed[last] - allowed[first]) + 1e-6


def test_rates_are_limited_for_each_key(catalog: Catalog) -> None:
    with served(catalog, keys=ApiKeys({READ: "read", WRITE: "write"}), rate=0.5) as client:
        statuses = [client.get("/v1/columns", headers={"X-Api-Key": READ}).status_code for _ in range(3)]
        assert statuses == [200, 429, 429]
        assert client.get("/v1/columns", headers={"X-Api-Key": WRITE}).status_code == 200
        refused = client.get("/v1/columns", headers={"X-Api-Key": READ})
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["status"] == 429


def test_large_bodies_are_refused(catalog: Catalog) -> None:
    with served(catalog, max_body=10_000) as client:
        large = {"text": "x" * 20_000}
        data = json.dumps(large).encode()
        for path, body in (("search", data), ("search", iter([data])), ("generate", iter([data]))):  # length, chunks
            response = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 413 and response.json()["detail"] == "Send at most 10,000 bytes."
        assert client.post("/v1/search", json=QUERY).status_code == 200


def test_origins_and_security_headers(catalog: Catalog) -> None:
    with served(catalog, origins=("https://shop.example",)) as client:
        allowed = client.get("/v1/columns", headers={"Origin": "https://shop.example"})
        other = client.get("/v1/columns", headers={"Origin": "https://evil.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        assert "access-control-allow-origin" not in other.headers
        for path in ("/", "/v1/columns", "/nothing"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and headers["x-request-id"]
    for origin in ("*", "shop.example", "https://shop.example/", "javascript:x"):
        with pytest.raises(OptionError, match="is not an origin"):
            ServerSettings(origins=(origin,))


def test_logs_have_ids_but_no_texts(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unidiff_sdk.serve.access")
    secret = "a very private wish"
    with served(catalog) as client:
        client.post("/v1/search", json={"text": secret}, headers={"X-Request-Id": "abc-1"})
        client.post("/v1/search", json={"text": secret}, headers={"X-Request-Id": "bad id\t{}"})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert first["request_id"] == "abc-1" and first["status"] == 200 and first["route"] == "/v1/search"
    assert second["request_id"] != "bad id\t{}" and secret not in caplog.text
    caplog.clear()
    with served(catalog, log_texts=True) as client:
        client.post("/v1/search", json={"text": secret})
    assert json.loads(caplog.records[0].message)["text"] == secret


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("text", "image", "like", "vector", "weights", "limit", "where", "group_by", "prompt", "n", "items", "input")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/search", "/v1/items", "/v1/embeddings", "/v1/images/generations", "/v1/generate"]),
    body=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)
def test_malformed_bodies_are_client_errors(client: TestClient, path: str, body: object) -> None:
    if isinstance(body, dict):
        body.pop("prompt", None)  # a valid one generates
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 201, 404, 422), (response.status_code, response.text)
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_body": 0}, "max_body"),
        ({"timeout": 0}, "timeout"),
        ({"rate": -1}, "rate"),
        ({"max_generations": True}, "max_generations"),
    ],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ServerSettings(**options)


def test_the_command_serves_warns_and_ends(products: Path, tmp_path: Path) -> None:
    shop = tmp_path / "shop.catalog"
    with Catalog(shop) as catalog:
        catalog.add_folder(products)
    command = [sys.executable, "-m", "unidiff_sdk", "serve", str(shop), "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("Serving at http://0.0.0.0:"), process.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(line.split()[2].rpartition(":")[2]), timeout=60)
        connection.request("POST", "/v1/search", json.dumps(QUERY), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and len(json.loads(response.read())["hits"]) == 1
        assert response.getheader("server") is None
        connection.close()
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 20 and process.returncode in (0, 143, -signal.SIGTERM)
    assert "Warning: everyone who reaches 0.0.0.0" in err and '"route": "/v1/search"' in err


def test_the_command_reports_wrong_options(tmp_path: Path) -> None:
    for options, message in (
        (["--api-key", "short"], "printable ASCII"),
        (["--collection", "x"], "only for the URL"),
        (["--workers", "2"], "one process holds a catalog folder"),
        (["--origin", "shop"], "is not an origin"),
    ):
        result = CliRunner(catch_exceptions=False).invoke(main, ["serve", str(tmp_path), *options])
        assert result.exit_code == 2 and message in result.stderr
    done = subprocess.run(  # what is wrong with the catalog comes later, when the logs are set up for good
        [sys.executable, "-m", "unidiff_sdk", "serve", str(tmp_path / "nothing")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "There is no catalog" in done.stderr and "Traceback" not in done.stderr


def test_an_address_of_another_machine_is_reported() -> None:
    with pytest.raises(OptionError, match=r"--host 203\.0\.113\.1: cannot listen"):
        _free_port("203.0.113.1")


def test_a_page_of_another_origin_cannot_change_the_catalog(own_catalog: Catalog) -> None:
    files = {"image": own_catalog.browse(limit=1)[0].image_bytes()}
    form = {"items": json.dumps({"items": [{"id": "new", "image": ""}]})}
    with served(own_catalog, allow_writes=True, origins=("https://shop.example",)) as client:
        for origin, status in (("https://evil.example", 403), ("null", 403), ("http://[", 403)):
            response = client.post("/v1/items", data=form, files=files, headers={"Origin": origin})
            assert response.status_code == status and own_catalog.get("new") is None
        for headers in (
            {"Origin": "https://shop.example"},
            {"Origin": "http://testserver"},
            {"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"},  # behind a proxy
        ):
            response = client.post("/v1/items", data=form, files=files, headers=headers)
            assert response.status_code == 201 and own_catalog.delete("new")


def test_other_names_of_the_host_are_refused(catalog: Catalog) -> None:
    with served(catalog, hosts=("127.0.0.1", "[::1]")) as client:
        for host, status in (("127.0.0.1:8000", 200), ("[::1]:80", 200), ("[::1]", 200), ("evil.example:8000", 421)):
            assert client.get("/v1/columns", headers={"Host": host}).status_code == status


def test_the_size_of_generated_images_is_limited(client: TestClient) -> None:
    for path, size in (
        ("generate", {"width": 100_000}),
        ("generate", {"height": 1032}),
        ("images/generations", {"size": "64x1032"}),
    ):
        response = client.post(f"/v1/{path}", json={"prompt": "boots"} | size)
        assert response.status_code == 422 and "up to 1,024 pixels" in response.json()["detail"]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"prompt": "x", "n": "many"}, "n: "),
        ({"n": "1"}, "prompt: "),
        ({"prompt": "x", "strength": "big"}, "strength"),
        ({"prompt": "x", "unknown": "b"}, "'unknown'"),
    ],
)
def test_malformed_edits_are_client_errors(client: TestClient, form: dict[str, str], named: str) -> None:
    response = client.post("/v1/images/edits", data=form, files={"image": b"no image"})
    assert response.status_code == 422 and named in response.json()["detail"]


@contextmanager
def listening(catalog: Catalog, protocol: type, **options: object) -> Iterator[int]:
    """Serve a catalog on a socket, and give its port."""
    app = create_app(catalog, ServerSettings(**options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


class HastyProtocol(TimedProtocol):
    HEADER_SECONDS = 0.3


def answer_to(port: int, *parts: bytes, pause: float = 0.1) -> bytes:
    """All that the server answers until it closes the connection, to a client that sends slowly."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            answer = b""
            while received := connection.recv(65536):
                answer += received
        except (BrokenPipeError, ConnectionResetError):
            return b"closed"
        return answer


def test_slow_and_silent_clients_are_disconnected(catalog: Catalog) -> None:
    line = b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with listening(catalog, HastyProtocol, timeout=1.0) as port:
        for parts in ((), (b"GET / HTTP/1.1\r\n",), (b"G", b"E", b"T", b" ", b"/")):
            assert answer_to(port, *parts)[:12] in (b"HTTP/1.1 408", b"closed")
        first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        assert answer_to(port, first, b"GET /healthz HTTP/1.1\r\n").count(b"HTTP/1.1 200") == 1
        for path in (b"search", b"generate"):
            sent = line.replace(b"search", path) + b"Content-Length: 100\r\n\r\n"
            assert answer_to(port, sent, *[b"x"] * 3).startswith(b"HTTP/1.1 408")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(2):  # a connection in use is not closed
            connection.request("POST", "/v1/search", json.dumps(QUERY), {"Content-Type": "application/json"})
            assert connection.getresponse().read().startswith(b'{"hits"')
            time.sleep(0.4)
        connection.close()


def test_bodies_of_all_requests_together_are_limited(catalog: Catalog) -> None:
    """Forty clients start to send bodies of the largest size, and none ends it."""
    size = 100_000
    head = b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size
    with listening(catalog, TimedProtocol, max_body=size, timeout=5.0) as port, ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(40)]
        for connection in connections:
            connection.sendall(head + b"x" * (size - 1))
        refused = connections[-1].recv(65536)
        assert refused.startswith(b"HTTP/1.1 429") and b"retry-after" in refused
        assert len(answer_to(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))


@pytest.mark.slow
def test_several_processes_serve_a_qdrant_server(products: Path, tmp_path: Path) -> None:
    server = MisbehavingServer()
    try:
        with Catalog(server.url, images=tmp_path / "images", collection="shop") as catalog:
            catalog.add_folder(products)
        keys = tmp_path / "keys.txt"
        keys.write_text(f"write {hashlib.sha256(WRITE.encode()).hexdigest()}\n")
        command = [sys.executable, "-m", "unidiff_sdk", "serve", server.url, "--workers", "2", "--port", "0"]
        options = ["--image-store", tmp_path / "images", "--collection", "shop", "--api-keys", keys, "--allow-writes"]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert " with 2 processes" in line, process.stderr.read()
            answers = [ask(int(line.split()[2].rpartition(":")[2]), key) for key in (WRITE, READ)]
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        assert answers == [200, 401], err
        assert process.returncode in (0, 143, -signal.SIGTERM) and WRITE not in err
    finally:
        server.stop()


def ask(port: int, key: str) -> int:
    """The status of a search, for which the processes may still have to start."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(
                "POST", "/v1/search", json.dumps(QUERY), {"X-Api-Key": key, "Content-Type": "application/json"}
            )
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        finally:
            connection.close()
