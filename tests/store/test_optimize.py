"""Building the index of Qdrant Edge while others search and write, and after a kill."""

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

from unidiff_sdk.errors import StoreError
from unidiff_sdk.store import Record
from unidiff_sdk.store.edge.optimizer import optimize_in_subprocess
from unidiff_sdk.store.edge.page_cache import warm_page_cache
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.filters import parse

MANY, WIDE = 1400, 2048  # just over the size from which the engine builds a graph: 10,000 KB


def wide_records(n: int, seed: int = 0) -> list[Record]:
    vectors = np.random.default_rng(seed).standard_normal((n, WIDE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [Record(record(k).id, vector, {"n": k}) for k, vector in enumerate(vectors)]


def numbers(store: EdgeStore) -> set[int]:
    return {r.payload["n"] for batch in store.scroll() for r in batch}


def test_optimize_keeps_what_is_written_meanwhile(tmp_path: Path) -> None:
    def build_while_others_write(copy: Path) -> None:
        store.upsert([record(n, n=n) for n in range(300, 500)])  # new
        store.delete([record(n).id for n in range(0, 100)])  # deleted
        store.upsert([Record(record(150).id, record(9).vector, {"n": 9000})])  # replaced
        store.upsert([record(50, n=50)])  # deleted and added again
        assert store.count(parse({"n": {"gte": 400}})) == 101  # creates an index that the copy lacks
        assert store.query(record(450).vector, limit=1)[0].id == record(450).id
        optimize_in_subprocess(copy)

    store = EdgeStore(tmp_path / "vectors", DIM, build_index=build_while_others_write)
    store.upsert([record(n, n=n) for n in range(300)])
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
    """The longest processor time between two iterations of an event loop, and of one search, in seconds.

    Measured while one thread builds and another searches for `wanted`, which must always be found. Processor time does
    not count other processes of a busy machine.
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


def test_optimize_blocks_neither_searches_nor_an_event_loop(tmp_path: Path) -> None:
    """Compared with the engine's own `optimize` in a thread."""
    records = wide_records(MANY)
    stores = [EdgeStore(tmp_path / name, WIDE) for name in ("child process", "thread")]
    for store in stores:
        for start in range(0, MANY, 500):
            store.upsert(records[start : start + 500])
        assert store.unindexed_count() == MANY
    in_child, in_thread = stores
    blocked, _ = longest_wait(in_thread, in_thread._shard.optimize, records[77])
    assert max(longest_wait(in_child, in_child.optimize, records[77])) < blocked / 4
    for store in stores:
        assert store.unindexed_count() == 0
        assert store.query(records[77].vector, limit=1)[0].id == records[77].id
        store.close()


def test_loading_an_optimized_shard_takes_less_than_50_ms(tmp_path: Path) -> None:
    """Loading holds the GIL, whatever was written last."""
    store = EdgeStore(tmp_path / "vectors", WIDE)
    store.upsert(wide_records(MANY))
    store.close()
    shard = tmp_path / "vectors" / "0"
    optimize_in_subprocess(shard)
    warm_page_cache(shard)
    started = time.thread_time()
    loaded = qdrant_edge.EdgeShard.load(str(shard))
    assert time.thread_time() - started < 0.05
    assert loaded.info().indexed_vectors_count == MANY
    loaded.close()


KILLED_WHILE_OPTIMIZING = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from unidiff_sdk.store.edge.optimizer import optimize_in_subprocess
from unidiff_sdk.store.edge.shard_versions import ShardVersions
from unidiff_sdk.store.edge.store import EdgeStore
from support.backends import record

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def build(shard):
    store.upsert([record(n, n=n) for n in range(100, 150)])
    store.delete([record(n).id for n in range(10)])
    die() if stage == "building" else optimize_in_subprocess(shard)

stage = sys.argv[3]
store = EdgeStore(Path(sys.argv[1]), 8, build_index=build)
store.upsert([record(n, n=n) for n in range(100)])
activate = ShardVersions.activate
if stage == "copying":
    shutil.copytree = lambda source, copy, **options: (os.makedirs(copy), die())
elif stage == "before the switch":
    ShardVersions.activate = die
elif stage == "after the switch":
    ShardVersions.activate = lambda *arguments: (activate(*arguments), die())
store.optimize()
die()
"""


@pytest.mark.parametrize("stage", ["copying", "building", "before the switch", "after the switch", "later"])
def test_kill_while_optimizing_loses_nothing(tmp_path: Path, stage: str) -> None:
    folder = tmp_path / "vectors"
    run = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_OPTIMIZING, str(folder), str(Path(__file__).parents[1]), stage],
        capture_output=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    store = EdgeStore(folder, DIM)
    assert numbers(store) == (set(range(100)) if stage == "copying" else set(range(10, 150)))
    assert sum(path.is_dir() for path in folder.iterdir()) == 1, "leftovers of the killed process"
    store.optimize()
    assert store.count() == len(numbers(store))
    store.close()


def test_failed_build_changes_nothing(tmp_path: Path) -> None:
    store = EdgeStore(
        tmp_path / "vectors", DIM, build_index=lambda shard: optimize_in_subprocess(shard.with_name("missing"))
    )
    store.upsert([record(n, n=n) for n in range(50)])
    with pytest.raises(StoreError, match=r"was not built: .*No data is lost"):
        store.optimize()
    store.upsert([record(50, n=50)])
    assert store.count() == 51
    assert sum(path.is_dir() for path in (tmp_path / "vectors").iterdir()) == 1
    store.close()


def test_child_process_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed with SIGKILL cannot end its child. The kernel does, although the engine holds the GIL."""
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
        assert time.monotonic() < deadline, "the child process outlived its parent"
        time.sleep(0.02)


def test_optimized_store_stays_locked(tmp_path: Path) -> None:
    store = edge(tmp_path)
    store.optimize()
    with pytest.raises(StoreError, match="in use by another"):
        edge(tmp_path)
    store.close()
    edge(tmp_path).close()
