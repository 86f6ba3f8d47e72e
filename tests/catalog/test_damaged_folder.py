"""A catalog with missing parts is refused and left as it is; a creation that was killed or raced is not damage."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.color_bundle import COLORS, color_image, make_color_bundle
from support.local_qdrant import URL, use_local_qdrant

from unidiff_sdk import Bundle, Catalog, StoreError
from unidiff_sdk.catalog.catalog_file import CatalogFile


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bundles and an optimized catalog, whose current shard is 1."""
    folder = tmp_path_factory.mktemp("template")
    make_color_bundle(folder / "bundle")
    make_color_bundle(folder / "other", variant=1, dim=8)
    with Catalog(folder / "shop.catalog", folder / "bundle") as catalog:
        catalog.add([color_image(color) for color in COLORS], ids=list(COLORS))
        catalog.optimize()
    return folder


@pytest.fixture
def shop(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "shop.catalog"


def name_absent_shard(shop: Path) -> None:
    (shop / "vectors" / "current").write_text("2")


def name_incomplete_shard(shop: Path) -> None:
    (shop / "vectors" / "2").mkdir()
    (shop / "vectors" / "current").write_text("2")


def remove_current(shop: Path) -> None:
    (shop / "vectors" / "current").unlink()


def keep_two_shards_without_current(shop: Path) -> None:
    shutil.copytree(shop / "vectors" / "1", shop / "vectors" / "0")
    (shop / "vectors" / "current").unlink()


def remove_shards(shop: Path) -> None:
    shutil.rmtree(shop / "vectors" / "1")
    (shop / "vectors" / "current").unlink()


def remove_vectors(shop: Path) -> None:
    shutil.rmtree(shop / "vectors")


def remove_catalog_file(shop: Path) -> None:
    (shop / "catalog.json").unlink()


def keep_only_vectors(shop: Path) -> None:
    for name in ("images", "thumbnails"):
        shutil.rmtree(shop / name)
    (shop / "catalog.json").unlink()


def change_dim(shop: Path) -> None:
    text = (shop / "catalog.json").read_text()
    (shop / "catalog.json").write_text(text.replace('"dim": 4', '"dim": 8'))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (name_absent_shard, "Complete shards in .*: 1"),
    (name_incomplete_shard, "Complete shards in .*: 1"),
    (remove_current, r"current is missing\. Complete shards in .*: 1"),
    (keep_two_shards_without_current, r"current is missing\. Complete shards in .*: 0, 1"),
    (remove_shards, "vectors of this catalog are missing"),
    (remove_vectors, "is missing, so the vectors"),
    (remove_catalog_file, r"has no catalog\.json"),
    (keep_only_vectors, r"4 vectors but no catalog\.json"),
    (change_dim, "vectors of 4 numbers"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_catalog_is_refused_and_nothing_is_deleted(
    shop: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(shop)
    before = {path for path in shop.rglob("*") if path.name not in ("lock", "vectors")}
    with pytest.raises(StoreError, match=message):
        Catalog(shop, shop.parent / "bundle")
    assert {path for path in shop.rglob("*") if path.name not in ("lock", "vectors")} == before


def test_named_repair_works(shop: Path) -> None:
    name_absent_shard(shop)
    with pytest.raises(StoreError):
        Catalog(shop)
    (shop / "vectors" / "current").write_text("1")
    with Catalog(shop) as catalog:
        assert catalog.count() == len(COLORS)


def test_creation_killed_before_catalog_file_is_finished_later(shop: Path) -> None:
    Catalog(shop.parent / "new", shop.parent / "bundle").close()
    (shop.parent / "new" / "catalog.json").unlink()  # it is written last
    with Catalog(shop.parent / "new", shop.parent / "bundle") as catalog:
        catalog.add(color_image("red"), ids="red")
    with Catalog(shop.parent / "new", create=False) as catalog:
        assert catalog.count() == 1


def test_missing_collection_is_refused(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_qdrant(monkeypatch)
    with Catalog(URL, shop.parent / "bundle", images=shop.parent / "images") as catalog:
        catalog.add(color_image("red"), ids="red")
    with pytest.raises(StoreError, match='no collection "elsewhere"'):
        Catalog(URL, images=shop.parent / "images", collection="elsewhere")


def test_creations_at_once_with_two_bundles_do_not_mix(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Bundle.open(shop.parent / name) for name in ("bundle", "other"))
    place, errors = shop.parent / "new", []
    new = CatalogFile.new

    def create_second() -> None:
        try:
            Catalog(place, second).close()
        except StoreError as error:
            errors.append(str(error))

    thread = threading.Thread(target=create_second)

    def while_another_creates(bundle: Bundle, folder: Path, images: str = "") -> CatalogFile:
        if bundle is first:
            thread.start()
            thread.join(0.5)
        return new(bundle, folder, images)

    monkeypatch.setattr(CatalogFile, "new", while_another_creates)
    with Catalog(place, first) as catalog:
        thread.join()
        assert len(errors) == 1 and "was indexed with the bundle" in errors[0]
        catalog.add(color_image("red"), ids="red")
    with Catalog(place) as catalog:
        assert catalog.bundle.fingerprint == first.fingerprint and catalog.count() == 1
