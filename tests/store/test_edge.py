"""What only a store in a folder does: it locks its folder, survives a kill and reads the layout of earlier releases."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import qdrant_edge
from support.backends import DIM, edge, record

from unidiff_sdk.errors import StoreError
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.filters import parse


def test_reopened_store_holds_its_records(tmp_path: Path) -> None:
    store = edge(tmp_path)
    store.upsert([record(1, color="red")])
    store.count(parse({"color": "red"}))  # creates an index
    store.close()
    store = edge(tmp_path)
    assert store.retrieve([record(1).id])[0].payload == {"color": "red"}
    store.close()


def test_store_in_use_is_refused(tmp_path: Path) -> None:
    store = edge(tmp_path)
    with pytest.raises(StoreError, match="in use by another"):
        edge(tmp_path)
    store.close()
    edge(tmp_path).close()


def test_upserted_records_survive_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from support.backends import edge, record\n"
        "edge(Path(sys.argv[1])).upsert([record(n) for n in range(50)]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[1])], check=False)
    store = edge(tmp_path)
    assert store.count() == 50
    store.close()


def test_engine_retrieves_in_the_order_of_the_ids(tmp_path: Path) -> None:
    """The store relies on it where nothing is missing. Half of the records are in a segment with an index."""
    store = EdgeStore(tmp_path / "vectors", DIM)
    ids = [record(n).id for n in range(400)]
    store.upsert([record(n) for n in range(200)])
    store.optimize()
    store.upsert([record(n) for n in range(200, 400)])
    random.Random(0).shuffle(ids)
    assert [str(point.id) for point in store._shard.retrieve(ids, True, False)] == ids
    store.close()


def test_layout_of_earlier_releases_is_read(tmp_path: Path) -> None:
    """The shard is in the folder of the store itself. The first `optimize` moves it into a subfolder."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    parameters = qdrant_edge.EdgeVectorParams(size=DIM, distance=qdrant_edge.Distance.Dot)
    shard = qdrant_edge.EdgeShard.create(str(folder), qdrant_edge.EdgeConfig(vectors={"image": parameters}))
    point = qdrant_edge.Point(record(1).id, {"image": record(1).vector.tolist()}, {"n": 1})
    shard.update(qdrant_edge.UpdateOperation.upsert_points([point]))
    shard.close()
    store = EdgeStore(folder, DIM)
    assert [r.payload for r in store.retrieve([record(1).id])] == [{"n": 1}]
    store.optimize()
    store.upsert([record(2, n=2)])
    store.close()
    assert not (folder / "edge_config.json").exists()
    store = EdgeStore(folder, DIM)
    assert {r.payload["n"] for batch in store.scroll() for r in batch} == {1, 2}
    store.close()
