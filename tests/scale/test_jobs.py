"""Whole bulk jobs in one process: what is recorded, what a resumed run does, and where results are stored."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from support import local_ray, object_stores

from unidiff_sdk import Bundle, BundleError, Catalog, DataError, OptionError, StoreError
from unidiff_sdk.catalog import snapshot
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.scale import generate, generating, index, indexing
from unidiff_sdk.scale.cluster import _check_room
from unidiff_sdk.scale.run_file import RunFile
from unidiff_sdk.scale.stages import Encode, ImageFolder
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ItemImage

object_stores.register()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    local_ray.use(monkeypatch)


@pytest.fixture
def shards(small_catalog: Path, tmp_path: Path) -> Path:
    """The small catalog as two shards."""
    (tmp_path / "shards").mkdir()
    rows = [json.loads(line) for line in (small_catalog / "metadata.jsonl").read_text().splitlines()]
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for row in rows[6 * number : 6 * number + 6]:
                stem = Path(row["file_name"]).stem
                (tmp_path / "text").write_text(row["text"])
                tar.add(small_catalog / row["file_name"], f"{stem}.png")
                tar.add(tmp_path / "text", f"{stem}.txt")
    return tmp_path / "shards"


# ------------------------------------------------------------------------------------------------ indexing


def test_shard_that_cannot_be_fetched_is_not_recorded_as_done(
    shards: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")
    for shard in shards.iterdir():
        files.pipe_file(f"{root}/{shard.name}", shard.read_bytes())
    plain = type(files).get_file

    def failing(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith("1.tar"):
            raise OSError("the connection was reset")
        return plain(self, path, *args, **kwargs)

    record = tmp_path / "run.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(type(files), "get_file", failing)
        with pytest.raises(StoreError, match="connection was reset"):
            index(root, tmp_path / "shop", toy, record=record)
    report = index(root, tmp_path / "shop", toy, record=record, resume=True)
    assert (report.added, report.failed) == (12, ())
    with Catalog(tmp_path / "shop") as catalog:
        assert catalog.count() == 12


def test_exports_name_the_object_storage_that_items_came_from(shards: Path, toy: Path, tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(f"{root}/0.tar", (shards / "0.tar").read_bytes())
    index(root, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    with Catalog(tmp_path / "shop") as catalog:
        catalog.export(tmp_path / "shop.parquet")
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "again") as catalog:
        (records,) = catalog._store.scroll()
        assert {record.payload["_unidiff"]["source"] for record in records} == {root}
    again = index(root, tmp_path / "again", toy, record=tmp_path / "run.jsonl")
    assert (again.added, again.skipped) == (0, 6)


def test_record_of_a_deleted_catalog_is_not_continued(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    shutil.rmtree(tmp_path / "shop")
    time.sleep(1.1)  # a catalog is known by the second in which it was created
    with pytest.raises(DataError, match="another job"):
        index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl", resume=True)


def test_writers_do_not_create_a_catalog_of_their_own(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that does not see the folder of the job."""
    opened: list[dict[str, Any]] = []
    plain = indexing.Store.__init__

    def noted(self: Any, opening: Any) -> None:
        opened.append(dict(opening))
        plain(self, opening)

    monkeypatch.setattr(indexing.Store, "__init__", noted)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    index(tmp_path / "images", tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    (opening,) = opened
    with pytest.raises(StoreError):
        Catalog(**{**opening, "location": tmp_path / "elsewhere"})
    assert not (tmp_path / "elsewhere").exists()


def test_workers_require_the_bundle_of_the_job(toy: Path) -> None:
    """Another export can be under the same path on another machine."""
    stage = Encode(str(toy), 64 * "0", "cpu", None, 1)
    with pytest.raises(BundleError, match="fingerprint"):
        stage._encoder  # noqa: B018


def test_image_without_an_embedding_is_an_invalid_row(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product of a layer in half precision can overflow. The job must not end at the same image in each run."""
    plain = Encoder.encode_pixels
    calls = 0

    def overflowing(self: Encoder, pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if any((image == bad).all() for image in pixels):
            raise BundleError("the image encoder (fp16) returns embeddings that are zero or not finite")
        return plain(self, pixels)

    row = json.loads((small_catalog / "metadata.jsonl").read_text().splitlines()[3])
    encoder = Encoder(Bundle.open(toy))
    bad = encoder.pixels(Image.open(small_catalog / row["file_name"]).convert("RGB"))
    monkeypatch.setattr(Encoder, "encode_pixels", overflowing)
    report = index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl", batch_size=8)
    assert report.added == 11 and [(each.file_name, each.line) for each in report.failed] == [(row["file_name"], 4)]
    assert calls == 2 + 8
    monkeypatch.setattr(Encoder, "encode_pixels", lambda *_: (_ for _ in ()).throw(BundleError("every image")))
    with pytest.raises(BundleError, match="every image"):
        index(small_catalog, tmp_path / "other", toy, record=tmp_path / "run.jsonl")


@pytest.mark.parametrize("is_seen", [True, False], ids=["same machine", "machine without the catalog"])
def test_image_that_is_deleted_after_it_was_encoded(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_seen: bool
) -> None:
    """It is stored already where the process that encodes has the folder, and is an invalid row elsewhere."""
    shutil.copytree(small_catalog, tmp_path / "source")
    row = json.loads((small_catalog / "metadata.jsonl").read_text().splitlines()[3])
    plain = indexing.Store.__call__

    def deleting(self: Any, batch: Any) -> Any:
        (tmp_path / "source" / row["file_name"]).unlink()
        return plain(self, batch)

    monkeypatch.setattr(indexing.Store, "__call__", deleting)
    if not is_seen:
        monkeypatch.setattr(ImageFolder, "open", lambda _: None)
    report = index(tmp_path / "source", tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    lost = [] if is_seen else [(row["file_name"], 4)]
    assert [(each.file_name, each.line) for each in report.failed] == lost
    assert (report.added, report.skipped) == (12 - len(lost), 0)
    with Catalog(tmp_path / "shop") as catalog:
        found = catalog.check()
        assert found.items == report.added and not found.missing_images and not found.orphaned_images


def test_each_image_is_read_once(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = ItemImage._read

    def counted(self: ItemImage, path: Path) -> bytes:
        read.append(path.name)
        return plain(self, path)

    monkeypatch.setattr(ItemImage, "_read", counted)
    index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    assert len(read) == len(set(read)) == 12


def test_the_first_of_a_chunk_has_the_id(toy: Path, tmp_path: Path) -> None:
    """Its image is stored, and those of the others are not."""
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": "a square", "id": "same", "rank": n} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = index(tmp_path, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    assert (report.added, report.skipped, report.failed) == (1, 2, ())
    with Catalog(tmp_path / "shop") as catalog:
        item = catalog.get("same")
        assert item is not None and item.payload["rank"] == 0
        found = catalog.check()
        assert not found.missing_images and not found.orphaned_images


def test_progress_needs_no_readable_part(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_bytes(b"file_name,text\n\xff,x\n")
    report = index(tmp_path / "0.csv", tmp_path / "shop", toy, record=tmp_path / "run.jsonl", progress=True)
    assert report.added == 0 and report.failed


def test_cluster_without_room_is_reported() -> None:
    with pytest.warns(UserWarning, match="needs 9 cores and 0 GPUs, and the cluster has 8 cores"):
        _check_room({"CPU": 8.0}, 9, 0)
    with pytest.warns(UserWarning, match="2 GPUs, and the cluster has 9 cores and 1 GPUs"):
        _check_room({"CPU": 9.0, "GPU": 1.0}, 9, 2)
    with warnings.catch_warnings(action="error"):
        _check_room({"CPU": 9.0, "GPU": 2.0}, 9, 2)


def test_invalid_kind_is_refused_and_not_a_row(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no kind"):
        index(small_catalog, tmp_path / "shop", toy, kinds={"price": "no kind"}, record=tmp_path / "run.jsonl")


def test_temporary_catalog_is_refused(small_catalog: Path, toy: Path) -> None:
    with pytest.raises(OptionError, match="memory"):
        index(small_catalog, ":memory:", toy)


def test_large_folder_gets_its_search_index(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(snapshot, "OPTIMIZE_FROM", 12)
    monkeypatch.setattr(EdgeStore, "optimize", lambda store: sizes.append(store.count()))
    index(small_catalog, tmp_path / "shop", toy, record=tmp_path / "run.jsonl")
    assert sizes == [12]


def test_datasets_of_the_hub_are_read(small_catalog: Path, toy: Path, tmp_path: Path) -> None:
    """Those of `save_to_disk`, and those in the cache of the hub, where names are links to files without a suffix."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [json.loads(line) for line in (small_catalog / "metadata.jsonl").read_text().splitlines()]
    table = pa.table(
        {
            "image": [{"bytes": (small_catalog / row["file_name"]).read_bytes(), "path": None} for row in rows],
            "text": [row["text"] for row in rows],
        }
    )
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as to:
        to.write_table(table)
    cached, blobs = tmp_path / "hub" / "snapshots" / "main" / "data", tmp_path / "hub" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    pyarrow.parquet.write_table(table, blobs / "5f3a")
    (cached / "train.parquet").symlink_to(blobs / "5f3a")
    for source in (saved, cached.parent):
        report = index(source, tmp_path / f"{source.name}.catalog", toy, record=tmp_path / "run.jsonl")
        assert (report.added, report.failed) == (12, ()), source


def test_relative_places_belong_to_the_folder_of_the_caller(
    small_catalog: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a cluster has another working folder, and so may the next run."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("workers", "a", "b"):
        (tmp_path / folder).mkdir()

    @contextmanager
    def elsewhere(cores: int, gpus: float) -> Iterator[Any]:
        with chdir(tmp_path / "workers"), local_ray.ray_data(cores, gpus) as data:
            yield data

    for module in (generating, indexing):
        monkeypatch.setattr(module, "ray_data", elsewhere)
    monkeypatch.chdir(tmp_path / "a")
    shutil.copytree(toy, tmp_path / "a" / "bundle")
    (tmp_path / "a" / "prompts.txt").write_text("a red dress\n")
    index(small_catalog, "shop", "bundle")
    generate("prompts.txt", "out", steps=1)
    assert not any((tmp_path / "workers").iterdir())
    with Catalog("shop") as catalog:
        assert catalog.count() == 12
    assert len(list(Path("out/images").iterdir())) == 1
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(DataError, match="no record"):
        generate(tmp_path / "a" / "prompts.txt", "out", steps=1, resume=True)
    with pytest.raises(DataError, match="no record"):
        index(small_catalog, "shop", tmp_path / "a" / "bundle", resume=True)


# ------------------------------------------------------------------------------------------------ generating


def test_another_threshold_is_another_job(tmp_path: Path) -> None:
    """The images of left-out duplicates are deleted, so a resumed run cannot take them back."""
    (tmp_path / "prompts.txt").write_text("a red dress\na red dress\na red dress\n")
    arguments: dict[str, Any] = {"steps": 1, "record": tmp_path / "run.jsonl"}
    report = generate(tmp_path / "prompts.txt", tmp_path / "out", duplicates=0.1, **arguments)
    assert (report.images, report.duplicates) == (1, 2)
    with pytest.raises(DataError, match="another job"):
        generate(tmp_path / "prompts.txt", tmp_path / "out", duplicates=1, resume=True, **arguments)
    again = generate(tmp_path / "prompts.txt", tmp_path / "out", duplicates=0.1, resume=True, **arguments)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert again.images == 1 and all((tmp_path / "out" / row["file_name"]).is_file() for row in rows)


def test_option_that_the_bundle_does_not_have_is_refused_and_not_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    for options in ({"sampler": "none"}, {"lora": "none"}, {"width": 63}):
        with pytest.raises(OptionError):
            generate(tmp_path / "prompts.txt", tmp_path / "out", record=tmp_path / "run.jsonl", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run.jsonl").exists()


def test_record_of_a_running_job_is_refused(tmp_path: Path) -> None:
    running = RunFile(tmp_path / "run.jsonl", {}, resume=False)
    running.add({"part": 0, "chunk": 0, "last": True})
    for resume in (False, True):
        with pytest.raises(StoreError, match="a job that is running"):
            RunFile(tmp_path / "run.jsonl", {}, resume=resume)
    running.close()
    again = RunFile(tmp_path / "run.jsonl", {}, resume=True)
    assert again.complete == {0}
    again.close()


def test_numbers_of_numpy_are_options(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    report = generate(
        tmp_path / "prompts.txt", tmp_path / "out", n=np.int64(2), steps=np.int32(1), record=tmp_path / "run.jsonl"
    )
    assert report.images == 2


def test_full_disk_is_reported_by_the_record(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    file = RunFile(tmp_path / "run.jsonl", {}, resume=False)
    file.close()
    file._file = Path("/dev/full").open("a")  # noqa: SIM115  # closed below
    with pytest.raises(StoreError, match="cannot be written"):
        file.add({"part": 0, "chunk": 0, "last": True})
    file.close()


def test_undecodable_name_has_a_place_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red dress\n")
    assert generate(tmp_path / "prompts.txt", tmp_path / os.fsdecode(b"out-\xff"), steps=1).images == 1
