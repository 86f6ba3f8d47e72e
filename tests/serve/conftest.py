"""A served catalog of a few rendered products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

from starlette.testclient import TestClient

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.datasets.synthetic import write_catalog
from unidiff_sdk.serve import ServerSettings, create_app

ITEMS = 12


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "products"
    write_catalog("fashion-woman", folder, n=ITEMS, seed=1, split="train")
    return folder


@pytest.fixture
def catalog(products: Path) -> Iterator[Catalog]:
    with Catalog(":memory:", bundle=Bundle.open("tiny", threads=1, verify=False)) as opened:
        opened.add_folder(products)
        yield opened


@pytest.fixture
def client(catalog: Catalog) -> Iterator[TestClient]:
    """Reading and writing, without keys."""
    with TestClient(create_app(catalog, ServerSettings(allow_writes=True)), raise_server_exceptions=False) as client:
        yield client
