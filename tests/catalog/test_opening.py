"""Opening and closing: folders that move, bundles that move or change, locks, servers, and what is not a catalog."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.color_bundle import COLORS, color_image, make_color_bundle
from support.local_qdrant import URL, use_local_qdrant

from unidiff_sdk import Bundle, BundleError, Catalog, OptionError, StoreError

# qdrant-client's local mode warns that it ignores payload indexes and search parameters.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect", "ignore:Local mode performs exact")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_color_bundle(tmp_path / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        yield catalog


def fill(catalog: Catalog) -> None:
    prices = [{"price": 10.0 * n} for n in range(len(COLORS))]
    catalog.add([color_image(color) for color in COLORS], ids=list(COLORS), payloads=prices)


# ------------------------------------------------------------------------------------------------ folders


def test_catalog_is_the_same_after_reopening(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
        catalog.optimize()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.search("red")[0].id == "red"
        assert catalog.search("red")[0].load_image().size == (40, 30)


@pytest.mark.parametrize("inside", [True, False])
def test_catalog_and_bundle_can_be_moved_together(tmp_path: Path, inside: bool) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    place = Path("shop.catalog/bundle") if inside else Path("bundle")
    make_color_bundle(tmp_path / "bundle")
    old.mkdir()
    if not inside:
        shutil.move(tmp_path / "bundle", old / "bundle")
    with Catalog(old / "shop.catalog", tmp_path / "bundle" if inside else old / "bundle") as catalog:
        fill(catalog)
        color_image("red").save(old / "sibling.png")
        catalog.add(old / "sibling.png", ids="sibling", copy=False)
    if inside:
        shutil.move(tmp_path / "bundle", old / place)
        Catalog(old / "shop.catalog", old / place).close()
    shutil.move(old, new)
    with Catalog(new / "shop.catalog", references=new) as catalog:
        hit = catalog.search("red")[0]
        assert hit.id in ("red", "sibling") and hit.load_image().size == (40, 30)
        assert catalog.bundle.path == new / place
        sibling = catalog.get("sibling")
        assert sibling and sibling.load_image().size == (40, 30)


def test_catalog_can_be_moved_alone(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tmp_path / "shop.catalog", tmp_path / "far" / "away")
    for _ in range(2):
        with Catalog(tmp_path / "far" / "away" / "shop.catalog") as catalog:
            assert catalog.search("red")[0].load_image().size == (40, 30)


def test_missing_bundle_is_an_error_only_where_it_is_needed(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    bundle.rename(tmp_path / "elsewhere")
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.count() == catalog.info()["items"] == 4
        with pytest.raises(BundleError, match=r"is not at .*bundle\. Move it back, or give its new place"):
            catalog.search("red")
    with Catalog(tmp_path / "shop.catalog", tmp_path / "elsewhere") as catalog:
        assert catalog.search("red")[0].id == "red"
    with Catalog(tmp_path / "shop.catalog") as catalog:  # the new place is remembered
        assert catalog.search("red")[0].id == "red"


@pytest.mark.parametrize("dim", [4, 8])
def test_another_bundle_is_refused(tmp_path: Path, bundle: Path, dim: int) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    other = make_color_bundle(tmp_path / "other", variant=1, dim=dim)
    with pytest.raises(StoreError, match=r"is another bundle.*catalog\.reindex") as refused:
        Catalog(tmp_path / "shop.catalog", other)
    assert ("8 dimensions instead of 4" in str(refused.value)) == (dim == 8)
    make_color_bundle(bundle, variant=2)  # another bundle at the same path
    with Catalog(tmp_path / "shop.catalog") as catalog:
        with pytest.raises(StoreError, match="is another bundle"):
            catalog.search("red")
        assert catalog.count() == 4


def test_second_opening_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(StoreError, match=r"shop\.catalog is in use"):
        Catalog(tmp_path / "shop.catalog")


def test_opening_in_another_process_is_refused(catalog: Catalog) -> None:
    script = "import sys; from unidiff_sdk import Catalog; Catalog(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", script, str(catalog.folder)], capture_output=True, text=True, check=False
    )
    assert "StoreError" in run.stderr and "in use" in run.stderr


def test_closed_catalog_refuses_every_call(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()
    calls: list[Callable[[], Any]] = [
        catalog.count,
        catalog.info,
        catalog.optimize,
        lambda: catalog.search("red"),
        lambda: catalog.search_batch(["red"]),
        lambda: catalog.browse(),
        lambda: catalog.facets("price"),
        lambda: catalog.duplicates(),
        lambda: catalog.add(color_image("red")),
        lambda: catalog.get("a"),
        lambda: catalog.delete("a"),
        lambda: catalog.generate("red"),
        lambda: catalog.reindex("tiny"),
        lambda: catalog.export(catalog.folder / "shop.parquet"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="closed"):
            call()


def test_memory_catalog_leaves_no_files(bundle: Path) -> None:
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        folder = catalog.folder
        assert folder.is_dir()
    assert not folder.exists()
    forgotten = Catalog(bundle=bundle)
    fill(forgotten)
    forgotten.search("red")
    folder = forgotten.folder
    del forgotten
    assert not folder.exists()


def test_other_folders_are_refused(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(StoreError, match=r"There is no catalog at .*unidiff index"):
        Catalog(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StoreError, match="is not a catalog"):
        Catalog(bundle, bundle)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is not a catalog"):
        Catalog(tmp_path / "file", bundle)
    with pytest.raises(BundleError):
        Catalog(tmp_path / "new", tmp_path / "missing")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "unidiff-catalog", "schema_version": 1}', "\0"])
def test_damaged_catalog_file_is_refused(tmp_path: Path, bundle: Path, content: str) -> None:
    Catalog(tmp_path / "shop.catalog", bundle).close()
    (tmp_path / "shop.catalog" / "catalog.json").write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        Catalog(tmp_path / "shop.catalog")


def test_catalog_file_of_a_later_version_is_refused(tmp_path: Path, bundle: Path) -> None:
    Catalog(tmp_path / "shop.catalog", bundle).close()
    file = tmp_path / "shop.catalog" / "catalog.json"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StoreError, match="Upgrade"):
        Catalog(tmp_path / "shop.catalog")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_refused(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        Catalog(tmp_path / "locked" / "shop.catalog", bundle)


# ------------------------------------------------------------------------------------------------ servers


def test_catalog_on_a_server(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_qdrant(monkeypatch)
    with Catalog(URL, bundle, images=tmp_path / "images") as catalog:
        fill(catalog)
        catalog.delete("yellow")
    with Catalog(URL, images=tmp_path / "images") as catalog:
        hit = catalog.search("red", where={"price": {"lt": 15}})[0]
        assert hit.id == "red" and hit.load_image().size == (40, 30)
        assert catalog.count() == 3
    with pytest.raises(StoreError, match="another bundle"):
        Catalog(URL, make_color_bundle(tmp_path / "other", variant=1), images=tmp_path / "more")
    with pytest.raises(OptionError, match="A Qdrant server stores no images"):
        Catalog(URL, bundle)
    with pytest.raises(OptionError, match="quantization='scalar' applies to a folder"):
        Catalog(URL, bundle, images=tmp_path / "images", quantization="scalar")


def test_reindex_on_a_server_creates_a_collection(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = use_local_qdrant(monkeypatch)
    other = make_color_bundle(tmp_path / "other", variant=1, dim=8)
    fingerprint = Bundle.open(other).fingerprint
    with Catalog(URL, bundle, images=tmp_path / "images", collection="shop") as catalog:
        fill(catalog)
        with Catalog(URL, bundle, images=tmp_path / "images", collection="shop") as elsewhere:
            assert catalog.reindex(other) == 4
            assert catalog.search("red")[0].id == "red" and catalog.info()["bundle"]["dim"] == 8
            catalog.delete("red")
            assert elsewhere.search("red")[0].id == "red"  # with the bundle and the collection it was opened with
    with Catalog(URL, images=tmp_path / "images", collection="shop") as catalog:
        assert catalog.info()["bundle"]["fingerprint"] == fingerprint and catalog.count() == 3
    assert {found.name for found in client.get_collections().collections} == {"shop", f"shop-{fingerprint[:12]}"}
