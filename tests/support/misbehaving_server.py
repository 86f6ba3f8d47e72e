"""A Qdrant server on the loopback interface that stores points and fails as a test requests.

The points are in qdrant-client's local mode, so that a test can compare what was acknowledged with what is stored.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from qdrant_client import QdrantClient, models

__all__ = ["MisbehavingServer", "Request"]

HTML = b"<html><body><h1>It works!</h1></body></html>"
TRICKLE_SECONDS = 0.2  # between two bytes


class Request(NamedTuple):
    """A request as it arrived: method, path, parsed JSON body, headers with lowercase names."""

    method: str
    path: str
    body: Any
    headers: dict[str, str]


class MisbehavingServer(ThreadingHTTPServer):
    """Responds as a Qdrant server. Each request first takes one fault.

    | Fault | Effect |
    |---|---|
    | None | a correct response |
    | an int, or (int, Retry-After) | this HTTP status |
    | a float | a correct response after this number of seconds |
    | "reset" | the connection is reset; nothing is done |
    | "lost" | the request is carried out, then the connection is reset |
    | "html", "null", "not json" | status 200 with a body of this kind; nothing is done |
    | "truncated" | the first half of a correct response |
    | "trickle", "trickle head" | one byte every 0.2 s of the body, or of the status line and headers |
    | "endless" | a body that does not end |
    | a function | a correct response, with `result` replaced by the return value of the function on it |

    Attributes:
        client: the local client that holds the points.
        faults: the faults of the next requests, in order. After these, `choose` decides.
        choose: returns the fault of a request.
        requests: all requests so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.client = QdrantClient(":memory:")
        self.lock = threading.Lock()  # the local mode is for one thread
        self.faults: list[Any] = []
        self.choose: Callable[[Request], Any] = lambda request: None
        self.requests: list[Request] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Stop the server."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not print the errors of connections that a client or a fault closes."""


class _Handler(BaseHTTPRequestHandler):
    server: MisbehavingServer
    protocol_version = "HTTP/1.1"

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path.split("?")[0], json.loads(body) if body else None, headers)
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.faults.pop(0) if self.server.faults else self.server.choose(request)
        match fault:
            case None:
                self._send(*self._carry_out(request))
            case int():
                self._send(fault, {"status": {"error": "not now"}})
            case (int(), after):
                self._send(fault[0], {"status": {"error": "not now"}}, {"Retry-After": str(after)})
            case float():
                time.sleep(fault)
                self._send(*self._carry_out(request))
            case "reset":
                self._reset()
            case "lost":
                self._carry_out(request)
                self._reset()
            case "html":
                self._send_bytes(200, HTML, {"Content-Type": "text/html"})
            case "null":
                self._send(200, None)
            case "not json":
                self._send_bytes(200, b'{"result": [')
            case "truncated" | "trickle" | "trickle head" | "endless":
                self._send_slowly(fault, json.dumps(self._carry_out(request)[1]).encode())
            case _:
                status, content = self._carry_out(request)
                self._send(status, {**content, "result": fault(content.get("result"))})

    do_GET = do_POST = do_PUT = do_DELETE = _respond

    def _carry_out(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Status and JSON content of the correct response."""
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                with self.server.lock, warnings.catch_warnings(action="ignore"):
                    try:
                        result = action(self.server.client, request.body or {}, *found.groups())
                    except ValueError as error:
                        return 404, {"status": {"error": str(error)}}
                return 200, {"result": _plain(result), "status": "ok", "time": 0.0}
        return 404, {"status": {"error": f"{request.method} {request.path}"}}

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_slowly(self, fault: str, data: bytes) -> None:
        """Part of a response, a slow one, or one without an end. The connection is closed after it."""
        self.close_connection = True
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
        if fault == "truncated":
            self.wfile.write(head + data[: len(data) // 2])
        elif fault == "endless":
            self.wfile.write(head.replace(b"%d" % len(data), b"%d" % (1 << 60)))
            while True:
                self.wfile.write(b" " * (1 << 20))
        else:
            at_once, slow = (head, data) if fault == "trickle" else (b"", head + data)
            self.wfile.write(at_once)
            for byte in slow:
                self.wfile.write(bytes([byte]))
                time.sleep(TRICKLE_SECONDS)

    def _reset(self) -> None:
        """Close the connection with a TCP reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def _plain(value: Any) -> Any:
    """A result as JSON values."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _create(client: QdrantClient, body: Any, name: str) -> bool:
    vectors = {key: models.VectorParams.model_validate(value) for key, value in body["vectors"].items()}
    return client.create_collection(name, vectors_config=vectors, metadata=body.get("metadata"))


def _upsert(client: QdrantClient, body: Any, name: str) -> Any:
    return client.upsert(name, [models.PointStruct.model_validate(point) for point in body["points"]])


def _delete(client: QdrantClient, body: Any, name: str) -> Any:
    return client.delete(name, models.PointIdsList(points=body["points"]))


def _retrieve(client: QdrantClient, body: Any, name: str) -> Any:
    return client.retrieve(name, body["ids"], with_payload=True, with_vectors=True)


def _scroll(client: QdrantClient, body: Any, name: str) -> Any:
    points, following = client.scroll(
        name,
        _filter(body.get("filter")),
        limit=body["limit"],
        offset=body.get("offset"),
        with_payload=True,
        with_vectors=True,
    )
    return {"points": _plain(points), "next_page_offset": following}


def _query(client: QdrantClient, body: Any, name: str) -> Any:
    return client.query_batch_points(name, [models.QueryRequest.model_validate(body)])[0]


def _query_batch(client: QdrantClient, body: Any, name: str) -> Any:
    return client.query_batch_points(name, [models.QueryRequest.model_validate(search) for search in body["searches"]])


def _count(client: QdrantClient, body: Any, name: str) -> Any:
    return client.count(name, _filter(body.get("filter")))


def _facet(client: QdrantClient, body: Any, name: str) -> Any:
    return client.facet(name, body["key"], _filter(body.get("filter")), limit=body["limit"])


def _index(client: QdrantClient, body: Any, name: str, *_: str) -> Any:
    return models.UpdateResult(operation_id=1, status=models.UpdateStatus.COMPLETED)  # the local mode has none


def _filter(content: Any) -> models.Filter | None:
    return None if content is None else models.Filter.model_validate(content)


_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/collections/([^/]+)/exists", lambda client, body, name: {"exists": client.collection_exists(name)}),
    ("GET", "/collections/([^/]+)", lambda client, body, name: client.get_collection(name)),
    ("PUT", "/collections/([^/]+)", _create),
    ("PUT", "/collections/([^/]+)/points", _upsert),
    ("POST", "/collections/([^/]+)/points", _retrieve),
    ("POST", "/collections/([^/]+)/points/delete", _delete),
    ("POST", "/collections/([^/]+)/points/scroll", _scroll),
    ("POST", "/collections/([^/]+)/points/query", _query),
    ("POST", "/collections/([^/]+)/points/query/batch", _query_batch),
    ("POST", "/collections/([^/]+)/points/count", _count),
    ("POST", "/collections/([^/]+)/facet", _facet),
    ("PUT", "/collections/([^/]+)/index", _index),
    ("DELETE", "/collections/([^/]+)/index/([^/]+)", _index),
]
