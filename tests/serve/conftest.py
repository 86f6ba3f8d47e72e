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


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "products"
    write_catalog("fashion-woman", folder, n=ITEMS, seed=1, split="train")
    return folder


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.open("tiny", threads=1, verify=False)


@pytest.fixture(scope="session")
def catalog(products: Path, bundle: Bundle) -> Iterator[Catalog]:
    """A catalog that many tests read. A test that changes it takes `own_catalog`."""
    with Catalog(":memory:", bundle=bundle) as opened:
        opened.add_folder(products)
        yield opened


@pytest.fixture
def own_catalog(products: Path, bundle: Bundle) -> Iterator[Catalog]:
    """A catalog of one test."""
    with Catalog(":memory:", bundle=bundle) as opened:
        opened.add_folder(products)
        yield opened


@pytest.fixture
def client(catalog: Catalog) -> Iterator[TestClient]:
    """Reading and writing, without keys."""
    with TestClient(create_app(catalog, ServerSettings(allow_writes=True)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def own_client(own_catalog: Catalog) -> Iterator[TestClient]:
    """Reading and writing `own_catalog`, without keys."""
    settings = ServerSettings(allow_writes=True)
    with TestClient(create_app(own_catalog, settings), raise_server_exceptions=False) as client:
        yield client
