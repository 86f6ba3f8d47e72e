"""What commands of the user who started the server ask for: the folder of a catalog is open in one process only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask

from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.retrieval.results import Hit
from unidiff_sdk.serve.context import Context
from unidiff_sdk.serve.limits import checked_route

from .catalog import searched

__all__ = ["local_routes"]


class ExportRequest(BaseModel):
    """Which items to export."""

    where: dict[str, Any] | None = None


def local_routes(context: Context) -> APIRouter:
    """The routes of the owner, which no document describes: they belong to `unidiff info`, `search` and `export`."""
    catalog = context.catalog
    router = APIRouter(prefix="/v1/local", route_class=checked_route(context.limits.own), include_in_schema=False)

    @router.get("/info")
    async def info() -> JSONResponse:
        """As `Catalog.info`."""
        return JSONResponse(await in_thread(catalog.info))

    @router.post("/search")
    async def search(request: Request) -> JSONResponse:
        """As `Catalog.search`, with the place of each image."""
        page = await searched(context, request)
        facts = {"offset": page.offset, "limit": page.limit, "took_ms": page.took_ms, "cursor": page.cursor}
        return JSONResponse({"hits": [_attributes(hit) for hit in page]} | facts)

    @router.post("/export")
    async def export(body: ExportRequest) -> FileResponse:
        """The parquet file of `Catalog.export`."""
        folder = tempfile.TemporaryDirectory(prefix="unidiff-export-")
        file = Path(folder.name) / "export.parquet"
        try:
            count = await catalog.aexport(file, where=body.where)
        except BaseException:
            folder.cleanup()
            raise
        return FileResponse(file, headers={"X-Items": str(count)}, background=BackgroundTask(folder.cleanup))

    return router


def _attributes(hit: Hit) -> dict[str, Any]:
    names = ("id", "score", "text", "payload", "uri", "sha256", "rerank_score", "gain")
    return {name: getattr(hit, name) for name in names}
