"""The ASGI application of a catalog."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from fastapi import Depends, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles

from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.errors import UniDiffError

from .context import Context
from .problems import ANY_ROUTE, Problem, ProblemError, add_error_handlers, problem_responses
from .routes.catalog import catalog_routes
from .routes.generation import generation_routes
from .routes.local import local_routes
from .routes.openai import openai_routes
from .schemas import ItemsRequest, SearchRequest
from .settings import ServerSettings
from .transport.middleware import RequestMiddleware

__all__ = ["create_app"]

STOREFRONT = Path(__file__).parent / "static"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(catalog: Catalog, settings: ServerSettings | None = None) -> FastAPI:
    """Make the application of an open catalog, which stays open when the application ends.

    Args:
        catalog: what is served.
        settings: limits, keys and what is allowed. Default: reading only, without keys.
    """
    settings = settings or ServerSettings()
    context = Context.of(catalog, settings)
    app = FastAPI(
        title="UniDiff catalog",
        version=version("unidiff-sdk"),
        summary="Search a product catalog by text and image, and generate images that fit it.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    add_error_handlers(app)
    for router in (*catalog_routes(context), generation_routes(context), openai_routes(context)):
        app.include_router(router)
    if settings.owner:
        app.include_router(local_routes(context))
    _add_operation(app, context)
    _describe_bodies(app)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "X-Request-Id"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(RequestMiddleware, metrics=context.metrics, max_body=settings.max_body, timeout=settings.timeout)
    if settings.storefront:
        app.mount("/", StaticFiles(directory=STOREFRONT, html=True))
    return app


def _add_operation(app: FastAPI, context: Context) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["operation"], responses=problem_responses(503))
    async def readyz() -> dict[str, str]:
        """Whether the store answers."""
        try:
            await context.catalog.acount()
        except UniDiffError as error:
            raise ProblemError(503, "Not ready", "The log of the server has the reason.") from error
        return {"status": "ready"}

    @app.get(
        "/metrics",
        tags=["operation"],
        dependencies=[Depends(context.limits.read)],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problem_responses(*ANY_ROUTE)},
    )
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(context.metrics.render(await context.catalog.acount()), media_type=PROMETHEUS)


def _describe_bodies(app: FastAPI) -> None:
    """Add the schemas that routes only refer to, to the OpenAPI document."""
    plain: Callable[[], dict[str, object]] = app.openapi

    def openapi() -> dict[str, object]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})  # type: ignore[attr-defined]
        for model in (SearchRequest, ItemsRequest, Problem):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas.setdefault(model.__name__, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
