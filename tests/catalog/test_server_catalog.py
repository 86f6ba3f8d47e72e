"""A catalog on a server that misbehaves or that other clients write to, too."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import models
from support.color_bundle import COLORS, color_image, make_color_bundle
from support.misbehaving_server import MisbehavingServer

from unidiff_sdk import Catalog, ServerOptions, StoreError

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    server = MisbehavingServer()
    yield server
    server.stop()


def open_catalog(server: MisbehavingServer, folder: Path, bundle: Path, **options: Any) -> Catalog:
    return Catalog(server.url, bundle, images=folder, server=ServerOptions(timeout=5, **options))


def test_close_does_not_wait_for_a_paused_writer(server: MisbehavingServer, tmp_path: Path, bundle: Path) -> None:
    catalog = open_catalog(server, tmp_path / "images", bundle)
    paused, errors = threading.Event(), []

    def choose(request: Any) -> Any:
        if request.method == "PUT":
            paused.set()
            return 429, 50
        return None

    def add() -> None:
        try:
            catalog.add(color_image("red"), ids="red")
        except StoreError as error:
            errors.append(str(error))

    server.choose = choose
    writer = threading.Thread(target=add)
    writer.start()
    assert paused.wait(20)
    started = time.perf_counter()
    catalog.close()
    writer.join(20)
    assert time.perf_counter() - started < 10
    assert len(errors) == 1 and "closed while waiting to repeat a request" in errors[0]
    with pytest.raises(StoreError, match="is closed"):
        catalog.count()


@pytest.mark.filterwarnings("ignore:.* are skipped, because this SDK did not store them")
def test_points_of_other_clients_are_neither_shown_nor_changed(
    server: MisbehavingServer, tmp_path: Path, bundle: Path
) -> None:
    with open_catalog(server, tmp_path / "images", bundle) as catalog:
        catalog.add([color_image(color) for color in COLORS], ids=list(COLORS), texts=list(COLORS))
        vector = server.client.scroll("catalog", limit=1, with_vectors=True)[0][0].vector
        foreign = [
            models.PointStruct(id=1, vector=vector, payload={"price": 3}),
            models.PointStruct(id=str(uuid.uuid4()), vector=vector, payload={"id": "red", "_unidiff": None}),
            models.PointStruct(id=str(uuid.uuid4()), vector={}, payload={"id": [], "_unidiff": {"sha256": 1}}),
        ]
        server.client.upsert("catalog", foreign)
        ids = set(COLORS)
        assert {hit.id for hit in catalog.search("red", limit=len(ids))} == ids
        assert {hit.id for hit in catalog.browse(limit=50)} == ids
        assert len(catalog) == len(ids)
        assert catalog.duplicates(0.999) == []
        assert set(catalog.facets("text")) == ids
        assert set(catalog.info()["columns"]) == {"id", "text"}
        assert catalog.delete(list(ids)) == len(ids)
    assert server.client.count("catalog").count == len(foreign)
