"""Catalogs with their images in object storage: on one machine, on several, and over HTTP."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from support.local_qdrant import URL, use_local_qdrant
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, OptionError, StoredImageError, StoreError
from unidiff_sdk.cli.main import main
from unidiff_sdk.serve import create_app
from unidiff_sdk.store.images import ItemImage, checking


def image(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, np.uint8)


@pytest.fixture
def images() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stored(images: str) -> set[str]:
    files = fsspec.filesystem("memory")
    root = "/" + images.partition("://")[2]
    return {path.removeprefix(f"{root}/") for path in files.find(root)}


def test_folder_with_images_elsewhere_is_opened_again(tmp_path: Path, toy: Path, images: str) -> None:
    with Catalog(tmp_path / "shop", toy, images=images) as catalog:
        catalog.add([image(k) for k in range(3)], ids=[0, 1, 2])
        catalog.delete(2)
    assert not (tmp_path / "shop" / "images").exists()
    assert {name.split("/")[0] for name in stored(images)} == {"catalog.json", "images", "thumbnails"}
    assert len(stored(images)) == 1 + 2 + 2, "the deleted image is gone"
    with Catalog(tmp_path / "shop", images=images) as catalog:
        hit = catalog.get(1)
        assert hit is not None and np.array_equal(np.asarray(hit.load_image()), image(1))
        assert hit.image_path().read_bytes() == hit.image_bytes()
        assert hit.thumbnail().size == (8, 8)
        assert [found.id for found in catalog.search(image=hit, limit=1)] == [1]
        with pytest.raises(StoreError, match="signed URLs"):
            hit.image_url(expires=60)
        with pytest.raises(OptionError, match="expires"):
            hit.image_url(expires=0)
        report = catalog.check()
        assert (report.items, report.missing_images, report.orphaned_images) == (2, (), ())


def test_images_must_be_named_at_each_opening(tmp_path: Path, toy: Path, images: str) -> None:
    Catalog(tmp_path / "shop", toy, images=images).close()
    with pytest.raises(StoreError, match=rf"are at {images}. Give images='{images}'"):
        Catalog(tmp_path / "shop")
    Catalog(tmp_path / "plain", toy).close()
    with pytest.raises(StoreError, match=r"are in its folder\. Omit images="):
        Catalog(tmp_path / "plain", images=f"{images}-other")


def test_images_of_another_catalog_are_refused(tmp_path: Path, toy: Path, images: str) -> None:
    Catalog(tmp_path / "shop", toy, images=images).close()
    before = stored(images)
    with pytest.raises(StoreError, match="another catalog"):
        Catalog(tmp_path / "other", toy, images=images)
    assert stored(images) == before and not (tmp_path / "other" / "catalog.json").exists()


def test_check_finds_missing_and_unused_images(tmp_path: Path, toy: Path, images: str) -> None:
    files, root = fsspec.filesystem("memory"), "/" + images.partition("://")[2]
    with Catalog(tmp_path / "shop", toy, images=images) as catalog:
        catalog.add([image(k) for k in range(2)], ids=[0, 1])
        hit = catalog.get(0)
        assert hit is not None
        files.rm_file(f"{root}/{hit.uri}")
        orphan = f"images/ab/{'ab' * 32}.png"
        files.pipe_file(f"{root}/{orphan}", b"image")
        report = catalog.check()
        assert report.missing_images == (0,) and report.orphaned_images == (orphan,)
        assert catalog.check(repair=True).orphaned_images == (orphan,)
        assert catalog.check().orphaned_images == ()
        with pytest.raises(StoredImageError, match="missing"):
            hit.load_image()


def make_old(images: str) -> None:
    """Let all files of an image store look two hours old."""
    files = fsspec.filesystem("memory")
    for path in files.find("/" + images.partition("://")[2]):
        files.store[path].created -= timedelta(hours=2)


def test_clock_of_this_machine_does_not_decide_which_files_are_old(
    toy: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_local_qdrant(monkeypatch)
    with Catalog(URL, toy, images=images) as catalog:
        catalog.add(image(1), ids=1)
        orphan = f"images/ab/{'ab' * 32}.png"
        fsspec.filesystem("memory").pipe_file(f"{images}/{orphan}", b"written by another machine now")
        ahead = SimpleNamespace(time=lambda: time.time() + 7200)
        monkeypatch.setattr(checking, "time", ahead)
        assert catalog.check(repair=True).orphaned_images == () and orphan in stored(images)
        make_old(images)
        assert catalog.check(repair=True).orphaned_images == (orphan,) and orphan not in stored(images)


def test_image_that_another_machine_deletes_while_it_is_added_is_stored_again(
    tmp_path: Path, toy: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is an old orphan, which the add finds and the check deletes just before the item is stored."""
    use_local_qdrant(monkeypatch)
    with Catalog(URL, toy, images=images) as catalog, Catalog(URL, images=images, create=False) as other:
        sha256 = catalog._images.add(ItemImage(image(1))).rpartition("/")[2].partition(".")[0]
        make_old(images)
        catalog._images._stored.clear()  # another process added it
        upsert, reports = type(catalog._store).upsert, []

        def late(store: Any, records: Any) -> None:
            reports.append(other.check(repair=True))
            upsert(store, records)

        monkeypatch.setattr(type(catalog._store), "upsert", late)
        catalog.add(image(1), ids=1)
        assert len(reports) == 1 and any(sha256 in name for name in reports[0].orphaned_images)
        assert other.check().missing_images == ()
        hit = other.get(1)
        assert hit is not None and np.array_equal(np.asarray(hit.load_image()), image(1))


def test_temporary_catalog_has_no_images_elsewhere(images: str) -> None:
    with pytest.raises(OptionError, match="temporary"):
        Catalog(":memory:", images=images)


def test_export_and_restore(tmp_path: Path, toy: Path, images: str) -> None:
    with Catalog(tmp_path / "shop", toy, images=images) as catalog:
        catalog.add([image(k) for k in range(3)], ids=[0, 1, 2])
        catalog.export(tmp_path / "shop.parquet")
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "copy", images=f"{images}-copy") as copy:
        hit = copy.get(2)
        assert hit is not None and np.array_equal(np.asarray(hit.load_image()), image(2))


# ------------------------------------------------------------------------------------------------ several machines


def test_other_machine_finds_the_catalog_by_its_urls(
    tmp_path: Path, toy: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_local_qdrant(monkeypatch)
    with Catalog(URL, toy, images=images) as catalog:
        catalog.add([image(k) for k in range(3)], ids=[0, 1, 2])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second machine"))
        with Catalog(URL, images=images, create=False) as second:
            second.add(image(7), ids=7)
            hit = catalog.get(7)
            assert hit is not None and np.array_equal(np.asarray(hit.load_image()), image(7))
        other = make_toy_bundle(tmp_path / "other", seed=5)
        assert catalog.reindex(other) == 4
    with Catalog(URL, images=images) as again:
        assert again.bundle.path == other and len(again) == 4, "the second machine follows the reindexing"
    with pytest.raises(StoreError, match=rf"no catalog at {images}-none"):
        Catalog(URL, images=f"{images}-none", create=False)


def test_damaged_shared_file_is_reported(toy: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_qdrant(monkeypatch)
    Catalog(URL, toy, images=images).close()
    files, name = fsspec.filesystem("memory"), "/" + images.partition("://")[2] + "/catalog.json"
    for content in (b"", b"{", b"[]", b'{"format": "unidiff-catalog", "schema_version": 1}'):
        files.pipe_file(name, content)
        with pytest.raises(StoreError, match=f"{images}/catalog.json") as raised:
            Catalog(URL, images=images)
        assert "\n" not in str(raised.value)


def test_server_sends_the_images(tmp_path: Path, toy: Path, images: str) -> None:
    with Catalog(tmp_path / "shop", toy, images=images) as catalog:
        catalog.add(image(5), ids="five")
        client = TestClient(create_app(catalog))
        hit = catalog.get("five")
        assert hit is not None
        assert client.get("/v1/items/five/image").content == hit.image_bytes()
        assert client.get("/v1/items/five/image?size=128").headers["content-type"] == "image/webp"


def test_commands_take_the_url_of_the_images(tmp_path: Path, small_catalog: Path, toy: Path, images: str) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    store = ("--image-store", images)
    run("index", small_catalog, tmp_path / "shop", "--bundle", toy, *store)
    assert "12" in run("info", tmp_path / "shop", *store)
    refused = CliRunner().invoke(main, ["info", str(tmp_path / "shop"), "--image-store", str(tmp_path)])
    assert refused.exit_code == 2 and "only for the URL of a Qdrant server" in refused.stderr
