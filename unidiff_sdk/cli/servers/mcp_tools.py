"""The tools of `unidiff mcp`: a catalog for language models, by the Model Context Protocol."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ContentBlock, TextContent, ToolAnnotations
from pydantic import Field

from unidiff_sdk._internal.images import decoded_image
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.errors import BusyError, FilterError, GenerationError, ImageError, OptionError, UniDiffError
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.generation.provenance import encode
from unidiff_sdk.store.ids import possible_ids

if TYPE_CHECKING:
    from unidiff_sdk.catalog.catalog import Catalog
    from unidiff_sdk.catalog.results import Generated
    from unidiff_sdk.retrieval.results import Hit

__all__ = ["create_mcp"]

MAX_HITS = 50  # of one search: a language model reads all of them
CALLERS_OWN = (BusyError, FilterError, GenerationError, ImageError, OptionError)  # errors that concern the request
Answer = TypeVar("Answer")
Id = str | int
_log = logging.getLogger(__name__)

INSTRUCTIONS = """\
A catalog of products, each an image with a caption and columns. `search` finds items by text, image or similar items.
`get` shows one item. Call `columns` before you filter."""
GENERATING = " `generate` makes new product images from a prompt and names the most similar item of the catalog."
READING = ToolAnnotations(read_only_hint=True, open_world_hint=False)
ADDING = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)

Where = Annotated[
    dict[str, Any] | None, Field(description='A filter on the columns: {"price": {"lt": 80}, "brand": ["A", "B"]}')
]


def create_mcp(catalog: Catalog, *, allow_writes: bool, max_images: int, max_size: int) -> MCPServer[Any]:
    """Make the MCP server of an open catalog. It has no tool that generates if the bundle has no generator.

    Args:
        catalog: what the tools work on. It stays open when the server ends.
        allow_writes: whether there is a tool that adds items.
        max_images: images that one call may generate, with those that replace rejected ones.
        max_size: the largest width and height of generated images, in pixels.
    """
    instructions = INSTRUCTIONS + (GENERATING if catalog.bundle.generates else "")
    server: MCPServer[Any] = MCPServer(
        "unidiff", instructions=instructions, version=version("unidiff-sdk"), log_level="WARNING"
    )
    _add_reading(server, catalog)
    if catalog.bundle.generates:
        _add_generation(server, catalog, max_images, max_size)
    if allow_writes:
        _add_writing(server, catalog)
    return server


def _add_reading(server: MCPServer[Any], catalog: Catalog) -> None:
    @server.tool(annotations=READING, structured_output=False)
    @_reported
    async def search(
        text: Annotated[str | None, Field(description="What to look for, in words")] = None,
        like: Annotated[list[Id], Field(description="Ids of items to approach; they are not among the hits")] = [],  # noqa: B006
        unlike: Annotated[list[Id], Field(description="Ids of items to avoid")] = [],  # noqa: B006
        without: Annotated[list[str], Field(description="Texts to avoid")] = [],  # noqa: B006
        image: Annotated[str | None, Field(description="An image file in base64, to search with")] = None,
        where: Where = None,
        limit: Annotated[int, Field(ge=1, le=MAX_HITS, description="The maximum number of hits")] = 10,
        cursor: Annotated[str | None, Field(description="Of the previous page, to get the next one")] = None,
        hybrid: Annotated[bool, Field(description="Also rank by the words of the captions, for names and numbers")] = (
            False
        ),
        thumbnails: Annotated[bool, Field(description="Whether to return the images of the hits")] = True,
    ) -> CallToolResult:
        """Find the items most similar to a text, an image, other items, or a mix of these. Best hits come first."""
        page = await catalog.asearch(
            text,
            image=decoded_image("image", image),
            like=[await _stored(catalog, id) for id in like],
            unlike=[await _stored(catalog, id) for id in unlike],
            without=without,
            where=where,
            limit=limit,
            cursor=cursor,
            hybrid=hybrid,
        )
        images = await in_thread(lambda: [_thumbnail(hit) for hit in page]) if thumbnails else []
        return _result({"hits": [_facts(hit) for hit in page], "cursor": page.cursor}, images)

    @server.tool(annotations=READING, structured_output=False)
    @_reported
    async def get(id: Annotated[Id, Field(description="The id of an item")]) -> CallToolResult:
        """Show one item with its caption, its columns and its image."""
        hit = await _stored(catalog, id)
        return _result(_facts(hit), [await in_thread(lambda: _thumbnail(hit))])

    @server.tool(annotations=READING, structured_output=False)
    @_reported
    async def columns() -> CallToolResult:
        """List the columns that items can be filtered by, with their kinds, and count the items."""
        return _result({"columns": await catalog.acolumns(), "items": await catalog.acount()})


def _add_generation(server: MCPServer[Any], catalog: Catalog, max_images: int, max_size: int) -> None:
    @server.tool(annotations=READING, structured_output=False)
    @_reported
    async def generate(
        context: Context[Any, Any],
        prompt: Annotated[str, Field(description="What the images show")],
        n: Annotated[int, Field(ge=1, description="The number of images")] = 1,
        negative_prompt: Annotated[str, Field(description="What to avoid")] = "",
        like: Annotated[Id | None, Field(description="The id of an item to start from")] = None,
        strength: Annotated[float | None, Field(description="With like: how much may change, above 0 up to 1")] = None,
        seed: Annotated[int | None, Field(description="The same seed repeats the images")] = None,
        steps: Annotated[int | None, Field(description="Denoising steps. Default: from the model")] = None,
        guidance_scale: Annotated[float | None, Field(description="How closely to follow the prompt")] = None,
        width: Annotated[int | None, Field(description="In pixels. Default: from the model")] = None,
        height: Annotated[int | None, Field(description="In pixels. Default: from the model")] = None,
        best_of: Annotated[int | None, Field(description="Generate this number, and keep the best n")] = None,
    ) -> CallToolResult:
        """Generate product images from a prompt. Returns them, best first, with the most similar item of the catalog.

        Nothing is added to the catalog.
        """
        options: dict[str, Any] = {
            "n": n, "negative_prompt": negative_prompt, "strength": strength, "seed": seed, "steps": steps,
            "guidance_scale": guidance_scale, "width": width, "height": height, "best_of": best_of,
            "like": None if like is None else await _image_of(await _stored(catalog, like)),
        }  # fmt: skip
        checked = GenerationOptions(**options)
        if checked.max_candidates > max_images:
            raise ToolError(f"This asks for {checked.max_candidates} images; at most {max_images} are allowed.")
        for name, pixels in (("width", width), ("height", height)):
            if pixels is not None and pixels > max_size:
                raise ToolError(f"{name} is {pixels}; at most {max_size} pixels are allowed.")
        generation = await catalog.agenerate(prompt, **options, callback=_progress(context))
        images = await in_thread(lambda: [Image(data=encode(each.image, each.recipe)) for each in generation])
        return _result({"images": [_generated_facts(each) for each in generation]}, images)


def _add_writing(server: MCPServer[Any], catalog: Catalog) -> None:
    @server.tool(annotations=ADDING, structured_output=False)
    @_reported
    async def add(
        image: Annotated[str, Field(description="An image file in base64")],
        text: Annotated[str | None, Field(description="The caption")] = None,
        id: Annotated[Id | None, Field(description="Default: a hash. An item with this id is replaced")] = None,
        columns: Annotated[dict[str, Any] | None, Field(description="Further columns")] = None,
    ) -> CallToolResult:
        """Add an item to the catalog."""
        (stored,) = await catalog.aadd(decoded_image("image", image), text, id, columns or {})
        return _result({"id": stored})


def _reported(tool: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
    """A tool that reports errors of this package to its caller. Those that are not the caller's name files."""

    @wraps(tool)
    async def reported(*args: Any, **kwargs: Any) -> Answer:
        try:
            return await tool(*args, **kwargs)
        except CALLERS_OWN as error:
            raise ToolError(str(error)) from error
        except UniDiffError as error:
            _log.error("%s", error)
            raise ToolError("The catalog cannot do that now. The log has the reason.") from error

    return reported


def _progress(context: Context[Any, Any]) -> Callable[[int, int], None]:
    """A callback of `Catalog.generate` that reports to the client of a call."""
    loop = asyncio.get_running_loop()

    def report(done: int, total: int) -> None:  # in the thread that generates
        asyncio.run_coroutine_threadsafe(context.report_progress(done, total), loop)

    return report


async def _stored(catalog: Catalog, id: Id) -> Hit:
    """The item with an id: "7" is the string or the integer. Raises ToolError if there is none."""
    for candidate in possible_ids(id):
        if (hit := await catalog.aget(candidate)) is not None:
            return hit
    raise ToolError(f"The catalog has no item with the id {id!r:.200}.")


async def _image_of(hit: Hit) -> bytes:
    """The image file of an item. Raises ToolError if it is missing: the message of the ImageError names a file."""
    try:
        return await in_thread(hit.image_bytes)
    except ImageError as error:
        _log.error("the image of an item cannot be read: %s", error)
        raise ToolError(f"The image of {hit.id!r} is missing or damaged.") from error


def _facts(hit: Hit) -> dict[str, Any]:
    return {"id": hit.id, "score": round(hit.score, 4), "text": hit.text, "columns": hit.payload}


def _generated_facts(each: Generated) -> dict[str, Any]:
    nearest = None if each.nearest is None else _facts(each.nearest)
    return {"seed": each.seed, "score": round(each.score, 4), "nearest": nearest}


def _thumbnail(hit: Hit) -> Image | str:
    """The image of an item, or a text if its file is missing or damaged."""
    try:
        return Image(data=hit.thumbnail_bytes(), format="webp")
    except ImageError as error:
        _log.error("the image of an item cannot be read: %s", error)
        return f"The image of {hit.id!r} is missing or damaged."


def _result(facts: dict[str, Any], images: Iterable[Image | str] = ()) -> CallToolResult:
    """The facts as JSON, for programs and as text, and images in the same order."""
    content: list[ContentBlock] = [TextContent(type="text", text=json.dumps(facts, ensure_ascii=False))]
    for image in images:
        content.append(TextContent(type="text", text=image) if isinstance(image, str) else image.to_image_content())
    return CallToolResult(content=content, structured_content=facts)
