"""Indexing folders and tables: updates, pruning, invalid and repeated rows, and killed processes."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.color_bundle import make_color_bundle
from support.recorded import open_watched

from unidiff_sdk import Catalog, DataError

# Indexes a folder, and is killed by the write after a number of batches.
KILLED = """
import os, signal, sys
from unidiff_sdk import Catalog
from unidiff_sdk.store.edge.store import EdgeStore

location, bundle, products, batches = sys.argv[1:]
upsert, left = EdgeStore.upsert, [int(batches)]

def upsert_or_die(self, records):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    upsert(self, records)

EdgeStore.upsert = upsert_or_die
with Catalog(location, bundle) as catalog:
    catalog.add_folder(products)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "colors")


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


def test_add_table_reads_images_from_another_folder(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 5)
    table = tmp_path / "tables" / "spring.jsonl"
    table.parent.mkdir()
    (folder / "metadata.jsonl").rename(table)
    report = catalog.add_table(table, images=folder)
    assert (report.added, report.failed) == (5, ())
    assert ids(catalog) == set(range(5))
    assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)


def test_add_table_refuses_images_outside_the_folder(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 2)
    Image.new("RGB", (24, 24)).save(tmp_path / "secret.png")
    (tmp_path / "t.csv").write_text("file_name,text\n../secret.png,out\nimages/0.png,in\n")
    report = catalog.add_table(tmp_path / "t.csv", images=folder)
    assert (report.added, [row.line for row in report.failed]) == (1, [2])
    with pytest.raises(DataError, match="is not a table"):
        catalog.add_table(folder)


def test_prune_deletes_removed_rows_and_nothing_else(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 70)
    catalog.add_folder(folder)
    catalog.add(Image.new("RGB", (24, 24), "red"), "mine", "mine")
    write_rows(folder / "metadata.jsonl", [k for k in range(70) if k % 3])
    assert catalog.add_folder(folder).removed == 0
    assert catalog.count() == 71
    report = catalog.add_folder(folder, prune=True)
    assert (report.added, report.removed) == (0, 24)
    assert ids(catalog) == {k for k in range(70) if k % 3} | {"mine"}


def test_moved_images_are_updated(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 5)
    catalog.add_folder(folder, copy=False)
    for k in range(5):
        (folder / "images" / f"{k}.png").rename(folder / f"{k}.png")
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace("images/", ""))
    for copy in (False, True, False):  # moved, then copied, then referenced
        report = catalog.add_folder(folder, copy=copy)
        assert (report.added, report.skipped) == (5, 0)
        assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)
        assert catalog.get(3).uri.startswith("images/") is copy
        report = catalog.add_folder(folder, copy=copy)
        assert (report.added, report.skipped) == (0, 5)


def test_prune_refuses_a_damaged_shard(catalog: Catalog, tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"damaged and the rest of it is skipped .*Nothing was pruned; all readable"):
        catalog.add_folder(shard, prune=True)
    assert catalog.count() == 6


def test_prune_refuses_to_delete_everything(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 3)
    catalog.add_folder(folder)
    write_rows(folder / "metadata.jsonl", [])
    with pytest.raises(DataError, match="prune=True would delete all items"):
        catalog.add_folder(folder, prune=True)
    assert catalog.count() == 3


@pytest.mark.parametrize("apart", [1, 32, 70])
def test_repeated_id_is_an_invalid_row(catalog: Catalog, tmp_path: Path, apart: int) -> None:
    """In the same batch, in the next one, which is read at the same time, and in a later one."""
    folder = products(tmp_path / "products")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[3 + apart]["id"] = 3
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for added in (99, 0):
        report = catalog.add_folder(folder)
        assert (report.added, report.skipped) == (added, 99 - added)
        assert [(row.line, row.file_name) for row in report.failed] == [(4 + apart, f"{3 + apart}.png")]
        assert "an earlier row has the same id" in report.failed[0].reason
        assert catalog.get(3).load_image().getpixel((0, 0)) == (6, 249, 90)
    assert files_in(catalog) == files_used_by(catalog)
    with pytest.raises(DataError, match=f"line {4 + apart}"):
        catalog.add_folder(folder, strict=True)


def test_repeated_row_without_an_id_is_invalid(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 2)
    row = {"file_name": "images/0.png", "text": "x"}
    lines = [row | {"price": 1}, row | {"price": 2}, row | {"text": "y"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        report = catalog.add_folder(folder)
        assert [row.line for row in report.failed] == [2] and catalog.count() == 2
        assert catalog.count({"price": 1}) == 1
    assert files_in(catalog) == files_used_by(catalog)


def test_threads_that_replace_the_same_items_leave_no_unused_image(catalog: Catalog) -> None:
    def work(thread: int) -> None:
        for step in range(8):
            catalog.add(Image.new("RGB", (24, 24), (thread, step, 9)), ids=step % 3)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(catalog) == {0, 1, 2}
    assert files_in(catalog) == files_used_by(catalog)


def files_in(catalog: Catalog) -> set[str]:
    files = [path for name in ("images", "thumbnails") for path in (catalog.folder / name).rglob("*.*")]
    return {path.relative_to(catalog.folder).as_posix() for path in files}


def files_used_by(catalog: Catalog) -> set[str]:
    hits = catalog.browse(limit=1000)
    return {hit.uri for hit in hits} | {f"thumbnails/{hit.sha256[:2]}/{hit.sha256}.webp" for hit in hits}


@pytest.mark.parametrize("batches", [0, 2])
def test_killed_indexing_keeps_stored_batches_and_continues(tmp_path: Path, bundle: Path, batches: int) -> None:
    folder, location = products(tmp_path / "products"), tmp_path / "killed.catalog"
    argv = [sys.executable, "-c", KILLED, location, bundle, folder, batches]
    run = subprocess.run(list(map(str, argv)), capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    with Catalog(location) as catalog:
        kept = catalog.count()
        assert kept == 32 * batches
        report = catalog.add_folder(folder)
        assert (report.added, report.skipped) == (100 - kept, kept)
        assert ids(catalog) == set(range(100))


def test_changed_columns_do_not_encode_the_image_again(tmp_path: Path, bundle: Path) -> None:
    folder = products(tmp_path / "products", 4)
    runs: list[str] = []
    with Catalog(tmp_path / "shop.catalog", open_watched(bundle, lambda graph, feeds: runs.append(graph))) as catalog:
        catalog.add_folder(folder)
        assert runs == ["image_encoder"]
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row | {"price": 99}) + "\n" for row in rows))
        assert catalog.add_folder(folder).added == 4
        assert catalog.get(2).payload["price"] == 99
        assert runs == ["image_encoder"]


# ------------------------------------------------------------------------------------------------ folders


def test_add_folder_reports_and_shows_progress(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unidiff_sdk._internal.progress.LINE_INTERVAL", 0.001)  # there is no terminal
    report = catalog.add_folder(products(tmp_path / "products", 70), progress=True)
    assert (report.added, report.skipped, report.failed) == (70, 0, ())
    assert "70 added, 0 unchanged, 0 failed" in str(report)
    hit = catalog.get(5)
    assert hit and hit.payload == {"price": 5} and hit.text == "item 5"
    assert re.search(r"Indexing: [1-9]\d* of 70 in 0:00:0\d", capsys.readouterr().err)


def test_unchanged_items_are_skipped(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 70)
    catalog.add_folder(folder)
    assert catalog.add_folder(folder).added == 0
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"price": 3', '"price": 99')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    Image.new("RGB", (24, 24), "red").save(folder / "images" / "50.png")
    report = catalog.add_folder(folder)
    assert (report.added, report.skipped) == (2, 68)
    changed = catalog.get(3)
    assert changed and changed.payload == {"price": 99}
    assert catalog.count() == 70


def test_invalid_rows_are_reported(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 40)
    image = folder / "images" / "5.png"
    image.write_bytes(image.read_bytes()[:60])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "images/1.png"}\n{"file_name": "../x.png", "text": "x"}\nnonsense\n')
        file.write('{"file_name": "images/2.png", "text": "x", "id": {"a": 1}}\n')
    report = catalog.add_folder(folder)
    assert report.added == catalog.count() == 39
    assert [row.line for row in report.failed] == [6, 41, 42, 43, 44]
    assert "5.png: damaged or truncated" in report.failed[0].reason
    with pytest.raises(DataError, match="line 6"):
        catalog.add_folder(folder, strict=True)
    assert catalog.count() == 39


def test_add_folder_refuses_other_folders(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        catalog.add_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        catalog.add_folder(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    assert catalog.add_folder(tmp_path / "empty").added == 0
