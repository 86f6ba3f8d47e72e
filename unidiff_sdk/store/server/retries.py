"""Repeating requests to a Qdrant server, and reporting their failures without the API key."""

from __future__ import annotations

import json
import random
import ssl
import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from unidiff_sdk._internal.text import shorten
from unidiff_sdk._internal.warnings import safe_logger
from unidiff_sdk.errors import ForbiddenError, StoreError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = [
    "INITIAL_BACKOFF",
    "MAX_BACKOFF",
    "RetryingClient",
    "ServerFault",
    "check_confirmed",
    "exceeds_limit",
    "failure",
    "interrupt",
    "without_frames",
]

INITIAL_BACKOFF, MAX_BACKOFF = 0.25, 10.0  # seconds between two attempts
MAX_WAIT = 60.0
"""The most seconds that one call waits between all its attempts, whatever the server requests."""

# Overload, and what proxies answer while a node restarts. A 500 is a definite answer of the server and is not retried.
_RETRIED_STATUS = (429, 502, 503, 504)
_REASON_LENGTH = 300  # characters of a failure in a message

_log = safe_logger(__name__)

R = TypeVar("R")


class ServerFault(Exception):
    """The server responded, but not as it should. The message continues that of `failure`."""


class UnconfirmedWrite(ServerFault):
    """The server has not confirmed that a write is complete. It may still complete it, or lose it."""


class RetryingClient:
    """A client that repeats requests after transient failures, with exponential backoff.

    Args:
        client: the client.
        url: of the server, for messages.
        retries: the most repetitions of one request.
        api_key: removed from messages. A server may repeat it in a response.
        sleep: waits for a number of seconds. Default: until then, or until `interrupt`.
    """

    def __init__(
        self,
        client: QdrantClient,
        url: str,
        retries: int,
        api_key: str | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._client, self._retries, self._api_key = client, retries, api_key
        self._interrupted = threading.Event()
        self._sleep = sleep or self._interrupted.wait
        address = urlsplit(url)
        self.address = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return self._retrying(attribute) if callable(attribute) and name != "close" else attribute

    def interrupt(self) -> None:
        """End all pauses. A request that would be repeated fails instead, now and later."""
        self._interrupted.set()

    def without_key(self, text: str) -> str:
        """The text without the API key."""
        return text.replace(self._api_key, "***") if self._api_key else text

    def _retrying(self, call: Callable[..., R]) -> Callable[..., R]:
        @wraps(call)
        def attempt(*args: Any, **kwargs: Any) -> R:
            waited = 0.0
            for attempts in range(self._retries):
                try:
                    return check_confirmed(call(*args, **kwargs))
                except Exception as error:
                    requested = _requested_pause(error)
                    if requested is None or waited >= MAX_WAIT:
                        raise
                    backoff = min(MAX_BACKOFF, INITIAL_BACKOFF * 2**attempts) * random.uniform(0.5, 1)
                    pause = min(requested or backoff, MAX_WAIT - waited)
                    reason = self.without_key(_reason(error))
                    if not self._interrupted.is_set():
                        _log.warning("%s failed (%s). Retrying in %.1f s.", call.__name__, reason, pause)
                        waited += pause
                        self._sleep(pause)
                    if self._interrupted.is_set():
                        raise ServerFault(f"closed while waiting to repeat a request. {reason}") from None
            return check_confirmed(call(*args, **kwargs))

        return attempt


def check_confirmed(result: R) -> R:
    """Return the result of a call. Raises UnconfirmedWrite for a write that is not complete."""
    from qdrant_client.models import UpdateResult, UpdateStatus

    if isinstance(result, UpdateResult) and result.status != UpdateStatus.COMPLETED:
        raise UnconfirmedWrite(
            f'the server has not confirmed the write (status "{result.status}"): it may be stored later, or not at '
            "all. Repeat the call, or raise ServerOptions(timeout=…)"
        )
    return result


def failure(client: object, collection: str, error: Exception) -> StoreError:
    """The StoreError for a failure of the client or the server. Its cause is `error`, unless that holds the API key.

    It is a ForbiddenError if the API key does not allow the operation.
    """
    reason, address = _reason(error), ""
    cause: Exception | None = error
    if isinstance(client, RetryingClient):
        address = f" at {client.address}"
        reason = client.without_key(reason)
        cause = error if client.without_key(str(error)) == str(error) else None
    kind = ForbiddenError if _is_forbidden(error) else StoreError
    failed = kind(f'The Qdrant server failed on the collection "{collection}"{address}: {reason}')
    failed.__cause__, failed.__suppress_context__ = cause and without_frames(cause), True
    return failed


def without_frames(error: Exception) -> Exception:
    """The error without the tracebacks of it and of its causes: their local variables hold the headers with the key."""
    causes: list[BaseException | None] = [error]
    while causes:
        cause = causes.pop()
        if cause is not None and cause.__traceback__ is not None:
            cause.__traceback__ = None
            causes += [cause.__cause__, cause.__context__, getattr(cause, "source", None)]
    return error


def interrupt(client: object) -> None:
    """End the pauses of a client that repeats requests."""
    if isinstance(client, RetryingClient):
        client.interrupt()


def _requested_pause(error: Exception) -> float | None:
    """The pause that the server requests, in seconds; 0 if it requests none; None if the error is not transient."""
    import grpc
    import httpx
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    match error:
        case UnconfirmedWrite():
            return 0.0
        case ResourceExhaustedResponse():
            return float(max(0, min(error.retry_after_s, int(MAX_WAIT))))
        case QdrantException():  # status 429 with a Retry-After that is not a number of seconds
            return 0.0
        case UnexpectedResponse():
            return 0.0 if error.status_code in _RETRIED_STATUS else None
        case ResponseHandlingException():  # the connection failed, or the response is not readable
            invalid_certificate = isinstance(error.source.__cause__, ssl.SSLError) or "CERTIFICATE" in str(error.source)
            return 0.0 if isinstance(error.source, httpx.TransportError) and not invalid_certificate else None
        case grpc.RpcError():
            transient = (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            return 0.0 if cast(Any, error).code() in transient else None
    return None


def exceeds_limit(error: Exception) -> bool:
    """Whether a request is larger than the server or the strict mode of the collection allows."""
    from qdrant_client.http.exceptions import UnexpectedResponse

    return is_strict_mode(error) or (isinstance(error, UnexpectedResponse) and error.status_code == 413)


def is_strict_mode(error: Exception) -> bool:
    """Whether the strict mode of the collection refused a request. Such messages end with "Help: …".

    Servers answered them with 403 before they answered with 400.
    """
    import grpc
    from qdrant_client.http.exceptions import UnexpectedResponse

    if isinstance(error, grpc.RpcError) and hasattr(error, "details"):
        refused = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)
        return cast(Any, error).code() in refused and "Help: " in str(cast(Any, error).details())
    return (
        isinstance(error, UnexpectedResponse)
        and error.status_code in (400, 403)
        and "Help: " in _content(error.content)
    )


def _is_forbidden(error: Exception) -> bool:
    """Whether the server knows the API key, and refuses the operation."""
    import grpc
    from qdrant_client.http.exceptions import UnexpectedResponse

    if is_strict_mode(error):
        return False
    if isinstance(error, grpc.RpcError):
        return bool(cast(Any, error).code() == grpc.StatusCode.PERMISSION_DENIED)
    return isinstance(error, UnexpectedResponse) and error.status_code == 403


def _reason(error: Exception) -> str:
    """What failed, on one line."""
    import grpc
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, ResponseHandlingException):
        error = error.source
    match error:
        case UnexpectedResponse():
            reason = f"status {error.status_code} ({error.reason_phrase}): {_content(error.content)}"
            if is_strict_mode(error):
                reason += ". This is a limit of the strict mode of the collection: ask for less, or raise it"
            elif error.status_code in (401, 403):
                reason += ". Check api_key="
        case grpc.RpcError() if hasattr(error, "details"):
            reason = f"{cast(Any, error).code().name}: {cast(Any, error).details()}"
        case ValueError() | TypeError() | KeyError() | IndexError() | AttributeError() | AssertionError():
            reason = (
                f"the response is not that of a Qdrant server ({_detail(error)}). Check the URL, and whether a proxy "
                "responds in its place"
            )
        case _:
            reason = _detail(error)
    return shorten(reason, _REASON_LENGTH)


def _detail(error: Exception) -> str:
    """The first problem that an error reports."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _content(content: bytes) -> str:
    """The message in an error response, or its first characters."""
    try:
        return str(json.loads(content)["status"]["error"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return content[:_REASON_LENGTH].decode("utf-8", "replace")
