"""Searching and browsing, items and their images."""

from __future__ import annotations

import io
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor

from unidiff_sdk._internal.images import decoded_image
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.retrieval.results import Hit, Page
from unidiff_sdk.serve.context import (
    Context,
    body_of,
    form_schema,
    hit_response,
    page_response,
    until_disconnected,
    where_of,
)
from unidiff_sdk.serve.limits import checked_route
from unidiff_sdk.serve.problems import ANY_ROUTE, ProblemError, problem_responses
from unidiff_sdk.serve.schemas import (
    BundleInfo,
    ColumnsChange,
    DeleteRequest,
    DeleteResponse,
    FacetsResponse,
    FacetValue,
    GroupsResponse,
    HitResponse,
    IdsResponse,
    InfoResponse,
    ItemsRequest,
    PageResponse,
    SearchRequest,
)
from unidiff_sdk.store.images import THUMBNAIL_SIZE

__all__ = ["catalog_routes", "searched"]

MEDIA_TYPES = {
    **dict.fromkeys((".jpg", ".jpeg"), "image/jpeg"),
    **{f".{name}": f"image/{name}" for name in ("png", "webp", "gif", "bmp", "avif")},
    **dict.fromkeys((".tif", ".tiff"), "image/tiff"),
}
IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "The image is the one that If-None-Match names"},
}
SIZES = (THUMBNAIL_SIZE, 256, 512, 1024)


class ItemIdConvertor(PathConvertor):
    """An id in a path: it may contain slashes, and line breaks, at which other convertors end."""

    regex = r"(?s:.*)"


register_url_convertor("item_id", ItemIdConvertor())
Where = Annotated[str | None, Query(description='A filter on the columns as JSON: {"price": {"lt": 80}}')]


def catalog_routes(context: Context) -> list[APIRouter]:
    """The routes of a catalog: those that read, and those that change it."""
    catalog, settings = context.catalog, context.settings
    reading, writing = (
        APIRouter(
            prefix="/v1", route_class=checked_route(check), tags=["catalog"], responses=problem_responses(*ANY_ROUTE)
        )
        for check in (context.limits.read, context.limits.write)
    )

    @reading.post(
        "/search",
        openapi_extra=form_schema(SearchRequest, "query"),
        responses=problem_responses(404, 415, 501),
    )
    async def search(request: Request) -> PageResponse:
        """Search by text, image, items, or a mix. A form has the JSON in `query` and the image in `image`."""
        return page_response(await searched(context, request))

    @reading.get("/browse")
    async def browse(
        where: Where = None, order_by: str | None = None, limit: int = 10, offset: int = 0
    ) -> PageResponse:
        """List items in the order of a column ("-price" for descending order), without a query."""
        async with context.searches.entered(settings.timeout):
            condition = where_of(where)
            return page_response(await catalog.abrowse(where=condition, order_by=order_by, limit=limit, offset=offset))

    @reading.get("/facets")
    async def facets(column: str, where: Where = None, limit: int = 100) -> FacetsResponse:
        """Count the items with each value of a column, the most frequent first."""
        async with context.searches.entered(settings.timeout):
            counts = await catalog.afacets(column, where=where_of(where), limit=limit)
        values = [FacetValue(value=value, count=count) for value, count in counts.items()]
        return FacetsResponse(column=column, values=values)

    @reading.get("/duplicates")
    async def duplicates(threshold: float = 0.95, where: Where = None) -> GroupsResponse:
        """Groups of items with almost the same image. Takes a search for each item."""
        condition = where_of(where)
        groups = await context.scans.run(catalog.aduplicates(threshold, where=condition), settings.timeout)
        return GroupsResponse(groups=[[hit_response(hit) for hit in group] for group in groups])

    @reading.get("/columns")
    async def columns() -> dict[str, str]:
        """The columns by name, with their kinds."""
        return await catalog.acolumns()

    # The longer paths come first: an id may contain slashes.

    @reading.get("/items/{id:item_id}/image", response_class=Response, responses=IMAGE | problem_responses(404))
    async def image(request: Request, id: str, size: int | None = None) -> Response:
        """The original image, or a smaller WebP: `size` is the longer side, one of 128, 256, 512 and 1024."""
        if not request.scope["raw_path"].endswith(b"/image"):  # the id itself ends so, with an encoded slash
            return JSONResponse(hit_response(await context.item(f"{id}/image")).model_dump())
        if size is not None and size not in SIZES:
            raise ProblemError(422, "An argument is invalid", f"size is {size}; give one of {SIZES}, or omit it.")
        hit = await context.item(id)
        tag = f'"{hit.sha256}-{size or "original"}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=3600"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content, media_type = await in_thread(lambda: _image_file(hit, size))
        return Response(content, media_type=media_type, headers=headers)

    @reading.get("/items/{id:item_id}", responses=problem_responses(404))
    async def item(id: str) -> HitResponse:
        """One item."""
        return hit_response(await context.item(id))

    @writing.post(
        "/items",
        status_code=201,
        openapi_extra=form_schema(ItemsRequest, "items"),
        responses=problem_responses(415),
    )
    async def add(request: Request) -> IdsResponse:
        """Add items, or replace those with the same ids. All are checked before any is stored.

        A form has the JSON in `items`, and an `image` file for each item, whose own `image` is then "".
        """
        body, files = await body_of(request, ItemsRequest, "items", settings.max_body)
        images = _images_of(body, files)
        ids = await catalog.aadd(
            images,
            [each.text for each in body.items],
            [each.id for each in body.items],
            [each.columns for each in body.items],
        )
        return IdsResponse(ids=ids)

    @writing.patch("/items/{id:item_id}", responses=problem_responses(404, 409))
    async def change(id: str, change: ColumnsChange) -> HitResponse:
        """Change columns of an item; null removes one."""
        hit = await context.item(id, unambiguous=True)
        await catalog.aupdate(hit, change.columns)
        return hit_response(await context.item(hit.id))

    @writing.delete("/items/{id:item_id}", status_code=204, responses=problem_responses(404, 409))
    async def delete(id: str) -> Response:
        """Delete an item and its image."""
        await catalog.adelete(await context.item(id, unambiguous=True))
        return Response(status_code=204)

    @writing.delete("/items")
    async def delete_many(body: DeleteRequest) -> DeleteResponse:
        """Delete items and their images. Unknown ids are ignored."""
        return DeleteResponse(deleted=await catalog.adelete(body.ids))

    @reading.get("/info")
    async def info(request: Request) -> InfoResponse:
        """The number of items, the model, and what this server allows."""
        facts = await in_thread(catalog.info)
        bundle = await in_thread(lambda: catalog.bundle)
        return InfoResponse(
            items=facts["items"],
            columns=facts["columns"],
            bundle=BundleInfo(name=bundle.name, fingerprint=bundle.fingerprint, precision=bundle.precision),
            generates=bundle.generates,
            writes=context.limits.may_write(request),
            max_images=settings.max_images,
        )

    return [reading, writing]


async def searched(context: Context, request: Request) -> Page:
    """The page that a search request asks for."""
    query, files = await body_of(request, SearchRequest, "query", context.settings.max_body)
    context.log(request, text=query.text)
    arguments = query.model_dump() | {"image": _one_image(query.image, files)}
    if query.imagine or query.rerank:
        await context.require_generator()
    gate = context.generations if query.imagine or query.rerank else context.searches
    async with gate.entered(context.settings.timeout):
        for name in ("like", "unlike"):
            ids = arguments[name] if isinstance(arguments[name], list) else [arguments[name]]
            arguments[name] = [await context.item(id) for id in ids if id is not None]
        return await until_disconnected(request, context.catalog.asearch(**arguments))


def _one_image(data: str | None, files: list[bytes]) -> bytes | None:
    """The image of a query, from the JSON or as a file. Raises ProblemError if there are several."""
    decoded = decoded_image("image", data)
    found = [*files, *([] if decoded is None else [decoded])]
    if len(found) > 1:
        raise ProblemError(422, "An argument is invalid", f"There are {len(found)} images; give one.")
    return found[0] if found else None


def _images_of(body: ItemsRequest, files: list[bytes]) -> list[bytes]:
    """The images of items, from the JSON or, one for each item, as files."""
    if files and (len(files) != len(body.items) or any(each.image for each in body.items)):
        raise ProblemError(
            422,
            "An argument is invalid",
            f'There are {len(files)} image files for {len(body.items)} items; give one for each item, in order, and "" '
            "as the image of each.",
        )
    return files or [decoded_image(f"items.{n}.image", each.image) or b"" for n, each in enumerate(body.items)]


def _image_file(hit: Hit, size: int | None) -> tuple[bytes, str]:
    """The content and media type of an image of an item."""
    if size == THUMBNAIL_SIZE:
        return hit.thumbnail_bytes(), "image/webp"
    if size is None:
        kind = MEDIA_TYPES.get(PurePosixPath(hit.uri).suffix.lower(), "application/octet-stream")
        return hit.image_bytes(), kind
    image, buffer = hit.load_image(), io.BytesIO()
    image.thumbnail((size, size))
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue(), "image/webp"
