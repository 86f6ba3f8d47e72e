"""`Catalog.add` of more items than are stored at once: what is stored if it fails, and how the error reports it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.color_bundle import make_color_bundle
from support.misbehaving_server import MisbehavingServer

from unidiff_sdk import Catalog, ImageError, ServerOptions, StoreError
from unidiff_sdk.catalog import writer
from unidiff_sdk.store.edge.store import EdgeStore

BATCH, COUNT = 8, 12


def images(count: int = COUNT) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (20 * n, 0, 90)) for n in range(count)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "COMMIT_SIZE", BATCH)


@pytest.fixture
def catalog(bundle: Path) -> Iterator[Catalog]:
    with Catalog(":memory:", bundle) as catalog:
        yield catalog


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let a write of the store fail, counted from 1."""
    upsert, calls = EdgeStore.upsert, []

    def upsert_or_fail(self: EdgeStore, records: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise StoreError("The disk is full.")
        upsert(self, records)

    monkeypatch.setattr(EdgeStore, "upsert", upsert_or_fail)


def test_failed_batch_keeps_the_batches_before(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.add(images(3), ids=[COUNT - 1, 0, 1])  # the last one is stored already, and does not change
    fail_at(monkeypatch, 2)
    made = images()
    made[COUNT - 1] = images(3)[0]
    with pytest.raises(StoreError, match=r"disk is full\. 9 of 12 items are stored; StoreError\.stored_ids") as failed:
        catalog.add(made, ids=range(COUNT))
    assert failed.value.stored_ids == (*range(BATCH), COUNT - 1)
    assert len(catalog) == len(failed.value.stored_ids)
    assert all(catalog.get(id) is not None for id in failed.value.stored_ids)
    assert pickle.loads(pickle.dumps(failed.value)).stored_ids == failed.value.stored_ids
    assert catalog.add(made, ids=range(COUNT)) == [*range(COUNT)] and len(catalog) == COUNT


def test_failure_of_the_first_batch_is_reported_as_it_is(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 1)
    with pytest.raises(StoreError, match=r"^The disk is full\.$") as failed:
        catalog.add(images(), ids=range(COUNT))
    assert failed.value.stored_ids == () and len(catalog) == 0


def test_invalid_last_image_stores_nothing(catalog: Catalog) -> None:
    with pytest.raises(ImageError):
        catalog.add([*images(COUNT - 1), b"not an image"], ids=range(COUNT))
    assert len(catalog) == 0


def test_last_embedding_that_is_not_finite_stores_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = catalog._current.snapshot.encoder
    encode = encoder.encode_images

    def encode_images(some: list[Image.Image]) -> np.ndarray:
        vectors = np.array(encode(some))
        vectors[[image.getpixel((0, 0)) == images()[-1].getpixel((0, 0)) for image in some]] = np.nan
        return vectors

    monkeypatch.setattr(encoder, "encode_images", encode_images)
    with pytest.raises(StoreError, match=f"embedding of item {COUNT - 1} contains NaN"):
        catalog.add(images(), ids=range(COUNT))
    assert len(catalog) == 0


def test_server_that_fails_between_batches(bundle: Path, tmp_path: Path) -> None:
    server = MisbehavingServer()
    try:
        with Catalog(server.url, bundle, images=tmp_path / "images", server=ServerOptions(retries=0)) as catalog:
            writes: list[str] = []

            def choose(request: Any) -> Any:
                if request.method == "PUT":
                    writes.append(request.path)
                return 507 if request.method == "PUT" and len(writes) == 2 else None

            server.choose = choose
            with pytest.raises(StoreError, match=r"status 507.*8 of 12 items are stored") as failed:
                catalog.add(images(), ids=range(COUNT))
            assert len(catalog) == len(failed.value.stored_ids) == BATCH
    finally:
        server.stop()
