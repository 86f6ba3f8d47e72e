"""A server whose bundle has no generator: it says so, and searches."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

from starlette.testclient import TestClient
from support.toy_bundle import make_search_bundle

from unidiff_sdk import Catalog
from unidiff_sdk.serve import ServerSettings, create_app


def test_server_without_a_generator(tmp_path: Path, small_catalog: Path) -> None:
    with Catalog(":memory:", bundle=make_search_bundle(tmp_path / "bundle")) as catalog:
        catalog.add_folder(small_catalog)
        with TestClient(create_app(catalog, ServerSettings()), raise_server_exceptions=False) as client:
            assert client.get("/v1/info").json()["generates"] is False
            assert len(client.post("/v1/search", json={"text": "red", "limit": 3}).json()["hits"]) == 3
            for path, body in (
                ("/v1/generate", {"prompt": "red"}),
                ("/v1/images/generations", {"prompt": "red"}),
                ("/v1/search", {"text": "red", "imagine": 1}),
                ("/v1/search", {"text": "red", "rerank": 2}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 501, path
                assert answer.json()["detail"].startswith("It has no generator: it searches, but cannot generate")
