"""Folders of images in object storage as the source of bulk indexing: the catalog is that of the same folder on a disk.

`make test-objects` also runs this over a real S3 protocol: moto's server on loopback.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from support import local_ray, object_stores

from unidiff_sdk import Catalog, DataError, OptionError, StoreError
from unidiff_sdk.scale import index, remote

object_stores.register()


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    local_ray.use(monkeypatch)


@pytest.fixture(params=["memory", "plain", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the images are."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {
        "memory": f"memory://{tmp_path.name}",
        "plain": f"plain://{tmp_path}/plain",
        "s3": f"s3://{object_stores.BUCKET}/{tmp_path.name}",
    }[str(request.param)]


def upload(folder: Path, url: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"{root}/{path.relative_to(folder).as_posix()}"
            files.makedirs(name.rpartition("/")[0], exist_ok=True)
            files.pipe_file(name, path.read_bytes())


def stored(catalog: Catalog) -> dict[Any, tuple[Any, ...]]:
    """What is stored of each item, without the source."""
    found = {}
    for record in (record for batch in catalog._store.scroll() for record in batch):
        system = record.payload["_unidiff"]
        columns = {name: value for name, value in record.payload.items() if name != "_unidiff"}
        found[record.id] = (columns, system["sha256"], record.vector.tolist())
    return found


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def with_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def in_splits(folder: Path, rows: list[dict[str, Any]]) -> None:
    for split, some in (("test", rows[:5]), ("train", rows[5:])):
        (folder / split).mkdir()
        for row in some:
            (folder / row["file_name"]).rename(folder / split / row["file_name"])
        jsonl(folder / split, some)


def with_sidecars(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows[1:]:  # the first has no caption
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    (folder / "3.txt").write_bytes(b"\xff")
    (folder / "4.txt").write_text(" ")


def alone(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "9.png").write_bytes((folder / "9.png").read_bytes())


@pytest.mark.parametrize("layout", [jsonl, with_csv, with_parquet, in_splits, with_sidecars, alone])
@pytest.mark.usefixtures("in_one_process")
def test_catalog_is_that_of_the_folder_on_a_disk(
    small_catalog: Path, url: str, toy: Path, tmp_path: Path, layout: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    rows = [json.loads(line) for line in (small_catalog / "metadata.jsonl").read_text().splitlines()]
    folder = tmp_path / "images"
    folder.mkdir()
    for row in rows:
        (folder / row["file_name"]).write_bytes((small_catalog / row["file_name"]).read_bytes())
    layout(folder, rows)
    upload(folder, url)
    report = index(url, tmp_path / "remote", toy, record=tmp_path / "run.jsonl")
    with Catalog(tmp_path / "local", toy) as local, Catalog(tmp_path / "remote") as catalog:
        expected = local.add_folder(folder)
        assert stored(catalog) == stored(local) and len(stored(catalog)) == expected.added > 0
        assert report.added == expected.added
        assert {row.line for row in report.failed} == {row.line for row in expected.failed}


@pytest.mark.usefixtures("in_one_process")
def test_names_are_found_and_bad_files_are_reported(
    url: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    names = ["plain.png", "sub/windows.png", unicodedata.normalize("NFC", "schön.png")]
    for shade, name in enumerate(names):
        Image.fromarray(np.full((4, 4, 3), 40 * shade, np.uint8)).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no image")
    (folder / "large.png").write_bytes(bytes(3000))
    (tmp_path / "secret.png").write_bytes((folder / "plain.png").read_bytes())
    given = ["plain.png", "sub\\windows.png", unicodedata.normalize("NFD", "schön.png"), "sub/../sub/windows.png"]
    bad = {
        "none.png": "no such image file",
        "empty.png": "0 bytes",
        "text.png": "image",
        "large.png": "more than 2,000 bytes",
        "../secret.png": "leads out",
        "..\\secret.png": "leads out",
        str(tmp_path / "secret.png"): "leads out",
    }
    jsonl(folder, [{"file_name": name, "text": "a", "id": number} for number, name in enumerate([*given, *bad])])
    upload(folder, url)
    monkeypatch.setattr(remote, "MAX_FILE_SIZE", 2000)
    report = index(url, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    assert report.added == len(given)
    assert [row.line for row in report.failed] == list(range(len(given) + 1, len(given) + len(bad) + 1))
    for row, reason in zip(report.failed, bad.values(), strict=True):
        assert reason in row.reason, row
    with Catalog(tmp_path / "shop") as catalog:
        expected = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (*names, names[1])]
        assert {columns["id"]: sha256 for columns, sha256, _ in stored(catalog).values()} == dict(enumerate(expected))


@pytest.mark.usefixtures("in_one_process")
def test_outage_is_not_an_invalid_row(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    def fail(method: str, path: str) -> None:
        if path.endswith("7.png") and method == "GET":
            raise ConnectionError("the connection was reset")

    with object_stores.FaultyFileSystem.fresh() as files:
        upload(small_catalog, "abfs://source")
        files.fault = fail
        with pytest.raises(StoreError, match=r"7\.png.*connection was reset"):
            index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
        files.fault = None
        report = index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl", resume=True)
    assert (report.added, report.failed) == (12, ())


@pytest.mark.usefixtures("in_one_process")
def test_folder_with_a_table_is_not_listed_and_each_image_is_read_once(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*_: Any, **__: Any) -> None:
        raise AssertionError("the folder was listed")

    with object_stores.FaultyFileSystem.fresh() as files:
        upload(small_catalog, "abfs://source")
        files.requests.clear()
        monkeypatch.setattr(files, "find", listed)
        assert index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl").added == 12
        read = [path for method, path in files.requests if method == "GET" and path.endswith(".png")]
    assert len(read) == len(set(read)) == 12


@pytest.mark.usefixtures("in_one_process")
def test_changed_folder_is_another_job(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    with object_stores.FaultyFileSystem.fresh():
        for number in range(2):
            image = (small_catalog / f"{number}.png").read_bytes()
            fsspec.filesystem("abfs").pipe_file(f"abfs://source/{number}.png", image)
            report = index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
            assert report.added == 1
            index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl", resume=True)
        fsspec.filesystem("abfs").rm_file("abfs://source/0.png")
        with pytest.raises(DataError, match="the source"):
            index("abfs://source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl", resume=True)
        with pytest.raises(OptionError, match="no kind"):
            index("abfs://source", tmp_path / "shop", toy, kinds={"a": "no kind"}, record=tmp_path / "run.jsonl")


@pytest.mark.usefixtures("in_one_process")
def test_captions_that_are_not_read_are_reported(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    with object_stores.FaultyFileSystem.fresh():
        files = fsspec.filesystem("abfs")
        files.pipe_file("abfs://source/0.png", (small_catalog / "0.png").read_bytes())
        files.pipe_file("abfs://source/shop.csv", b"file_name,text\n0.png,a red dress\n")
        with pytest.warns(UserWarning, match="give abfs://source/shop.csv as the source"):
            index("abfs://source", tmp_path / "one", toy, record=tmp_path / "run.jsonl")
        index("abfs://source/shop.csv", tmp_path / "two", toy, record=tmp_path / "run.jsonl")
        with Catalog(tmp_path / "two") as catalog:
            assert [columns["text"] for columns, *_ in stored(catalog).values()] == ["a red dress"]


@pytest.mark.slow
def test_several_workers_fetch_images(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(150):  # three chunks
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / f"{number}.png")
    report = index(f"local://{folder}", tmp_path / "shop", toy, workers=2, record=tmp_path / "run.jsonl")
    assert (report.added, report.failed) == (150, ())
    with Catalog(tmp_path / "local", toy) as local, Catalog(tmp_path / "shop") as catalog:
        local.add_folder(folder)
        assert stored(catalog).keys() == stored(local).keys()
