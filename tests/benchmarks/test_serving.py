"""The benchmark of the server: its clients, its figures and its page."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serving import results
from serving.load import SEARCHING, Calls, measure, percentile

STALL = 0.8


class Stalling(BaseHTTPRequestHandler):
    """Answers at once, except between 0.4 s and 1.2 s after the first request."""

    protocol_version = "HTTP/1.1"
    begin: float | None = None

    def do_POST(self) -> None:
        kind = type(self)
        kind.begin = kind.begin or time.perf_counter()
        self.rfile.read(int(self.headers["Content-Length"]))
        since = time.perf_counter() - kind.begin
        if 0.4 < since < 0.4 + STALL:
            time.sleep(0.4 + STALL - since)
        body = b'{"hits":[{}]}' if self.path == "/v1/search" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Stub:
    """A server without a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def memory(self) -> int:
        return 1


@pytest.fixture
def stalling() -> Iterator[Stub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Stalling,), {}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Stub(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def test_latency_counts_from_when_a_request_was_due(stalling: Stub) -> None:
    """With a stall of 0.8 s in 2 s, two fifths of the requests are late, although each client sends few of them."""
    found = measure(stalling, 2.0, 100.0, generating=1)
    search = found["search"]
    assert search["calls"] == search["answered"] == 200 > 3 * SEARCHING
    assert search["max_ms"] > 700 * STALL and 100 < search["p99_ms"] <= search["max_ms"]
    assert search["p50_ms"] < 200
    assert set(found["generate"]["outcomes"]) == {"empty"} and found["generate"]["answered"] == 0
    assert 1 <= len(found["memory"]) <= 4


def test_lost_calls_are_counted() -> None:
    found = measure(Stub(1), 0.5, 50.0, generating=0)  # nothing listens at this port
    assert found["search"]["outcomes"] == {"lost": 25} and found["search"]["answered"] == 0


@pytest.mark.parametrize("count", [2, 3, 100, 1001])
def test_percentiles_equal_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    for percent in (1, 50, 99):
        assert percentile(list(values), percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([], 99) == 0 and percentile([3.0], 50) == 3.0


def test_growth_compares_the_ends() -> None:
    memory = [(float(n), (100 + n) << 20) for n in range(100)]
    memory[3] = (3.0, 1 << 40)  # one peak
    assert results.growth(memory) == (111, 190)  # the median, one value further up


def test_page_is_that_of_the_results() -> None:
    found = json.loads(results.RESULTS.read_text(encoding="utf-8"))
    assert "\n".join(results.page(found)) + "\n" == results.PAGE.read_text(encoding="utf-8")


def test_summary_counts_calls_that_failed() -> None:
    calls = Calls()
    for outcome, seconds in (("200", 0.1), ("429", 0.2), ("lost", 0.3)):
        calls.add(outcome, seconds)
    summary = calls.summary(3.0)
    assert summary["calls"] == 3 and summary["answered"] == 1 and summary["per_second"] == 1.0
    assert summary["max_ms"] == 300.0
