"""Bulk indexing on a local Ray cluster of several processes while processes are killed and the server fails.

At the end of each test every valid row is stored exactly once, and the report names what was wrong.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.misbehaving_server import MisbehavingServer, Request

from unidiff_sdk import Catalog, ServerOptions, StoreError
from unidiff_sdk.store.ids import key_of

pytest.importorskip("ray", reason="needs the ray extra")
pytestmark = pytest.mark.slow

SHARDS, ROWS = 3, 150  # three chunks each


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    server = MisbehavingServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sound shards, and one that is cut off after some rows."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS + 1):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(ROWS):
                image = io.BytesIO()
                Image.fromarray(np.full((4, 4, 3), [shard, row, 9], np.uint8)).save(image, "PNG")
                columns = json.dumps({"text": f"item {row}", "id": f"{shard}-{row}"}).encode()
                for suffix, content in ((".png", image.getvalue()), (".json", columns)):
                    member = tarfile.TarInfo(f"{row:04d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    damaged = folder / f"{SHARDS}.tar"
    damaged.write_bytes(damaged.read_bytes()[:50_000])
    return folder


def processes_of(parent: int, name: str) -> list[int]:
    """The processes below `parent` whose command line holds a name."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue

    def is_below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == parent:
                return True
        return False

    return [process for process, line in lines.items() if name in line and is_below(process)]


def once_at_upsert(number: int, act: Callable[[], object]) -> Callable[[Request], Any]:
    """A `choose` that acts at the n-th request that stores points, and never again."""
    counted = [0]

    def choose(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith("/points"):
            counted[0] += 1
            if counted[0] == number:
                act()

    return choose


def check_stored(server: MisbehavingServer, images: Path, bundle: Path, report: dict[str, Any]) -> None:
    """Every sound row is stored once, with its image; the report counts the rows and names the damaged shard."""
    points, _ = server.client.scroll("catalog", limit=10_000)
    ids = [point.payload["id"] for point in points if point.payload]
    sound = {f"{shard}-{row}" for shard in range(SHARDS) for row in range(ROWS)}
    partial = {id for id in ids if id.startswith(f"{SHARDS}-")}
    assert len(ids) == len(set(ids)) and set(ids) == sound | partial and 0 < len(partial) < ROWS
    assert {str(point.id) for point in points} == {key_of(id) for id in ids}
    assert report["added"] + report["skipped"] == len(ids)
    assert any(f"{SHARDS}.tar" in row["reason"] for row in report["failed"]), report["failed"]
    with Catalog(server.url, bundle, images=images) as catalog:
        checked = catalog.check()
        assert checked.items == len(ids) and not checked.missing_images and not checked.missing_vectors


def command(server: MisbehavingServer, source: Path, bundle: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "unidiff_sdk",
            "bulk",
            "index",
            str(source),
            "--to",
            server.url,
            "--bundle",
            str(bundle),
        ),
        *("--image-store", str(tmp_path / "images"), "--record", str(tmp_path / "run.jsonl"), "--workers", "2"),
        *("--json", *more),
    ]


def run(arguments: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("stage", ["Encode", "Store"])
def test_killed_worker_is_replaced(
    server: MisbehavingServer, source: Path, toy: Path, tmp_path: Path, stage: str
) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.extend(processes_of(os.getpid(), f"MapBatches({stage})")[:1])
        os.kill(killed[0], signal.SIGKILL)

    server.choose = once_at_upsert(3, kill)
    report = run(command(server, source, toy, tmp_path))
    assert len(killed) == 1
    check_stored(server, tmp_path / "images", toy, report)


class Node:
    """One node of a Ray cluster: a `ray start` process with all that it starts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        ports = ("--min-worker-port", "0", "--max-worker-port", "0")
        command = [Path(sys.executable).with_name("ray"), "start", "--block", *ports, "--disable-usage-stats"]
        size = ("--object-store-memory", str(100 << 20))
        with (folder / "ray.log").open("ab") as log:
            self.process = subprocess.Popen([*command, *size, *arguments], stdout=log, stderr=log)

    def processes(self, name: str = "") -> list[int]:
        return processes_of(self.process.pid, name)

    def kill(self) -> None:
        """As when the machine fails. Processes that are started meanwhile are killed, too."""
        while found := [*self.processes(), *([self.process.pid] if self.process.poll() is None else [])]:
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.process.poll()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Node, dict[str, str]]]:
    """A cluster of two nodes, and the environment of its driver."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # names of sockets have at most 107 characters
    port = address.partition(":")[2]
    # A cluster has a token if this user has ever started Ray. Its driver would need the same variables.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    on_head = ("--head", "--port", port, "--include-dashboard", "false", "--temp-dir", str(folder))
    # The second of two actors leaves the node that would be more than half full, and finds room there afterwards.
    head = Node(folder, *on_head, "--num-cpus", "3")
    try:
        await_text(folder / "ray.log", "Ray runtime started", head)
        worker = Node(folder, "--address", address, "--num-cpus", "2")
        try:
            yield head, worker, {**os.environ, "RAY_ADDRESS": address}
        finally:
            worker.kill()
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def await_text(log: Path, text: str, node: Node) -> None:
    for _ in range(600):
        if text in log.read_text():
            return
        assert node.process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_removed_node_of_a_cluster(
    server: MisbehavingServer,
    source: Path,
    toy: Path,
    tmp_path: Path,
    nodes: tuple[Node, Node, dict[str, str]],
) -> None:
    """The chunks that only the removed node had are encoded again on the other one."""
    _, worker, environment = nodes
    stages: list[int] = []

    def remove() -> None:
        stages.extend(worker.processes("MapBatches("))
        worker.kill()

    server.choose = once_at_upsert(3, remove)
    report = run(command(server, source, toy, tmp_path), environment)
    assert stages, "the removed node ran a stage of the job"
    check_stored(server, tmp_path / "images", toy, report)


def test_killed_driver_is_resumed(server: MisbehavingServer, source: Path, toy: Path, tmp_path: Path) -> None:
    embeddings = tmp_path / "embeddings"
    arguments = command(server, source, toy, tmp_path, "--embeddings", str(embeddings))
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_later() -> None:
        threading.Timer(0.2, first.kill).start()

    server.choose = once_at_upsert(4, kill_later)
    assert first.wait(timeout=400) == -signal.SIGKILL
    time.sleep(5)  # its workers end with it
    recorded = len((tmp_path / "run.jsonl").read_text().split())
    upserts = sum(request.method == "PUT" and request.path.endswith("/points") for request in server.requests)
    encoded = {file: file.stat().st_mtime_ns for file in embeddings.rglob("*.parquet")}
    report = run([*arguments, "--resume"])
    check_stored(server, tmp_path / "images", toy, report)
    assert recorded and upserts >= 4
    assert encoded and all(file.stat().st_mtime_ns == before for file, before in encoded.items())
    tables = [pq.read_table(file, columns=["id"]) for file in embeddings.rglob("*.parquet")]
    ids = sorted(id for table in tables for id in table["id"].to_pylist())
    before = server.client.scroll("catalog", limit=10_000)[0]
    assert ids == sorted(point.payload["id"] for point in before if point.payload)
    again = run(arguments)
    assert again["added"] == 0 and again["skipped"] == report["added"] + report["skipped"]
    assert server.client.scroll("catalog", limit=10_000)[0] == before, "a repeated run changes nothing"


def test_unavailable_server(server: MisbehavingServer, source: Path, toy: Path, tmp_path: Path) -> None:
    from unidiff_sdk.scale import index

    options: dict[str, Any] = {
        "images": tmp_path / "images",
        "record": tmp_path / "run.jsonl",
        "server": ServerOptions(retries=3),
    }
    unavailable = threading.Event()
    outage = once_at_upsert(3, unavailable.set)

    def choose(request: Request) -> int | None:
        outage(request)
        return 503 if unavailable.is_set() else None

    server.choose = choose
    with pytest.raises(StoreError, match="status 503") as raised:  # longer than the retries last
        index(source, server.url, toy, **options)
    assert "\n" not in str(raised.value)
    server.choose = once_at_upsert(2, lambda: server.faults.extend([503, 503]))  # shorter
    report = index(source, server.url, toy, resume=True, **options)
    failed = [{"reason": row.reason} for row in report.failed]
    check_stored(server, tmp_path / "images", toy, {"added": report.added, "skipped": report.skipped, "failed": failed})
