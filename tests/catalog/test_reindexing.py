"""Reindexing: the swap, interrupted runs, failed writes, and concurrent searches and writes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from support.color_bundle import COLORS, color_image, make_color_bundle
from support.recorded import open_watched

from unidiff_sdk import Bundle, BusyError, Catalog, StoreError

TIMEOUT = 30  # seconds


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "colors")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "other", variant=1, dim=8)


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        yield catalog


def fill(catalog: Catalog, n: int = 0) -> None:
    catalog.add([color_image(color) for color in COLORS], ids=list(COLORS))
    catalog.add([color_image((k, 2 * k, 99)) for k in range(1, n + 1)], ids=list(range(1, n + 1)))


def test_reindex_swaps_vectors_and_bundle(tmp_path: Path, catalog: Catalog, other: Path) -> None:
    fill(catalog)
    assert catalog.reindex(other) == 4
    assert catalog.search("red")[0].id == "red"
    assert catalog.reindex(other) == 0
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.search("red")[0].id == "red"
        assert catalog.info()["bundle"]["dim"] == 8
        expected = f"vectors-{Bundle.open(other).fingerprint[:12]}"
        assert [path.name for path in catalog.folder.glob("vectors*")] == [expected]


def test_failed_write_of_the_swap_loses_nothing(tmp_path: Path, catalog: Catalog, other: Path) -> None:
    fill(catalog)
    file = tmp_path / "shop.catalog" / "catalog.json"
    content = file.read_bytes()
    file.unlink()
    file.mkdir()  # no file can replace a folder
    for _ in range(2):
        with pytest.raises(StoreError, match=r"catalog\.json cannot be written"):
            catalog.reindex(other)
    assert catalog.search("red")[0].id == "red"
    catalog.close()
    file.rmdir()
    file.write_bytes(content)
    with Catalog(tmp_path / "shop.catalog") as again:
        assert again.count() == 4 and again.info()["bundle"]["dim"] == 4
        assert again.reindex(other) == 4


def test_interrupted_reindex_continues(tmp_path: Path, catalog: Catalog, other: Path) -> None:
    fill(catalog, 70)
    encoded: list[int] = []

    def interrupt(graph: str, feeds: Mapping[str, np.ndarray]) -> None:
        if len(encoded) == 1:
            encoded.append(0)
            raise KeyboardInterrupt
        encoded.append(len(feeds["pixel_values"]))

    with pytest.raises(KeyboardInterrupt):
        catalog.reindex(open_watched(other, interrupt))
    assert catalog.get(3) and catalog.count() == 74
    catalog.delete(3)
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.reindex(open_watched(other, interrupt)) == 73
        assert catalog.count() == 73 and catalog.get(3) is None
    assert sum(encoded) in (73, 74)  # no image was encoded twice


def test_searches_and_writes_continue_during_a_reindex(catalog: Catalog, other: Path) -> None:
    fill(catalog, 64)
    started, proceed = threading.Event(), threading.Event()

    def wait(graph: str, feeds: Mapping[str, np.ndarray]) -> None:
        started.set()
        assert proceed.wait(TIMEOUT)

    reindexing = threading.Thread(target=catalog.reindex, args=(open_watched(other, wait),))
    reindexing.start()
    assert started.wait(TIMEOUT)
    assert len(catalog.search(image=color_image("red"), limit=3)) == 3
    catalog.add(color_image((1, 2, 3)), "late", "late")
    catalog.delete(5)
    with pytest.raises(StoreError, match="is being reindexed already"):
        catalog.reindex(other)
    proceed.set()
    reindexing.join(2 * TIMEOUT)
    assert not reindexing.is_alive()
    assert catalog.bundle.path == other
    assert {hit.id for hit in catalog.browse(limit=1000)} == (set(COLORS) | set(range(1, 65)) | {"late"}) - {5}


def test_store_that_searches_still_read_is_not_opened_again(
    tmp_path: Path, catalog: Catalog, bundle: Path, other: Path
) -> None:
    """The bundles change A, B, A, B while something still reads the first store of B."""
    fill(catalog, 4)
    catalog.reindex(other)
    reading = catalog.parts()
    catalog.reindex(bundle)
    with pytest.raises(BusyError, match="searches or generations that began then still read its store"):
        catalog.reindex(other)
    assert reading.store.count() == catalog.count() and catalog.bundle.path == bundle
    assert reading.bundle.path == other
    del reading
    gc.collect()
    assert catalog.reindex(other) == catalog.count()
