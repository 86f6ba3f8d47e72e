"""Building Edge's index beside the searches: what is written meanwhile, what a kill leaves, what waits."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge
from support.backends import DIM, edge, record

import unidiff_sdk.store.edge.store
from unidiff_sdk.errors import StoreError
from unidiff_sdk.store import Record
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.filters import parse

MANY, WIDE = 1400, 2048  # just over the size from which the engine builds a graph: 10,000 KB


def wide_records(n: int, seed: int = 0) -> list[Record]:
    vectors = np.random.default_rng(seed).standard_normal((n, WIDE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [Record(record(k).id, vector, {"n": k}) for k, vector in enumerate(vectors)]


def numbers(store: EdgeStore) -> set[int]:
    return {r.payload["n"] for batch in store.scroll() for r in batch}


def test_what_is_written_meanwhile_is_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path / "vectors", DIM)
    store.upsert([record(n, n=n) for n in range(300)])
    build = unidiff_sdk.store.edge.store.optimize_in_subprocess

    def build_while_others_write(copy: Path) -> None:
        store.upsert([record(n, n=n) for n in range(300, 500)])  # new ones
        store.delete([record(n).id for n in range(0, 100)])  # gone ones
        store.upsert([Record(record(150).id, record(9).vector, {"n": 9000})])  # a replaced one
        store.upsert([record(50, n=50)])  # one that went and came again
        assert store.count(parse({"n": {"gte": 400}})) == 101  # and an index that the copy does not have
        assert store.query(record(450).vector, limit=1)[0].id == record(450).id
        build(copy)

    monkeypatch.setattr(unidiff_sdk.store.edge.store, "optimize_in_subprocess", build_while_others_write)
    store.optimize()
    expected = {50, *range(100, 500), 9000} - {150}
    for again in (False, True):
        if again:
            store.close()
            store = EdgeStore(tmp_path / "vectors", DIM)
        assert numbers(store) == expected
        assert store.count() == len(expected)
        assert store.retrieve([record(150).id])[0].payload == {"n": 9000}
        np.testing.assert_allclose(store.retrieve([record(150).id])[0].vector, record(9).vector, atol=1e-7)
        assert "n" in store._shard.info().payload_schema
    store.close()


def longest_wait(store: EdgeStore, build: Callable[[], object], wanted: Record) -> tuple[float, float]:
    """The most that this process has computed between two turns of an event loop, and in one search, in seconds.

    Of processor time, so that a busy machine does not count; while another thread builds, and one searches for
    `wanted`, which must always be found.
    """
    searches: list[float] = []

    def search() -> None:
        before = time.process_time()
        found = store.query(wanted.vector, limit=1)
        searches.append(time.process_time() - before)
        assert [f.id for f in found] == [wanted.id]

    async def watch() -> float:
        turns = [time.process_time()]
        building = asyncio.get_running_loop().run_in_executor(None, build)
        while not building.done():
            await asyncio.to_thread(search)
            await asyncio.sleep(0.002)
            turns.append(time.process_time())
        await building
        return float(max(np.diff(turns)))

    search()
    return asyncio.run(watch()), max(searches)


def test_searches_and_an_event_loop_go_on_and_are_right(tmp_path: Path) -> None:
    """They wait for nothing as they would for the engine's own `optimize`, called in a thread."""
    records = wide_records(MANY)
    stores = [EdgeStore(tmp_path / name, WIDE) for name in ("apart", "in a thread")]
    for store in stores:
        for start in range(0, MANY, 500):
            store.upsert(records[start : start + 500])
        assert store.unindexed_count() == MANY
    apart, in_a_thread = stores
    of_the_loop, _ = longest_wait(in_a_thread, in_a_thread._shard.optimize, records[77])
    assert max(longest_wait(apart, apart.optimize, records[77])) < of_the_loop / 4
    for store in stores:
        assert store.unindexed_count() == 0
        assert store.query(records[77].vector, limit=1)[0].id == records[77].id
        store.close()


def test_the_swap_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading what was built is what holds Python's global lock: less than 50 ms, whatever was written last."""
    store = EdgeStore(tmp_path / "vectors", WIDE)
    store.upsert(wide_records(MANY))
    loads: list[float] = []
    load = qdrant_edge.EdgeShard.load

    def timed(path: str) -> qdrant_edge.EdgeShard:
        before = time.thread_time()
        shard = load(path)
        loads.append(time.thread_time() - before)
        return shard

    monkeypatch.setattr(
        unidiff_sdk.store.edge.store.edge, "EdgeShard", type("Timed", (), {"load": staticmethod(timed)})
    )
    store.optimize()
    assert len(loads) == 1 and loads[0] < 0.05
    store.close()


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import shutil
import unidiff_sdk.store.edge.store as module
from unidiff_sdk.store.edge.shard_versions import ShardVersions
from support.backends import record

def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def then_dies(call):
    return lambda *a, **k: (call(*a, **k), dies())

def writes_then(call):
    def write(*a, **k):
        store.upsert([record(n, n=n) for n in range(100, 150)])
        store.delete([record(n).id for n in range(10)])
        call(*a, **k)
    return write

store = module.EdgeStore(Path(sys.argv[1]), 8)
store.upsert([record(n, n=n) for n in range(100)])
stage = sys.argv[3]
module.optimize_in_subprocess = writes_then(module.optimize_in_subprocess)
if stage == "copying":
    shutil.copytree = lambda source, copy, **options: (os.makedirs(copy), dies())
elif stage == "building":
    module.optimize_in_subprocess = writes_then(dies)
elif stage == "before the swap":
    ShardVersions.switch = dies
elif stage == "after the swap":
    ShardVersions.switch = then_dies(ShardVersions.switch)
elif stage == "later":
    module.EdgeStore.close = dies
store.optimize()
store.close()
"""


@pytest.mark.parametrize("stage", ["copying", "building", "before the swap", "after the swap", "later"])
def test_a_kill_loses_nothing(tmp_path: Path, stage: str) -> None:
    folder = tmp_path / "vectors"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(Path(__file__).parents[1]), stage],
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    store = EdgeStore(folder, DIM)
    assert numbers(store) == (set(range(100)) if stage == "copying" else set(range(10, 150)))
    assert sum(path.is_dir() for path in folder.iterdir()) == 1, "what the kill left is still there"
    store.optimize()
    assert store.count() == len(numbers(store))
    store.close()


def test_a_build_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path / "vectors", DIM)
    store.upsert([record(n, n=n) for n in range(50)])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StoreError, match=r"was not built.*Nothing is lost"):
        store.optimize()
    store.upsert([record(50, n=50)])
    assert store.count() == 51
    assert sum(path.is_dir() for path in (tmp_path / "vectors").iterdir()) == 1
    store.close()


def test_the_builder_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed with -9, the parent cannot end it; the kernel does, though the engine holds the child's global lock."""
    script = (
        "import subprocess, sys, time, os\n"
        "child = 'import os, sys, time; from unidiff_sdk.store.edge import optimizer; import qdrant_edge\\n'\\\n"
        "    'class Slow:\\n  def load(p): print(os.getpid(), flush=True); time.sleep(60)\\n'\\\n"
        "    'qdrant_edge.EdgeShard = Slow; optimizer._main(\"x\", %d)' % os.getpid()\n"
        "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE, text=True)\n"
        "print(p.stdout.readline(), flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid = int(run.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the builder outlived its parent"
        time.sleep(0.02)


def test_a_store_of_the_earlier_layout(tmp_path: Path) -> None:
    """The shard lies in the store's folder itself; the first `optimize` moves it into one of its own."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    parameters = qdrant_edge.EdgeVectorParams(size=DIM, distance=qdrant_edge.Distance.Dot)
    shard = qdrant_edge.EdgeShard.create(str(folder), qdrant_edge.EdgeConfig(vectors={"image": parameters}))
    point = qdrant_edge.Point(record(1).id, {"image": record(1).vector.tolist()}, {"n": 1})
    shard.update(qdrant_edge.UpdateOperation.upsert_points([point]))
    shard.close()
    store = EdgeStore(folder, DIM)
    assert numbers(store) == {1}
    store.optimize()
    store.upsert([record(2, n=2)])
    store.close()
    assert not (folder / "edge_config.json").exists()
    store = EdgeStore(folder, DIM)
    assert numbers(store) == {1, 2}
    store.close()


def test_a_swap_keeps_other_processes_out(tmp_path: Path) -> None:
    store = edge(tmp_path)
    store.optimize()
    with pytest.raises(StoreError, match="in use by another"):
        edge(tmp_path)
    store.close()
    edge(tmp_path).close()
