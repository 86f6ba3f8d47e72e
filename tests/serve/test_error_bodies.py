"""Errors say nothing about the files of the server or its code, and repeat no queries, prompts or captions."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from unidiff_sdk import BundleError, Catalog, DataError, GenerationError, ProviderError, StoreError
from unidiff_sdk.serve import ServerSettings, create_app

SECRET = "a very private wish"
LONG = f"{SECRET} " * 2000
CODE = ("Traceback", "site-packages", "unidiff_sdk", ".py", 'File "')

Call = Callable[[TestClient, str], Any]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def post(path: str, **body: Any) -> Call:
    """Post JSON, where an argument "ID" is the id of the item with a broken image."""
    return lambda client, id: client.post(
        f"/v1/{path}", json={name: id if value == "ID" else value for name, value in body.items()}
    )


BROKEN_IMAGE: dict[str, Call] = {
    "smaller image": lambda client, id: client.get(f"/v1/items/{id}/image", params={"size": 256}),
    "variation": post("generate", prompt=SECRET, like="ID", steps=1),
    "re-ranking": post("search", text=SECRET, rerank=12, limit=12),
}
INVALID: dict[str, Call] = {
    "long query": post("search", text=LONG, limit=-1),
    "query of another type": post("search", text=[SECRET]),
    "unknown member": post("search", text=SECRET, lmit=3),
    "search image": post("search", text=SECRET, image="AAAA"),
    "search, a path": post("search", text=SECRET, image="/etc/passwd"),
    "search without text": post("search", text=" ", without=SECRET, group_by="nothing", cursor="x"),
    "windows": post("generate", prompt=LONG, long_prompts="chunk", steps=1),
    "negative windows": post("generate", prompt="x", negative_prompt=LONG, long_prompts="chunk", steps=1),
    "sampler": post("generate", prompt=SECRET, sampler="none"),
    "size": post("generate", prompt=SECRET, width=7),
    "mask": post("generate", prompt=SECRET, image=base64.b64encode(png()).decode(), mask="AAAA"),
    "source": post("generate", prompt=SECRET, image=base64.b64encode(png()[:40]).decode()),
    "OpenAI image": post("images/generations", prompt=SECRET, size="7x7"),
    "embedding": post("embeddings", input=[SECRET, {"image": "AAAA"}]),
    "edit": lambda client, _: client.post(
        "/v1/images/edits", data={"prompt": SECRET}, files={"image": ("/home/x.png", png()[:40])}
    ),
    "item": post("items", items=[{"image": "AAAA", "text": SECRET}]),
    "item, a path": post("items", items=[{"image": "file:///etc/passwd", "text": SECRET}]),
    "column": post("items", items=[{"image": base64.b64encode(png()).decode(), "text": SECRET, "columns": {"id": 1}}]),
    "change": lambda client, id: client.patch(f"/v1/items/{id}", json={"columns": {"text": [SECRET], "id": SECRET}}),
    "delete": lambda client, _: client.request("DELETE", "/v1/items", json={"ids": [{SECRET: 1}]}),
    "browse": lambda client, _: client.get("/v1/browse", params={"where": json.dumps({"price": {SECRET: 1}})[:-1]}),
    "facets": lambda client, _: client.get("/v1/facets", params={"column": "price", "limit": SECRET}),
    "no JSON": lambda client, _: client.post(
        "/v1/generate", content=f'{{"prompt": "{SECRET}"', headers={"Content-Type": "application/json"}
    ),
}


@pytest.fixture(scope="module")
def broken(products: Any, bundle: Any) -> Iterator[tuple[TestClient, Catalog, str]]:
    """A client of a catalog, one of whose items lost its image, and the id of this item."""
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(products)
        hit = catalog.browse(limit=1)[0]
        hit.image_path().write_bytes(png()[:40])
        app = create_app(catalog, ServerSettings(allow_writes=True))
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client, catalog, str(hit.id)


def require_discreet(response: Any, catalog: Catalog) -> None:
    assert response.headers["content-type"] == "application/problem+json"
    folder = catalog.browse(limit=1)[0].image_path().parents[2]
    for part in (SECRET, str(folder), str(folder.parent), catalog.bundle.fingerprint, *CODE):
        assert part not in response.text, response.text
    assert str(catalog.bundle.path) not in response.text


@pytest.mark.parametrize("call", BROKEN_IMAGE.values(), ids=BROKEN_IMAGE.keys())
def test_errors_of_stored_images_name_no_path(broken: tuple[TestClient, Catalog, str], call: Call) -> None:
    client, catalog, id = broken
    response = call(client, id)
    assert response.status_code == 404 and "missing or damaged" in response.json()["detail"], response.text
    require_discreet(response, catalog)


def test_a_missing_image_is_not_found(own_client: TestClient, own_catalog: Catalog) -> None:
    hit = own_catalog.browse(limit=1)[0]
    hit.image_path().unlink()
    response = own_client.get(f"/v1/items/{hit.id}/image")
    assert response.status_code == 404 and "missing or damaged" in response.json()["detail"]
    require_discreet(response, own_catalog)


@pytest.mark.parametrize("call", INVALID.values(), ids=INVALID.keys())
def test_errors_of_arguments_repeat_no_texts(broken: tuple[TestClient, Catalog, str], call: Call) -> None:
    client, catalog, id = broken
    response = call(client, id)
    assert response.status_code == 422, response.text
    require_discreet(response, catalog)


VALID: dict[str, Call] = {
    "asearch": post("search", text=SECRET),
    "agenerate": post("generate", prompt=SECRET),
    "aadd": post("items", items=[{"image": base64.b64encode(png()).decode(), "text": SECRET}]),
    "abrowse": lambda client, _: client.get("/v1/browse"),
    "afacets": lambda client, _: client.get("/v1/facets", params={"column": "price"}),
    "acolumns": lambda client, _: client.get("/v1/columns"),
    "aupdate": lambda client, id: client.patch(f"/v1/items/{id}", json={"columns": {"stock": 1}}),
    "adelete": lambda client, id: client.delete(f"/v1/items/{id}"),
}


@pytest.mark.parametrize("method", VALID)
@pytest.mark.parametrize("kind", [StoreError, BundleError, ProviderError, GenerationError, DataError, OSError])
def test_errors_of_the_server_say_nothing_about_it(
    broken: tuple[TestClient, Catalog, str], method: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, catalog, id = broken
    folder = catalog.browse(limit=1)[0].image_path().parents[2]

    async def fail(*_: Any, **__: Any) -> None:
        raise kind(f"{folder}/shop.py: cannot be read for {SECRET!r}")

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, method, fail)
        response = VALID[method](client, id)
    assert response.status_code in (500, 501, 503), response.text
    require_discreet(response, catalog)
