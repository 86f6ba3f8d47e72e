"""Rows on their way in: tables of any place, what has left, kills, and what comes while reindexing."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, DataError
from unidiff_sdk.inference.encoder import Encoder

KILLED = """
import os, signal, sys
from unidiff_sdk import Catalog
from unidiff_sdk.catalog.writer import Writer

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

location, bundle, products, commits = sys.argv[1:]
commit, left = Writer._commit, [int(commits)]

def commit_some(self, *arguments, **options):
    if not left[0]:
        die()
    left[0] -= 1
    commit(self, *arguments, **options)

Writer._commit = commit_some
with Catalog(location, bundle) as catalog:
    catalog.add_folder(products)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        yield catalog


def products(folder: Path, n: int = 100) -> Path:
    (folder / "images").mkdir(parents=True)
    for k in range(n):
        Image.new("RGB", (24, 24), (2 * k, 255 - 2 * k, 90)).save(folder / "images" / f"{k}.png")
    write_rows(folder / "metadata.jsonl", range(n))
    return folder


def write_rows(table: Path, numbers: range | list[int]) -> None:
    rows = [{"file_name": f"images/{k}.png", "text": f"item {k}", "id": k, "price": k} for k in numbers]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids(catalog: Catalog) -> set[str | int]:
    return {hit.id for hit in catalog.browse(limit=1000)}


def test_a_table_may_lie_elsewhere(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 5)
    table = tmp_path / "tables" / "spring.jsonl"
    table.parent.mkdir()
    (folder / "metadata.jsonl").rename(table)
    report = catalog.add_table(table, images=folder)
    assert (report.added, report.failed) == (5, ())
    assert ids(catalog) == set(range(5))
    assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)


def test_a_table_does_not_lead_out_of_its_folder(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 2)
    Image.new("RGB", (24, 24)).save(tmp_path / "secret.png")
    (tmp_path / "t.csv").write_text("file_name,text\n../secret.png,out\nimages/0.png,in\n")
    report = catalog.add_table(tmp_path / "t.csv", images=folder)
    assert (report.added, [bad.line for bad in report.failed]) == (1, [2])
    with pytest.raises(DataError, match="no such table"):
        catalog.add_table(folder)


def test_prune_deletes_what_has_left_and_nothing_else(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 70)
    catalog.add_folder(folder)
    catalog.add(Image.new("RGB", (24, 24)), "mine", "mine")
    write_rows(folder / "metadata.jsonl", [k for k in range(70) if k % 3])
    assert catalog.add_folder(folder).removed == 0
    assert catalog.count() == 71
    report = catalog.add_folder(folder, prune=True)
    assert (report.added, report.removed) == (0, 24)
    assert ids(catalog) == {k for k in range(70) if k % 3} | {"mine"}


def test_pictures_that_were_moved_are_found_again(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 5)
    catalog.add_folder(folder, copy=False)
    for k in range(5):
        (folder / "images" / f"{k}.png").rename(folder / f"{k}.png")
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("images/", ""))
    for copy in (False, True, False):  # moved, then copied, then referenced again
        report = catalog.add_folder(folder, copy=copy)
        assert (report.added, report.skipped) == (5, 0)
        assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)
        assert catalog.get(3).uri.startswith("images/") is copy
        report = catalog.add_folder(folder, copy=copy)
        assert (report.added, report.skipped) == (0, 5)


def test_prune_leaves_what_a_damaged_shard_hides(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 6)
    shard = tmp_path / "shop.tar"
    with tarfile.open(shard, "w") as tar:
        for k in range(6):
            caption = f"item {k}".encode()
            header = tarfile.TarInfo(f"{k}.txt")
            header.size = len(caption)
            tar.addfile(header, io.BytesIO(caption))
            tar.add(folder / "images" / f"{k}.png", f"{k}.png")
    assert catalog.add_folder(shard).added == 6
    data = shard.read_bytes()
    half = data.index(b"3.txt")
    shard.write_bytes(data[:half] + b"\xff" * 512 + data[half + 512 :])
    with pytest.raises(DataError, match=r"damaged and the rest of it is skipped .*so nothing was pruned"):
        catalog.add_folder(shard, prune=True)
    assert catalog.count() == 6


def test_prune_refuses_to_delete_all(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 3)
    catalog.add_folder(folder)
    write_rows(folder / "metadata.jsonl", [])
    with pytest.raises(DataError, match="would delete everything"):
        catalog.add_folder(folder, prune=True)
    assert catalog.count() == 3


@pytest.mark.parametrize("apart", [1, 32, 70])
def test_an_id_that_comes_twice_is_a_bad_row(catalog: Catalog, tmp_path: Path, apart: int) -> None:
    """In the same batch, in the next one, which is read at the same time, and in a later one."""
    folder = products(tmp_path / "products")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[3 + apart]["id"] = 3
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for added in (99, 0):
        report = catalog.add_folder(folder)
        assert (report.added, report.skipped) == (added, 99 - added)
        assert [(bad.line, bad.file_name) for bad in report.failed] == [(4 + apart, f"{3 + apart}.png")]
        assert "an earlier row has the same id" in report.failed[0].reason
        assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)
    assert stored_files(catalog) == shown_files(catalog)
    with pytest.raises(DataError, match=f"line {4 + apart}"):
        catalog.add_folder(folder, strict=True)


def test_a_row_without_an_id_that_comes_twice(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 2)
    row = {"file_name": "images/0.png", "text": "x"}
    lines = [row | {"price": 1}, row | {"price": 2}, row | {"text": "y"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        report = catalog.add_folder(folder)
        assert [bad.line for bad in report.failed] == [2] and catalog.count() == 2
        assert catalog.count({"price": 1}) == 1
    assert stored_files(catalog) == shown_files(catalog)


def test_threads_that_replace_one_another_leave_no_picture_behind(catalog: Catalog) -> None:
    def work(thread: int) -> None:
        for step in range(8):
            catalog.add(Image.new("RGB", (24, 24), (thread, step, 9)), ids=step % 3)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(catalog) == {0, 1, 2}
    assert stored_files(catalog) == shown_files(catalog)


def stored_files(catalog: Catalog) -> set[str]:
    files = [path for name in ("images", "thumbnails") for path in (catalog.folder / name).rglob("*.*")]
    return {path.relative_to(catalog.folder).as_posix() for path in files}


def shown_files(catalog: Catalog) -> set[str]:
    hits = catalog.browse(limit=1000)
    return {hit.uri for hit in hits} | {f"thumbnails/{hit.sha256[:2]}/{hit.sha256}.webp" for hit in hits}


@pytest.mark.parametrize("commits", [0, 2])
def test_a_kill_loses_nothing_acknowledged(tmp_path: Path, bundle: Path, commits: int) -> None:
    folder, location = products(tmp_path / "products"), tmp_path / "killed.catalog"
    argv = [sys.executable, "-c", KILLED, location, bundle, folder, commits]
    run = subprocess.run(list(map(str, argv)), capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    with Catalog(location) as catalog:
        kept = catalog.count()
        assert kept == 32 * commits
        report = catalog.add_folder(folder)
        assert (report.added, report.skipped) == (100 - kept, kept)
        assert ids(catalog) == set(range(100))


def test_changed_columns_encode_nothing_again(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = products(tmp_path / "products", 4)
    catalog.add_folder(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row | {"price": 99}) + "\n" for row in rows))
    monkeypatch.setattr(Encoder, "encode_pixels", lambda *_: pytest.fail("a picture was encoded again"))
    assert catalog.add_folder(folder).added == 4
    assert catalog.get(2).payload["price"] == 99


def test_searches_and_adds_go_on_while_reindexing(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.add_folder(products(tmp_path / "products", 64))
    other = make_toy_bundle(tmp_path / "other", seed=1)
    under_way, go_on = threading.Event(), threading.Event()
    encode = Encoder.encode_pixels

    def waits(self: Encoder, pixels: np.ndarray) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread() and self.bundle.path == other:
            under_way.set()
            assert go_on.wait(30)
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_pixels", waits)
    reindexing = threading.Thread(target=catalog.reindex, args=(other,))
    reindexing.start()
    assert under_way.wait(30)
    assert len(catalog.search(image=Image.new("RGB", (24, 24), (6, 249, 90)), limit=3)) == 3
    catalog.add(Image.new("RGB", (24, 24), (1, 2, 3)), "late", "late")
    catalog.delete(5)
    go_on.set()
    reindexing.join(60)
    assert not reindexing.is_alive()
    assert catalog.bundle.path == other
    assert ids(catalog) == (set(range(64)) - {5}) | {"late"}
