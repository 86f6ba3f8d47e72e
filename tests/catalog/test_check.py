"""`Catalog.check`: what it reports, what it repairs, and what it never touches."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge as edge
from click.testing import CliRunner
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, StoreError
from unidiff_sdk.cli.main import main
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ImageStore

ORPHAN = "ab" * 32
KINDS = ("images", "thumbnails", f"latents-{12 * '0'}")


def image(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, np.uint8)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add([image(k) for k in range(4)], ids=[1, 2, 3, "four"])
    return tmp_path / "shop"


def orphan_files(shop: Path) -> list[str]:
    """Write the files of an image that no item uses. Returns their names."""
    names = [f"images/ab/{ORPHAN}.png", f"latents-{12 * '0'}/ab/{ORPHAN}.bin", f"thumbnails/ab/{ORPHAN}.webp"]
    for name in names:
        (shop / name).parent.mkdir(parents=True, exist_ok=True)
        (shop / name).write_bytes(b"image")
    return names


def files(shop: Path) -> set[str]:
    return {path.relative_to(shop).as_posix() for kind in KINDS for path in (shop / kind).rglob("*.*")}


def test_check_of_a_sound_catalog_finds_nothing(shop: Path) -> None:
    before = files(shop)
    with Catalog(shop) as catalog:
        for repair in (False, True):
            report = catalog.check(repair=repair)
            assert (report.items, report.repaired, report.remaining) == (4, repair, ())
            assert not (report.missing_images or report.missing_vectors or report.orphaned_images or report.leftovers)
    assert files(shop) == before


def test_check_reports_and_repair_deletes_unused_images_and_leftovers(shop: Path) -> None:
    before, orphans = files(shop), orphan_files(shop)
    parts = [f"images/ab/.{16 * 'c'}.part", f"thumbnails/ab/.{16 * 'd'}.part"]
    for name in parts:
        (shop / name).write_bytes(b"half")
    unfinished = shop / f"vectors-{12 * 'e'}"
    (unfinished / "0").mkdir(parents=True)
    with Catalog(shop) as catalog:
        found = catalog.check()
        assert found.orphaned_images == tuple(orphans)
        assert found.leftovers == tuple(sorted([*parts, unfinished.name]))
        assert len(found.remaining) == 2
        assert all("repair=True" in sentence for sentence in found.remaining)
        assert files(shop) == before | set(orphans) | set(parts), "check without repair deletes nothing"
        repaired = catalog.check(repair=True)
        assert (repaired.orphaned_images, repaired.leftovers) == (found.orphaned_images, found.leftovers)
        assert repaired.remaining == ()
        assert len(list(catalog.search(vector=np.ones(8)))) == 4
    assert files(shop) == before
    assert not unfinished.exists()


def test_repair_never_deletes_foreign_files(shop: Path, tmp_path: Path) -> None:
    """Only names that this library gives are deleted, in real folders only."""
    names = ["images/notes.txt", "images/ab/notes.png", f"images/cd/{ORPHAN}.png", "images/ab/.x.part", "vectors-old/x"]
    for name in names:
        (shop / name).parent.mkdir(parents=True, exist_ok=True)
        (shop / name).write_bytes(b"mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{'ef' * 32}.png").write_bytes(b"mine")
    (shop / "images" / "ef").symlink_to(elsewhere)
    (shop / f"vectors-{12 * 'f'}").symlink_to(elsewhere)
    with Catalog(shop) as catalog:
        report = catalog.check(repair=True)
    assert (report.orphaned_images, report.leftovers) == ((), ())
    assert all((shop / name).exists() for name in names)
    assert list(elsewhere.iterdir())


def test_repair_keeps_what_another_process_uses(shop: Path) -> None:
    orphan_files(shop)
    part, store = shop / f"images/ab/.{16 * 'c'}.part", shop / f"vectors-{12 * 'e'}"
    store.mkdir()
    with part.open("wb") as writing, (store / "lock").open("w") as lock:
        fcntl.flock(writing, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Catalog(shop) as catalog:
            assert catalog.check(repair=True).leftovers == ()
        assert part.exists()
        assert store.exists()


def test_check_reports_missing_images_and_vectors(shop: Path) -> None:
    with Catalog(shop) as catalog:
        shard = catalog._store._shard  # type: ignore[attr-defined]
        payload = catalog._store.retrieve([key_of("four")])[0].payload
        for number, vector in ((5, None), (6, np.zeros(8))):
            system = payload["_unidiff"]
            point = edge.Point(
                key_of(number), {} if vector is None else {"image": vector.tolist()}, {"id": number, "_unidiff": system}
            )
            shard.update(edge.UpdateOperation.upsert_points([point]))
        missing = [catalog.get(id) for id in (1, 2)]
        catalog._images.path(missing[0].uri).unlink()
        catalog._images.path(missing[1].uri).write_bytes(b"")
        for repair in (False, True):
            report = catalog.check(repair=repair)
            assert report.items == 6
            assert sorted(report.missing_images, key=str) == [1, 2]
            assert sorted(report.missing_vectors, key=str) == [5, 6]
            assert len(report.remaining) == 2
            assert "Add these items again" in report.remaining[0]
        catalog.delete([1, 2, 5, 6])
        assert catalog.check().remaining == ()


def test_repair_keeps_all_images_where_records_are_damaged(shop: Path) -> None:
    orphans = orphan_files(shop)
    with Catalog(shop) as catalog:
        point = edge.Point(key_of(9), {"image": [1.0] * 8}, {"name": "foreign"})
        catalog._store._shard.update(edge.UpdateOperation.upsert_points([point]))  # type: ignore[attr-defined]
        report = catalog.check(repair=True)
    assert report.damaged == (key_of(9),)
    assert any("backup" in sentence for sentence in report.remaining)
    assert set(orphans) <= files(shop)


def test_repair_builds_an_index_that_holds_deleted_vectors(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimized: list[EdgeStore] = []
    with Catalog(shop) as catalog:
        share = [0.1]
        monkeypatch.setattr(EdgeStore, "deleted_share", lambda store, tolerance=0.0: share[0])
        monkeypatch.setattr(EdgeStore, "unindexed_count", lambda store: 0)
        monkeypatch.setattr(
            EdgeStore, "optimize", lambda store: (optimized.append(store), share.clear(), share.append(0))
        )
        found = catalog.check()
        assert found.deleted_share == 0.1
        assert "10% of the search index is deleted" in found.remaining[0]
        assert not optimized
        assert catalog.check(repair=True).remaining == ()
        assert len(optimized) == 1


def test_check_on_shared_images_keeps_recent_files(tmp_path: Path) -> None:
    """Another process may have written an image whose item it has not stored yet."""
    from unidiff_sdk import Bundle

    bundle = Bundle.open(make_toy_bundle(tmp_path / "bundle"))
    store, images = EdgeStore(tmp_path / "vectors", bundle.dim), ImageStore(tmp_path / "shop")
    with Catalog.from_parts(store, images, bundle) as catalog:
        catalog.add(image(1), ids=1)
        orphans = orphan_files(tmp_path / "shop")
        assert catalog.check(repair=True).orphaned_images == ()
        for name in orphans:
            os.utime(tmp_path / "shop" / name, (time.time() - 7200,) * 2)
        assert catalog.check(repair=True).orphaned_images == tuple(orphans)
    assert not set(orphans) & files(tmp_path / "shop")


def test_check_of_a_server_store_reports_records_without_vector(tmp_path: Path) -> None:
    from qdrant_client import QdrantClient, models

    from unidiff_sdk import Bundle
    from unidiff_sdk.store.server.store import ServerStore

    bundle, client = Bundle.open(make_toy_bundle(tmp_path / "bundle")), QdrantClient(":memory:")
    store = ServerStore(client, "shop", bundle.dim, bundle.fingerprint)
    with Catalog.from_parts(store, ImageStore(tmp_path / "shop"), bundle) as catalog:
        catalog.add([image(k) for k in range(3)], ids=[1, 2, 3])
        catalog._images.path(catalog.get(2).uri).unlink()
        payload = store.retrieve([key_of(3)])[0].payload
        client.upsert("shop", [models.PointStruct(id=key_of(3), vector={}, payload=payload)])
        before = files(tmp_path / "shop")
        for name in before:
            os.utime(tmp_path / "shop" / name, (time.time() - 7200,) * 2)
        with pytest.warns(UserWarning, match="skipped"):
            report = catalog.check(repair=True)
    assert (report.items, report.missing_images, report.unindexed, report.deleted_share) == (2, (2,), 0, 0)
    assert any(sentence.startswith("1 records have no usable vector") for sentence in report.remaining)
    assert files(tmp_path / "shop") == before


def test_check_during_a_reindexing_is_refused(shop: Path) -> None:
    with (
        Catalog(shop) as catalog,
        catalog._current.while_not_reindexing(),
        pytest.raises(StoreError, match="is being reindexed already"),
    ):
        catalog.check()


KILLED = """
import os, signal, sys
import unidiff_sdk.catalog.writer as writer
from unidiff_sdk import Catalog
writer.Writer._commit = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
Catalog(sys.argv[1]).add([bytes(open(sys.argv[2], "rb").read())], ids=["new"])
"""


def test_images_of_a_killed_process_are_found_and_deleted(shop: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(image(99)).save(tmp_path / "new.png")
    before = files(shop)
    run = subprocess.run([sys.executable, "-c", KILLED, str(shop), str(tmp_path / "new.png")], check=False)
    assert run.returncode == -9
    assert len(files(shop)) == len(before) + 2
    with Catalog(shop) as catalog:
        assert len(catalog.check(repair=True).orphaned_images) == 2
    assert files(shop) == before


def test_check_command_reports_repairs_and_exits_with_1_while_problems_remain(shop: Path) -> None:
    orphans = orphan_files(shop)
    run = CliRunner().invoke(main, ["check", str(shop)])
    assert run.exit_code == 1
    assert "4 items checked, 3 unused image files and 0 leftovers found." in run.output
    assert "belong to no item" in run.output
    run = CliRunner().invoke(main, ["check", str(shop), "--repair", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["orphaned_images"] == orphans
    run = CliRunner().invoke(main, ["check", str(shop)])
    assert (run.exit_code, run.output) == (0, "4 items checked, 0 unused image files and 0 leftovers found.\n")
