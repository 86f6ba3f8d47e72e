"""A catalog folder from a stranger: what it names is not followed out of the folder, and nothing else is deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.color_bundle import COLORS, color_image, make_color_bundle

from unidiff_sdk import BundleError, Catalog, ImageError, StoreError
from unidiff_sdk.inference.folder.files import BundleFiles
from unidiff_sdk.store.payload import SYSTEM
from unidiff_sdk.store.protocol import Record


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, an optimized catalog, and documents next to it."""
    folder = tmp_path_factory.mktemp("template")
    make_color_bundle(folder / "bundle")
    with Catalog(folder / "shop.catalog", folder / "bundle") as catalog:
        catalog.add([color_image(color) for color in COLORS], ids=list(COLORS))
        catalog.optimize()
    for name in ("docs/letter.txt", "docs/7/chapter.txt", "docs/current"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("9")
    return folder


@pytest.fixture
def shop(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "shop.catalog"


def change(shop: Path, **values: Any) -> None:
    """Change values of catalog.json; `bundle_dim` is the dim of the bundle."""
    content = json.loads((shop / "catalog.json").read_text())
    for name, value in values.items():
        (content["bundle"] if name.startswith("bundle_") else content)[name.removeprefix("bundle_")] = value
    (shop / "catalog.json").write_text(json.dumps(content))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(
    "vectors",
    [
        "../docs",
        "",
        ".",
        "..",
        "images",
        "thumbnails",
        "vectors/../../docs",
        "vectors-",
        "vectors-0/../../docs",
        7,
        None,
        "{}",
    ],
)
def test_store_name_in_catalog_file_is_refused(shop: Path, vectors: Any) -> None:
    change(shop, vectors=str(shop.parent / "docs") if vectors == "{}" else vectors)
    before = files(shop.parent)
    with pytest.raises(StoreError, match=r"catalog\.json is damaged"):
        Catalog(shop, create=False)
    assert files(shop.parent) == before


@pytest.mark.parametrize(
    "values",
    [
        {"bundle_dim": 10**9},
        {"bundle_dim": True},
        {"bundle_dim": "4"},
        {"bundle_path": 5},
        {"bundle_path": "../../bundle"},
        {"bundle": []},
        {"created": {}},
    ],
)
def test_catalog_file_of_other_types_is_refused(shop: Path, values: dict[str, Any]) -> None:
    change(shop, **values)
    with pytest.raises(StoreError, match=r"catalog\.json is damaged"):
        Catalog(shop)


def test_bundle_elsewhere_is_not_read_unless_its_fingerprint_fits(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_color_bundle(shop.parent / "docs" / "other", variant=1)
    change(shop, bundle_path=str(other), bundle_absolute=str(other))
    read: list[Path] = []
    check = BundleFiles.check
    monkeypatch.setattr(BundleFiles, "check", lambda files: read.append(files.folder) or check(files))
    with Catalog(shop) as catalog:
        with pytest.raises(StoreError, match="is another bundle"):
            catalog.search("red")
        (other / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"manifest\.json: the file is missing"):
            catalog.search("red")
    assert read == []


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"{}", b"7" * 6000, b" " * 2_000_000])
def test_catalog_file_that_is_no_object_is_refused(shop: Path, content: bytes) -> None:
    (shop / "catalog.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"catalog\.json is damaged"):
        Catalog(shop)


@pytest.mark.parametrize("current", ["../../docs", "..", ".", "", "/etc", "lock", "1/../../../docs", "٣", "9" * 5000])
def test_current_shard_is_a_number(shop: Path, current: str) -> None:
    (shop / "vectors" / "current").write_text(current)
    before = files(shop.parent)
    with pytest.raises(StoreError, match="current"):
        Catalog(shop)
    assert files(shop.parent) == before


def link_vectors(shop: Path) -> None:
    (shop / "vectors").rename(shop.parent / "vectors")
    (shop / "vectors").symlink_to("../docs")


def link_vectors_inside(shop: Path) -> None:
    (shop / "vectors").rename(shop.parent / "vectors")
    (shop / "vectors").symlink_to("images")


def link_current(shop: Path) -> None:
    (shop / "vectors" / "current").unlink()
    (shop / "vectors" / "current").symlink_to("../../docs/current")


def link_shard(shop: Path) -> None:
    (shop / "vectors" / "1").rename(shop.parent / "1")
    (shop / "vectors" / "1").symlink_to("../../1")


def link_segments(shop: Path) -> None:
    (shop / "vectors" / "1" / "segments").rename(shop.parent / "segments")
    (shop / "vectors" / "1" / "segments").symlink_to("../../../segments")


def link_lock(shop: Path) -> None:
    (shop / "vectors" / "lock").unlink()
    (shop / "vectors" / "lock").symlink_to("../../docs/new")


def link_catalog_file(shop: Path) -> None:
    (shop / "catalog.json").rename(shop.parent / "catalog.json")
    (shop / "catalog.json").symlink_to("../catalog.json")


LINKS = [link_vectors, link_vectors_inside, link_current, link_shard, link_segments, link_lock, link_catalog_file]


@pytest.mark.parametrize("link", LINKS)
def test_links_are_refused(shop: Path, link: Callable[[Path], None]) -> None:
    link(shop)
    before = files(shop.parent)
    with pytest.raises(StoreError, match="symbolic link"):
        Catalog(shop)
    assert files(shop.parent) == before


def test_other_files_in_the_folders_of_vectors_are_kept(shop: Path) -> None:
    (shop / "vectors" / "notes.txt").write_text("mine")
    (shop / "vectors-backup").mkdir()
    (shop / "vectors-0123456789ab").mkdir()
    make_color_bundle(shop.parent / "other", variant=1)
    with Catalog(shop) as catalog:
        assert (shop / "vectors" / "notes.txt").read_text() == "mine"
        assert catalog.reindex(shop.parent / "other") == len(COLORS)
    assert (shop / "vectors-backup").is_dir() and not (shop / "vectors-0123456789ab").exists()


@pytest.mark.parametrize("uri", ["images/../../docs/letter.png", "../docs/letter.png", "{}"])
def test_foreign_uri_is_not_deleted_or_exported(shop: Path, uri: str) -> None:
    letter = shop.parent / "docs" / "letter.png"
    color_image("red").save(letter)
    with Catalog(shop) as catalog:
        (record,) = catalog._store.retrieve([r.id for batch in catalog._store.scroll() for r in batch][:1])
        system = {**record.payload[SYSTEM], "uri": uri.format(letter.as_uri())}
        catalog._store.upsert([Record(record.id, record.vector, {**record.payload, SYSTEM: system})])
        with pytest.raises(ImageError, match="references=FOLDER"):
            catalog.export(shop.parent / "stolen.parquet")
        assert catalog.delete(record.payload["id"]) == 1
    assert letter.is_file() and not (shop.parent / "stolen.parquet").exists()
