"""Generation over HTTP: the images of the catalog, events, limits, and OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from unidiff_sdk import Catalog, GenerationError
from unidiff_sdk.generation.provenance import read_recipe
from unidiff_sdk.serve import ServerSettings, create_app

ASKED = {"prompt": "purple boots", "n": 2, "seed": 7, "steps": 3}


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_images_are_those_of_the_catalog(client: TestClient, catalog: Catalog, tmp_path: Path) -> None:
    response = client.post("/v1/generate", json=ASKED).json()
    expected = catalog.generate(**ASKED)
    assert response["generated"] == 2 and [each["seed"] for each in response["images"]] == [e.seed for e in expected]
    for ours, theirs in zip(response["images"], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(opened(ours["image"])), np.asarray(theirs.image))
        assert ours["score"] == pytest.approx(theirs.score, abs=1e-6)
        assert ours["nearest"]["id"] == theirs.nearest.id and ours["recipe"] == theirs.recipe
        (tmp_path / "x.png").write_bytes(base64.b64decode(ours["image"]))
        assert read_recipe(tmp_path / "x.png").arguments["seed"] == theirs.seed


def test_variations_and_masks(client: TestClient, catalog: Catalog) -> None:
    item = catalog.browse(limit=1)[0]
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    options = {"prompt": "in blue", "seed": 1, "steps": 3}
    asked = options | {"like": item.id, "mask": base64.b64encode(buffer.getvalue()).decode()}
    ours = np.asarray(opened(client.post("/v1/generate", json=asked).json()["images"][0]["image"]))
    theirs = catalog.generate(**options, like=item, mask=buffer.getvalue())[0]
    np.testing.assert_array_equal(ours, np.asarray(theirs.image))


def test_lora_reaches_the_model(client: TestClient) -> None:
    """The model of the tests has none, so its name comes back in the problem."""
    response = client.post("/v1/generate", json=ASKED | {"lora": {"studio-light": 0.6}})
    assert response.status_code == 422 and "no switchable LoRA 'studio-light'" in response.json()["detail"]


def test_events_are_progress_previews_and_the_result(client: TestClient) -> None:
    response = client.post("/v1/generate", json=ASKED, headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    names = [name for name, _ in events]
    assert names.count("progress") >= 3 and names[-1] == "result" and names.count("result") == 1
    previews = [content for name, content in events if name == "preview"]
    assert previews and opened(previews[0]["images"][0]).format == "WEBP" and len(previews[0]["images"]) == 2
    plain = client.post("/v1/generate", json=ASKED).json()
    assert events[-1][1]["images"] == plain["images"]


def test_errors_after_the_start_are_events(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(timeout=0.001)
    with TestClient(create_app(catalog, settings), raise_server_exceptions=False) as client:
        (event,) = events_of(client.post("/v1/generate", json=ASKED, headers={"Accept": "text/event-stream"}).text)[-1:]
        assert event[0] == "error" and event[1]["status"] == 504
        plain = client.post("/v1/generate", json=ASKED | {"steps": 50})
        assert plain.status_code == 504 and "too long" in plain.json()["title"]
        search = client.post("/v1/search", json={"text": "x", "imagine": 4})
        assert search.status_code == 504


def test_failures_of_a_stream_are_in_the_log_with_the_id_of_the_request(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise GenerationError("the scheduler is of another size")

    monkeypatch.setattr(type(catalog), "agenerate", fail)
    with TestClient(create_app(catalog), raise_server_exceptions=False) as client:
        response = client.post("/v1/generate", json=ASKED, headers={"Accept": "text/event-stream"})
    ((kind, problem),) = events_of(response.text)
    assert kind == "error" and problem["request_id"] == response.headers["x-request-id"]
    (record,) = [record for record in caplog.records if problem["request_id"] in record.getMessage()][:1]
    assert record.exc_info is not None and "another size" in str(record.exc_info[1])


def test_too_many_generations_are_refused(catalog: Catalog) -> None:
    settings = ServerSettings(max_generations=1)
    with TestClient(create_app(catalog, settings), raise_server_exceptions=False) as client:
        slow = threading.Thread(target=client.post, args=("/v1/generate",), kwargs={"json": ASKED | {"steps": 40}})
        slow.start()
        deadline = time.monotonic() + 20
        while 'unidiff_running{kind="generations"} 1.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        refused = client.post("/v1/generate", json=ASKED)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        streamed = client.post("/v1/generate", json=ASKED, headers={"Accept": "text/event-stream"})
        assert streamed.status_code == 429 and "retry-after" in streamed.headers
        assert client.post("/v1/search", json={"text": "boots"}).status_code == 200
        slow.join()
        assert client.post("/v1/generate", json=ASKED).status_code == 200


class TestOpenAi:
    """With the real client, on a real socket."""

    @pytest.fixture
    def openai(self, catalog: Catalog) -> Iterator[Any]:
        module = pytest.importorskip("openai")
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(create_app(catalog), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield module.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
        server.should_exit = True
        thread.join()

    def test_images_and_edits(self, openai: Any, catalog: Catalog) -> None:
        found = openai.images.generate(model="tiny", prompt="purple boots", n=2, size="64x64", extra_body={"seed": 7})
        expected = catalog.generate("purple boots", n=2, seed=7, width=64, height=64)
        for ours, theirs in zip(found.data, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(opened(ours.b64_json)), np.asarray(theirs.image))

        item = catalog.browse(limit=1)[0]
        mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
        mask.paste((0, 0, 0, 0), (32, 0, 64, 64))  # transparent where to repaint
        buffer = io.BytesIO()
        mask.save(buffer, "PNG")
        edited = openai.images.edit(
            image=("x.png", item.image_bytes()), mask=("m.png", buffer.getvalue()), prompt="in blue",
            extra_body={"seed": 3},
        )  # fmt: skip
        ours = np.asarray(opened(edited.data[0].b64_json), int)
        original = np.asarray(item.load_image(), int)
        assert np.abs(ours[:, :24] - original[:, :24]).max() == 0
        assert np.abs(ours[:, 40:] - original[:, 40:]).max() > 10

    def test_embeddings(self, openai: Any, catalog: Catalog) -> None:
        item = catalog.browse(limit=1)[0]
        data = base64.b64encode(item.image_bytes()).decode()
        found = openai.embeddings.create(model="tiny", input=["red boots", "a dress"], encoding_format="float")
        vectors = np.array([each.embedding for each in found.data])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert [hit.id for hit in catalog.search(vector=vectors[0])] == [hit.id for hit in catalog.search("red boots")]
        mixed = openai.embeddings.create(model="tiny", input=[{"image": data}, "red boots"])  # base64 by default
        assert catalog.search(vector=mixed.data[0].embedding, limit=1)[0].id == item.id
        np.testing.assert_allclose(mixed.data[1].embedding, vectors[0], atol=1e-6)

    def test_errors_are_those_of_the_client(self, openai: Any) -> None:
        import openai as module

        for call in (
            lambda: openai.images.generate(prompt="x", n=0),
            lambda: openai.images.generate(prompt="x", size="big"),
            lambda: openai.images.generate(prompt="x", extra_body={"unknown": 1}),
            lambda: openai.embeddings.create(model="tiny", input=[]),
            lambda: openai.embeddings.create(model="tiny", input="x", dimensions=7),
        ):
            with pytest.raises(module.UnprocessableEntityError):
                call()
