"""Errors as `application/problem+json` (RFC 9457): one table from the errors of the SDK to HTTP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.errors import (
    BundleError,
    BusyError,
    FilterError,
    ForbiddenError,
    GenerationError,
    ImageError,
    OptionError,
    ProviderError,
    StoredImageError,
    StoreError,
    UniDiffError,
)

__all__ = [
    "PROBLEM",
    "Problem",
    "ProblemError",
    "add_error_handlers",
    "logged_problem",
    "problem_of",
    "problem_responses",
]

PROBLEM = "application/problem+json"
RETRY_SECONDS = 2  # after 429 and 503
CLOSE = {"Connection": "close"}  # the rest of a body would follow
RETRY = {"Retry-After": str(RETRY_SECONDS)}
_log = logging.getLogger(__name__)

# The first class that an error belongs to decides. Messages of the others are for the operator: they name files.
STATUS: tuple[tuple[type[UniDiffError], int, str], ...] = (
    (FilterError, 422, "The filter is invalid"),
    (OptionError, 422, "An argument is invalid"),
    (StoredImageError, 404, "There is no such image"),
    (ImageError, 422, "An image cannot be used"),
    (BusyError, 429, "Too many requests at the same time"),
    (GenerationError, 500, "The image could not be generated"),
    (BundleError, 501, "The model of this catalog cannot do that"),
    (ProviderError, 503, "The model is not available"),
    (ForbiddenError, 501, "This server may not do that"),
    (StoreError, 503, "The catalog is not available"),
    (UniDiffError, 500, "The request failed"),
)
CALLERS_OWN = (422, 429)  # whose messages concern the request
IN_LOG = "The log of the server has the reason."
DESCRIPTIONS = {
    401: "The key is missing or unknown",
    403: "The key, or the origin of the page, does not allow that",
    404: "There is no such item, or its image is missing",
    408: "The body arrives too slowly",
    409: "Two items have this id: a string and an integer",
    413: "The body is too large",
    415: "The body is neither JSON nor a form",
    421: "The request addresses the server by an unknown name",
    422: "An argument is invalid",
    429: "Too many requests, in total or by this key",
    500: "The server failed",
    501: "The model of this catalog cannot do that, or the server may not",
    503: "The catalog or the model is not available",
    504: "The request took too long and was cancelled",
}
ANY_ROUTE = (401, 403, 408, 413, 421, 422, 429, 500, 501, 503, 504)
_UNKNOWN_REASON = "There was an error parsing the body"
_BODY_CANNOT_BE_PARSED = 400  # of FastAPI: the text is not UTF-8, or is nested too deeply


class Problem(BaseModel):
    """A report of a problem, as RFC 9457 defines it."""

    type: str
    title: str = Field(description="What is wrong, the same for all problems of this kind.")
    status: int
    detail: str = Field(description="What is wrong with this request, and what to do.")
    request_id: str | None = Field(None, description="The id of the request in the log of the server.")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI descriptions of the problems that a route answers with."""
    content = {PROBLEM: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in sorted(statuses)}


class ProblemError(Exception):
    """A response that reports a problem.

    Args:
        status: the HTTP status.
        title: what is wrong, the same for all problems of this kind.
        detail: what is wrong with this request, and what to do.
        headers: further headers.
    """

    def __init__(self, status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail, self.headers = status, title, detail, dict(headers or {})

    def content(self, request_id: str | None) -> dict[str, Any]:
        """The members of the problem, as RFC 9457 names them."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **({"request_id": request_id} if request_id else {}),
        }


def problem_of(error: BaseException) -> ProblemError:
    """The problem that reports an error. An unexpected error says nothing about its cause; the log has it."""
    if isinstance(error, ProblemError):
        return error
    for kind, status, title in STATUS:
        if isinstance(error, kind):
            headers = RETRY if status in (429, 503) else {}
            detail = terminal_safe(str(error)) if status in CALLERS_OWN else IN_LOG
            if kind is StoredImageError:
                detail = f"The image of an item is missing or damaged. {IN_LOG}"
            return ProblemError(status, title, detail, headers)
    if isinstance(error, TimeoutError):
        return ProblemError(504, "The request took too long", "It was cancelled. Ask for fewer or smaller images.")
    return ProblemError(500, "Internal error", IN_LOG)


def logged_problem(error: Exception, request_id: str | None) -> ProblemError:
    """The problem that reports an error. If its reason is only for the operator, it is written into the log."""
    problem = problem_of(error)
    if problem.status >= 500 or isinstance(error, StoredImageError):
        _log.error("request %s: %s", request_id, problem.title, exc_info=error)
    return problem


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer all errors as problems."""

    async def respond(request: Request, error: Exception) -> JSONResponse:
        request_id = getattr(request.state, "request_id", None)
        problem = logged_problem(error, request_id)
        return JSONResponse(problem.content(request_id), problem.status, problem.headers, media_type=PROBLEM)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        reasons = [f"{'.'.join(map(str, _location(each))) or 'body'}: {each['msg']}" for each in error.errors()[:5]]
        detail = terminal_safe("; ".join(reasons))[:1000]
        return await respond(request, ProblemError(422, "The request has another form", detail))

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ProblemError):  # raised by the middleware while FastAPI read the body
            return await respond(request, error.__cause__)
        headers = dict(error.headers or {})
        if error.status_code == _BODY_CANNOT_BE_PARSED:
            # For a form, Starlette says why, e.g. that it has too many files.
            reason = "" if error.detail == _UNKNOWN_REASON else f" {terminal_safe(str(error.detail))[:200]}"
            error = ProblemError(422, "The request has another form", f"The body cannot be parsed.{reason}")
            return await respond(request, error)
        return await respond(request, ProblemError(error.status_code, str(error.detail), str(error.detail), headers))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_http)
    for kind in (ProblemError, UniDiffError, TimeoutError, Exception):
        app.add_exception_handler(kind, respond)


def _location(error: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a body is invalid: the names of its members. For text that is not JSON, pydantic gives an offset."""
    location = tuple(part for part in error["loc"] if part != "body")
    return () if error["type"] == "json_invalid" else location
