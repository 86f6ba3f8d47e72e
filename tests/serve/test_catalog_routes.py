"""Searching, browsing and changing a catalog over HTTP, compared with the catalog itself."""

from __future__ import annotations

import base64
import io
import json
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.errors import ForbiddenError
from unidiff_sdk.store.filters import FilterError

PROBLEM = "application/problem+json"


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [hit["id"] for hit in response.json()["hits"]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "red boots"},
        {"text": "boots", "limit": 3, "offset": 2},
        {"text": "a dress", "where": {"price": {"lt": 60}}},
        {"text": "dress", "without": "stripes", "weights": {"text": 2, "without": 0.3}},
        {"text": "coat", "group_by": "type"},
        {"text": "dress", "hybrid": True},
        {"text": "dress", "diversity": 0.5},
        {"text": "a long coat", "rerank": 3, "limit": 4},
        {"text": "boots", "imagine": 1},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_search_takes_the_arguments_of_the_catalog(client: TestClient, catalog: Catalog, arguments: dict) -> None:
    response = client.post("/v1/search", json=arguments)
    page = catalog.search(**arguments)
    assert ids(response) == [hit.id for hit in page]
    for ours, hit in zip(response.json()["hits"], page, strict=True):
        assert ours["score"] == pytest.approx(hit.score, abs=1e-6)
        assert ours["text"] == hit.text and ours["columns"] == hit.payload
        assert ours["rerank_score"] == pytest.approx(hit.rerank_score, abs=1e-4) if hit.rerank_score else True


def test_search_by_image_in_each_form_and_by_item(client: TestClient, catalog: Catalog) -> None:
    item = catalog.browse(limit=1)[0]
    file = item.image_bytes()
    expected = [hit.id for hit in catalog.search(image=file, limit=3)]
    assert expected[0] == item.id
    forms = [base64.b64encode(file), base64.urlsafe_b64encode(file), base64.urlsafe_b64encode(file).rstrip(b"=")]
    for each in (*(form.decode() for form in forms), f"data:image/png;base64,{forms[0].decode()}"):
        assert ids(client.post("/v1/search", json={"image": each, "limit": 3})) == expected
    upload = client.post("/v1/search", data={"query": json.dumps({"limit": 3})}, files={"image": ("x.png", file)})
    assert ids(upload) == expected
    like = [hit.id for hit in catalog.search(like=item.id, limit=3)]
    assert ids(client.post("/v1/search", json={"like": item.id, "limit": 3})) == like


def test_cursors_continue_a_search(client: TestClient, catalog: Catalog) -> None:
    first = client.post("/v1/search", json={"text": "boots", "limit": 5}).json()
    second = client.post("/v1/search", json={"text": "boots", "limit": 5, "cursor": first["cursor"]})
    assert ids(second) == [hit.id for hit in catalog.search("boots", limit=10)][5:]


def test_browse_facets_columns_and_duplicates(client: TestClient, catalog: Catalog) -> None:
    where = {"price": {"lt": 100}}
    page = client.get("/v1/browse", params={"where": json.dumps(where), "order_by": "-price", "limit": 4})
    assert ids(page) == [hit.id for hit in catalog.browse(where=where, order_by="-price", limit=4)]
    counts = client.get("/v1/facets", params={"column": "type"}).json()["values"]
    assert {each["value"]: each["count"] for each in counts} == catalog.facets("type")
    assert client.get("/v1/columns").json() == catalog.columns() == catalog.info()["columns"]
    groups = client.get("/v1/duplicates", params={"threshold": 0.9}).json()["groups"]
    assert [[hit["id"] for hit in group] for group in groups] == [
        [hit.id for hit in group] for group in catalog.duplicates(0.9)
    ]


def test_info_and_operation(client: TestClient, catalog: Catalog) -> None:
    info = client.get("/v1/info").json()
    assert info["items"] == len(catalog) and info["bundle"]["fingerprint"] == catalog.bundle.fingerprint
    assert info["generates"] and info["writes"]
    assert client.get("/healthz").json() == {"status": "ok"} and client.get("/readyz").json() == {"status": "ready"}
    assert client.head("/healthz").status_code == client.head("/readyz").status_code == 200
    metrics = client.get("/metrics").text
    assert f"unidiff_items {len(catalog)}.0" in metrics
    assert 'unidiff_requests_total{method="GET",route="/v1/info",status="200"} 1.0' in metrics


def test_images_in_each_size(client: TestClient, catalog: Catalog) -> None:
    item = catalog.browse(limit=1)[0]
    url = f"/v1/items/{item.id}/image"
    original = client.get(url)
    assert original.content == item.image_bytes() and original.headers["content-type"] == "image/png"
    assert client.get(url, params={"size": 128}).content == item.thumbnail_bytes()
    smaller = Image.open(io.BytesIO(client.get(url, params={"size": 256}).content))
    assert smaller.format == "WEBP" and max(smaller.size) <= 256
    tag = original.headers["etag"]
    assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
    wrong = client.get(url, params={"size": 100})
    assert wrong.status_code == 422 and "128" in wrong.json()["detail"]


def test_ids_with_any_characters_and_integers(own_client: TestClient) -> None:
    image = base64.b64encode(png()).decode()
    odd = ["a/b", "x y?&#%", "Größe", "image", "a/image", "-5", "a", "a\n", "a\nb", "\r\n"]
    items = [{"id": id, "image": image, "text": f"item {n}"} for n, id in enumerate([*odd, 7])]
    assert own_client.post("/v1/items", json={"items": items}).json() == {"ids": [*odd, 7]}
    for id in [*odd, 7]:
        found = own_client.get(f"/v1/items/{quote(str(id), safe='')}")
        assert found.status_code == 200 and found.json()["id"] == id
        assert own_client.get(found.json()["image"]).status_code == 200
    assert own_client.get("/v1/items/8").status_code == 404


def test_a_string_and_an_integer_with_the_same_digits(own_client: TestClient, own_catalog: Catalog) -> None:
    image = base64.b64encode(png()).decode()
    own_client.post("/v1/items", json={"items": [{"id": "7", "image": image}, {"id": 7, "image": image}]})
    assert own_client.get("/v1/items/7").json()["id"] == "7"
    for refused in (own_client.delete("/v1/items/7"), own_client.patch("/v1/items/7", json={"columns": {"x": 1}})):
        assert refused.status_code == 409 and "the integer" in refused.json()["detail"]
    assert own_catalog.get("7") is not None and own_catalog.get(7) is not None
    assert own_client.request("DELETE", "/v1/items", json={"ids": ["7"]}).json() == {"deleted": 1}
    assert own_client.get("/v1/items/7").json()["id"] == 7
    assert own_client.delete("/v1/items/7").status_code == 204


ASKED = ("query", '{"text": "x"}')


@pytest.mark.parametrize(
    ("path", "parts", "words"),
    [
        ("search", [ASKED, ("photo", b"x")], "a file in the field 'photo'"),
        ("search", [ASKED, ("image", "photo.jpg")], "a text in the field 'image'"),
        ("search", [ASKED, ASKED], "2 fields 'query'"),
        ("search", [("text", "x")], "query (text), image (file)"),
        ("search", [ASKED, *[("image", b"x")] * 300], "Too many files"),
        ("items", [("image", b"x")], "0 fields 'items'"),
        ("images/edits", [("prompt", "x"), ("image", b"x"), ("image[]", b"y")], "2 images"),
        ("images/edits", [("prompt", "x"), ("image", b"x"), ("mask", b"y"), ("mask", b"z")], "2 masks"),
        ("images/edits", [("prompt", "x"), ("image", b"x"), ("photo", b"y")], "'photo'"),
        ("images/edits", [("prompt", "x")], "0 images"),
    ],
)
def test_no_part_of_a_form_is_ignored(
    client: TestClient, path: str, parts: list[tuple[str, str | bytes]], words: str
) -> None:
    files = [(name, (None if isinstance(value, str) else "x.png", value)) for name, value in parts]
    response = client.post(f"/v1/{path}", files=files)
    assert response.status_code == 422 and words in response.json()["detail"], response.text


def test_large_forms_are_read(client: TestClient) -> None:
    """Starlette's own limit of a text field is 1 MiB."""
    query = json.dumps({"text": "boots", "where": {"name": {"in": ["x" * 1000] * 2000}}})
    response = client.post("/v1/search", files=[("query", (None, query))])
    assert "larger" not in response.text and "exceeded" not in response.text, response.text


@pytest.mark.parametrize("name", ["like", "unlike", "without"])
def test_lists_of_examples_are_limited(client: TestClient, name: str) -> None:
    response = client.post("/v1/search", json={"text": "x", name: ["a"] * 257})
    assert response.status_code == 422 and "256" in response.json()["detail"], response.text


def test_a_key_of_the_store_that_may_only_read_is_not_a_reason_to_try_again(
    client: TestClient, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: object, **options: object) -> None:
        raise ForbiddenError("The API key may not create an index.")

    monkeypatch.setattr(type(catalog), "afacets", refuse)
    response = client.get("/v1/facets", params={"column": "type"})
    assert response.status_code == 501 and "Retry-After" not in response.headers


def test_adding_changing_and_deleting(own_client: TestClient, own_catalog: Catalog) -> None:
    red, blue = (png(color) for color in ("red", "blue"))
    items = [{"id": "r", "image": "", "text": "red"}, {"id": "b", "image": "", "text": "blue", "columns": {"stock": 3}}]
    added = own_client.post(
        "/v1/items", data={"items": json.dumps({"items": items})}, files=[("image", red), ("image", blue)]
    )
    assert added.status_code == 201 and added.json() == {"ids": ["r", "b"]}
    stored = own_catalog.get("b")
    assert stored is not None and stored.image_bytes() == blue and stored.payload == {"stock": 3}

    changed = own_client.patch("/v1/items/b", json={"columns": {"stock": None, "price": 2.5}})
    assert changed.json()["columns"] == {"price": 2.5} and changed.json()["text"] == "blue"
    assert ids(own_client.post("/v1/search", json={"text": "blue", "where": {"price": 2.5}})) == ["b"]

    assert own_client.delete("/v1/items/b").status_code == 204
    assert own_client.get("/v1/items/b").status_code == own_client.delete("/v1/items/b").status_code == 404
    assert own_client.request("DELETE", "/v1/items", json={"ids": ["r", "never"]}).json() == {"deleted": 1}


def test_an_invalid_item_stores_nothing(client: TestClient, catalog: Catalog) -> None:
    before = len(catalog)
    good = {"id": "good", "image": base64.b64encode(png()).decode()}
    for bad in ({"image": "AAAA"}, {"image": "not base64!"}, {"image": good["image"], "columns": {"id": 1}}):
        response = client.post("/v1/items", json={"items": [good, bad]})
        assert response.status_code == 422 and response.headers["content-type"] == PROBLEM, response.text
    assert len(catalog) == before


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/search", {}, "The query is empty"),
        ("/v1/search", {"text": "x", "limit": 0}, "1 to 10,000"),
        ("/v1/search", {"text": "x", "limit": "5"}, "limit"),
        ("/v1/search", {"text": "x", "lmit": 5}, "lmit"),
        ("/v1/search", {"text": "x", "where": {"price": {"below": 3}}}, "below"),
        ("/v1/search", {"image": "AAAA"}, "image"),
        ("/v1/search", {"image": "/etc/passwd"}, "image"),
        ("/v1/search", {"like": "nothing"}, "nothing"),
        ("/v1/search", [], "object"),
        ("/v1/generate", {"prompt": ""}, "prompt"),
        ("/v1/generate", {"prompt": "x", "n": 0}, "n is 0"),
        ("/v1/generate", {"prompt": "x", "n": 1000}, "1000 images"),
        ("/v1/generate", {"prompt": "x", "sampler": "magic"}, "magic"),
        ("/v1/generate", {"prompt": "x", "width": 63}, "width"),
        ("/v1/generate", {"prompt": "x", "like": "nothing"}, "nothing"),
        ("/v1/items", {"items": []}, "items"),
    ],
)
def test_bad_input_is_a_problem(client: TestClient, path: str, body: Any, words: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code in (404, 422), response.text
    assert response.headers["content-type"] == PROBLEM
    problem = response.json()
    assert problem["status"] == response.status_code and problem["request_id"] == response.headers["x-request-id"]
    assert words in problem["detail"] and "Traceback" not in response.text and "/site-packages/" not in response.text


def test_other_bodies_and_paths_are_problems(client: TestClient) -> None:
    assert client.post("/v1/search", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    for body in (b"{", b"\xff", b"[" * 10_000, b'{"text": NaN}'):
        response = client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 422 and response.headers["content-type"] == PROBLEM
    assert client.get("/v1/browse", params={"where": "{"}).status_code == 422
    for path in ("/v1/nothing", "/nothing", "/../etc/passwd", "/%2e%2e/app.py"):
        assert client.get(path).status_code == 404


def test_errors_of_the_store_do_not_show_paths(own_client: TestClient, own_catalog: Catalog) -> None:
    own_catalog.close()
    response = own_client.post("/v1/search", json={"text": "x"})
    assert response.status_code == 503 and "Retry-After" in response.headers
    assert response.json()["detail"] == "The log of the server has the reason."
    assert own_client.get("/readyz").status_code == 503 and own_client.get("/healthz").status_code == 200


def test_openapi_describes_bodies_with_examples(client: TestClient) -> None:
    document = client.get("/v1/openapi.json").json()
    search = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(search) == {"application/json", "multipart/form-data"}
    assert document["components"]["schemas"]["SearchRequest"]["examples"]
    assert {"/v1/items/{id}", "/v1/generate", "/v1/facets"} <= set(document["paths"])


def test_filter_errors_are_those_of_the_sdk(client: TestClient, catalog: Catalog) -> None:
    with pytest.raises(FilterError) as raised:
        catalog.browse(where={"price": {"below": 3}})
    response = client.get("/v1/browse", params={"where": '{"price": {"below": 3}}'})
    assert response.json()["detail"] == str(raised.value)


def png(color: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64), color) if color else render(products("fashion-man", 1, 0, "test")[0])
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_masks_and_arrays_are_no_paths(client: TestClient) -> None:
    """A text where an image is expected is base64, never the name of a file."""
    for text in ("", " ", "file:///etc/passwd", "images/00000.png", "A" * 7):
        response = client.post("/v1/generate", json={"prompt": "x", "image": text})
        assert response.status_code == 422, text
    assert np.isfinite(client.post("/v1/search", json={"text": "x", "limit": 1}).json()["hits"][0]["score"])
