"""`unidiff mcp`, by the client of the official package: in this process, and over standard input and output."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="needs the mcp extra")

from mcp import Client, StdioServerParameters, stdio_client
from PIL import Image
from support.toy_bundle import make_search_bundle

from unidiff_sdk import Catalog
from unidiff_sdk.cli.servers.mcp_tools import create_mcp
from unidiff_sdk.generation.provenance import read_recipe


def with_client(catalog: Catalog, use: Callable[[Client], Awaitable[Any]], *, allow_writes: bool = False) -> Any:
    """The result of an async function of a client."""

    async def run() -> Any:
        server = create_mcp(catalog, allow_writes=allow_writes, max_images=4, max_size=64)
        async with Client(server) as client:
            return await use(client)

    return asyncio.run(run())


def call(catalog: Catalog, tool: str, /, allow_writes: bool = False, **arguments: Any) -> Any:
    return with_client(catalog, lambda client: client.call_tool(tool, arguments), allow_writes=allow_writes)


def images_of(result: Any) -> list[Image.Image]:
    content = [each for each in result.content if each.type == "image"]
    return [Image.open(io.BytesIO(base64.b64decode(each.data))) for each in content]


def test_tools_describe_their_arguments(catalog: Catalog) -> None:
    async def tools(client: Client) -> dict[str, Any]:
        return {tool.name: tool for tool in (await client.list_tools()).tools}

    reading = with_client(catalog, tools)
    assert reading.keys() == {"search", "get", "columns", "generate"}
    assert with_client(catalog, tools, allow_writes=True).keys() == {*reading, "add"}
    for tool in reading.values():
        assert tool.annotations.read_only_hint and tool.description
        assert all(each.get("description") for each in tool.input_schema["properties"].values()), tool.name


def test_bundle_without_a_generator_has_no_tool_that_generates(tmp_path: Path) -> None:
    async def tools(client: Client) -> set[str]:
        return {tool.name for tool in (await client.list_tools()).tools}

    with Catalog(":memory:", bundle=make_search_bundle(tmp_path / "bundle")) as searching:
        assert with_client(searching, tools) == {"search", "get", "columns"}


def test_search_equals_the_catalog(catalog: Catalog) -> None:
    known = catalog.browse(limit=1)[0]
    kind = next(iter(catalog.facets("type")))
    arguments: dict[str, Any] = {"text": "red", "like": [known.id], "where": {"type": kind}, "limit": 3}
    result, page = call(catalog, "search", **arguments), catalog.search(**arguments)
    assert not result.is_error
    assert [hit["id"] for hit in result.structured_content["hits"]] == [hit.id for hit in page]
    assert json.loads(result.content[0].text) == result.structured_content
    shown = images_of(result)
    assert [image.tobytes() for image in shown] == [
        Image.open(io.BytesIO(hit.thumbnail_bytes())).tobytes() for hit in page
    ]
    following = call(catalog, "search", **arguments | {"cursor": page.cursor, "thumbnails": False})
    assert [hit["id"] for hit in following.structured_content["hits"]] == [
        hit.id for hit in catalog.search(**arguments, cursor=page.cursor)
    ]
    assert not images_of(following)


def test_search_by_an_image(catalog: Catalog) -> None:
    known = catalog.browse(limit=5)[4]
    result = call(catalog, "search", image=base64.b64encode(known.image_bytes()).decode(), limit=1)
    assert result.structured_content["hits"][0]["id"] == known.id


def test_get_and_columns(catalog: Catalog) -> None:
    known = catalog.browse(limit=1)[0]
    result = call(catalog, "get", id=known.id)
    assert result.structured_content["columns"] == known.payload and len(images_of(result)) == 1
    facts = call(catalog, "columns").structured_content
    assert facts == {"columns": catalog.columns(), "items": len(catalog)}


def test_generate_reports_progress_and_adds_nothing(catalog: Catalog) -> None:
    before, known, seen = len(catalog), catalog.browse(limit=1)[0], []

    async def on_progress(done: float, total: float | None, message: str | None) -> None:
        seen.append((done, total))

    async def use(client: Client) -> Any:
        arguments = {"prompt": "red boots", "n": 2, "seed": 3, "steps": 3, "like": known.id, "strength": 1.0}
        return await client.call_tool("generate", arguments, progress_callback=on_progress)

    result = with_client(catalog, use)
    expected = catalog.generate("red boots", n=2, seed=3, steps=3, like=known, strength=1.0)
    assert [image.convert("RGB").tobytes() for image in images_of(result)] == [
        each.image.tobytes() for each in expected
    ]
    assert [each["nearest"]["id"] for each in result.structured_content["images"]] == [
        each.nearest.id for each in expected if each.nearest
    ]
    first = next(each for each in result.content if each.type == "image")
    assert read_recipe(io.BytesIO(base64.b64decode(first.data))).arguments["prompt"] == "red boots"
    assert seen and seen[-1][0] == seen[-1][1]
    assert len(catalog) == before


def test_add(catalog: Catalog) -> None:
    image = base64.b64encode(catalog.browse(limit=1)[0].image_bytes()).decode()
    try:
        result = call(catalog, "add", allow_writes=True, image=image, text="new", id="new", columns={"price": 3})
        assert result.structured_content == {"id": "new"}
        stored = catalog.get("new")
        assert stored is not None and stored.text == "new" and stored.payload["price"] == 3
        assert call(catalog, "add", image=image).is_error, "there is no such tool without --allow-writes"
    finally:
        catalog.delete("new")


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("search", {"text": "red", "limit": 0}, "limit"),
        ("search", {"text": "red", "where": {"price": {"near": 1}}}, "near"),
        ("search", {}, "text"),
        ("search", {"image": "?"}, "not base64"),
        ("search", {"like": ["nothing"]}, "no item with the id 'nothing'"),
        ("get", {"id": "nothing"}, "no item with the id 'nothing'"),
        ("generate", {"prompt": "red", "n": 5}, "at most 4"),
        ("generate", {"prompt": "red", "width": 128}, "at most 64 pixels"),
        ("generate", {"prompt": "red", "steps": 0}, "steps"),
    ],
)
def test_errors_say_what_is_wrong(catalog: Catalog, tool: str, arguments: dict[str, Any], says: str) -> None:
    result = call(catalog, tool, **arguments)
    assert result.is_error and says in result.content[0].text
    assert str(catalog.folder) not in result.content[0].text


def test_a_missing_image_names_no_file(tmp_path: Path, toy: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        catalog.add([Image.new("RGB", (8, 8), "red")], ids=["red"])
        hit = catalog.get("red")
        assert hit is not None
        for folder in ("images", "thumbnails"):
            for file in (catalog.folder / folder).rglob("*.*"):
                file.unlink()
        result = call(catalog, "get", id="red")
        assert result.content[1].text == "The image of 'red' is missing or damaged."
        generated = call(catalog, "generate", prompt="red", like="red")
        assert generated.is_error and str(tmp_path) not in generated.content[0].text


def test_the_command_speaks_over_standard_streams(tmp_path: Path, toy: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        catalog.add([Image.new("RGB", (8, 8), color) for color in ("red", "blue")], ["red", "blue"], ["r", "b"])
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "unidiff_sdk", "mcp", str(tmp_path / "shop.catalog")]
    )

    async def run() -> Any:
        async with Client(stdio_client(command)) as client:
            return await client.call_tool("search", {"text": "red", "limit": 1})

    result = asyncio.run(run())
    assert result.structured_content["hits"][0]["id"] in ("r", "b") and len(images_of(result)) == 1
