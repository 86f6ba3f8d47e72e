"""What the routes share: the catalog, the settings, the limits; and how requests and items become each other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.catalog.aio import in_thread
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.errors import OptionError
from unidiff_sdk.retrieval.results import Hit, Page
from unidiff_sdk.store.ids import possible_ids

from .limits import Gate, Limits
from .metrics import Metrics
from .problems import ProblemError
from .schemas import HitResponse, PageResponse
from .settings import ServerSettings

__all__ = [
    "Context",
    "body_of",
    "form_parts",
    "form_schema",
    "hit_response",
    "json_line",
    "page_response",
    "until_disconnected",
    "validated",
    "where_of",
]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
MAX_FILES = 256  # of a multipart body
MAX_SCANS = 2  # of the whole catalog at the same time: each can take minutes, and nothing can stop it
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Context:
    """What the routes of one application share."""

    catalog: Catalog
    settings: ServerSettings
    limits: Limits
    metrics: Metrics
    searches: Gate
    scans: Gate
    generations: Gate

    @classmethod
    def of(cls, catalog: Catalog, settings: ServerSettings) -> Context:
        """The context of a catalog with these settings."""
        metrics = Metrics()
        return cls(
            catalog,
            settings,
            Limits(settings),
            metrics,
            Gate("searches", settings.max_searches, metrics),
            Gate("searches for duplicates", MAX_SCANS, metrics),
            Gate("generations", settings.max_generations, metrics),
        )

    async def item(self, id: str | int, *, unambiguous: bool = False) -> Hit:
        """The item with an id from a URL or body: "7" is the string, or else the integer.

        Raises ProblemError: 404 if there is none; with `unambiguous`, 409 if there are both.
        """
        found: list[Hit] = []
        for candidate in possible_ids(id):
            if (hit := await self.catalog.aget(candidate)) is not None:
                found.append(hit)
                if not unambiguous:
                    break
        if not found:
            raise ProblemError(404, "There is no such item", f"The catalog has no item with the id {id!r:.200}.")
        if len(found) > 1:
            raise ProblemError(
                409,
                "Two items have this id",
                f"One has the string {id!r:.200} as its id, the other the integer. Name one of them in JSON: "
                "POST /v1/items replaces items, and DELETE /v1/items deletes them.",
            )
        return found[0]

    async def require_generator(self) -> None:
        """Raise ProblemError (501) if the catalog's bundle only searches."""
        if not (await in_thread(lambda: self.catalog.bundle)).generates:
            raise ProblemError(
                501,
                "The model of this catalog cannot do that",
                "It has no generator: it searches, but cannot generate, re-rank (rerank) or imagine (imagine).",
            )

    def log(self, request: Request, **texts: Any) -> None:
        """Add what a request asked for to its line in the log, if the operator wants that."""
        if self.settings.log_texts:
            request.state.log = {name: value for name, value in texts.items() if value}


def hit_response(hit: Hit) -> HitResponse:
    """An item as the API returns it."""
    return HitResponse(
        id=hit.id,
        score=hit.score,
        text=hit.text,
        columns=hit.payload,
        image=f"/v1/items/{quote(str(hit.id), safe='')}/image",
        rerank_score=hit.rerank_score,
        gain=hit.gain,
    )


def page_response(page: Page) -> PageResponse:
    """A page as the API returns it."""
    return PageResponse(
        hits=[hit_response(hit) for hit in page],
        offset=page.offset,
        limit=page.limit,
        took_ms=round(page.took_ms, 2),
        cursor=page.cursor,
    )


def where_of(text: str | None) -> dict[str, Any] | None:
    """A filter from a parameter of the URL. Raises OptionError if it is not a JSON object."""
    return None if text is None else parse_json(text, "where", kind=dict, error=OptionError)


async def body_of(request: Request, model: type[M], name: str, max_body: int) -> tuple[M, list[bytes]]:
    """The body of a request: JSON, or a form with the JSON in the field `name` and files in the fields `image`.

    Raises ProblemError (415, 422) if it is neither, or has another form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files: list[bytes] = []
    if kind == "application/json":
        text: str | bytes = await request.body()
    elif kind == "multipart/form-data":
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FILES, max_part_size=max_body) as form:
            parts = form_parts(form, {name: str, "image": UploadFile})
            if len(parts[name]) != 1:
                raise ProblemError(
                    422, "The request has another form", f"The form has {len(parts[name])} fields {name!r}; give one."
                )
            (text,) = parts[name]
            files = [await file.read() for file in parts["image"]]
    else:
        raise ProblemError(415, "The body has another type", "Send application/json or multipart/form-data.")
    return validated(lambda: model.model_validate_json(text), name), files


def form_parts(form: FormData, kinds: Mapping[str, type]) -> dict[str, list[Any]]:
    """The values of the fields of a form. Raises ProblemError (422) for other fields, which would have no effect.

    Args:
        form: the form.
        kinds: the type of each field, `str` or `UploadFile`.
    """
    parts: dict[str, list[Any]] = {name: [] for name in kinds}
    for name, value in form.multi_items():
        kind = kinds.get(name)
        if kind is None or not isinstance(value, kind):
            known = ", ".join(f"{each} ({'text' if kinds[each] is str else 'file'})" for each in kinds)
            given = "text" if isinstance(value, str) else "file"
            raise ProblemError(
                422,
                "The request has another form",
                f"The form has a {given} in the field {terminal_safe(name)!r:.100}. Its fields are: {known}.",
            )
        parts[name].append(value)
    return parts


def validated(validate: Callable[[], M], name: str) -> M:
    """The result of a validation by pydantic. Raises ProblemError (422), where `name` stands for the whole input."""
    try:
        return validate()
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, each['loc'])) or name}: {each['msg']}" for each in error.errors()[:5]]
        raise ProblemError(422, "The request has another form", terminal_safe("; ".join(reasons))[:1000]) from error


def form_schema(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The OpenAPI description of a body that `body_of` reads."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    images = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"type": "object", "properties": {name: {"type": "string", "description": "JSON"}, "image": images}}
    content = {"application/json": {"schema": reference}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


async def until_disconnected(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """Await a call, and cancel it if the client is gone. Raises ProblemError (499) then; nobody reads it."""
    task = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                raise ProblemError(499, "The client is gone", "The call was cancelled.")
        return task.result()
    finally:
        task.cancel()


def json_line(value: Any) -> str:
    """A value as JSON in one line."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False)
