"""Connecting to a Qdrant server: options, retries with back-off, and the layout of new collections."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unidiff_sdk._internal.warnings import safe_logger
from unidiff_sdk.errors import OptionError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = ["QUANTIZATIONS", "ServerOptions", "connect"]

QUANTIZATIONS = ("scalar", "binary", "product")
INITIAL_BACKOFF, MAX_BACKOFF = 0.25, 10.0  # seconds between two attempts
# Overload, and what proxies answer while a node restarts. A 500 is a definite answer of the server and is not retried.
_RETRIED_STATUS = (429, 502, 503, 504)

_log = safe_logger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """Connection and collection options of a Qdrant server or cluster, for `Catalog(url, server=ServerOptions(…))`.

    The connection uses TLS if the URL starts with https.

    Args:
        grpc: use gRPC where both protocols can be used. It is faster for large uploads.
        grpc_port: the port for gRPC.
        timeout: the timeout of one request, in whole seconds, at least 1.
        retries: how many times to retry a request if the server is unreachable, overloaded or too slow. The pause
            doubles from 0.25 s to 10 s, with jitter, unless the server asks for another one. Every request is
            idempotent.
        ca: a PEM file of certificate authorities that replaces the system's. For gRPC, set the environment variable
            GRPC_DEFAULT_SSL_ROOTS_FILE_PATH instead.
        shards: the number of shards of a new collection. Default: the server's.
        replicas: the replication factor of a new collection. Default: the server's.
        quantization: of a new collection: "scalar" (int8, a quarter of the memory), "binary" or "product". The
            originals stay on disk. Default: none.
        on_disk: whether a new collection keeps its vectors on disk instead of in memory.

    Raises:
        OptionError: a value is invalid.
    """

    grpc: bool = False
    grpc_port: int = 6334
    timeout: int = 30
    retries: int = 4
    ca: str | Path | None = None
    shards: int | None = None
    replicas: int | None = None
    quantization: str | None = None
    on_disk: bool = False

    def __post_init__(self) -> None:
        for name, least in {"timeout": 1, "retries": 0, "shards": 1, "replicas": 1, "grpc_port": 1}.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise OptionError(f"ServerOptions({name}={value!r}): {name} must be an integer, at least {least}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise OptionError(
                f"ServerOptions(quantization={self.quantization!r}): quantization must be None or one of "
                f"{', '.join(QUANTIZATIONS)}"
            )
        if self.ca is not None and self.grpc:
            raise OptionError(
                "ServerOptions(ca=…, grpc=True): gRPC ignores ca. Set the environment variable "
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH to the file and omit ca="
            )
        if self.ca is not None and not Path(self.ca).is_file():
            raise OptionError(f"ServerOptions(ca={str(self.ca)!r}): there is no such file. Give a PEM file")

    def collection_parameters(self) -> dict[str, Any]:
        """Keyword arguments of `create_collection` for these options."""
        from qdrant_client import models

        quantization: Any = None
        match self.quantization:
            case "scalar":
                scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
                quantization = models.ScalarQuantization(scalar=scalar)
            case "binary":
                quantization = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
            case "product":
                product = models.ProductQuantizationConfig(compression=models.CompressionRatio.X16, always_ram=True)
                quantization = models.ProductQuantization(product=product)
        given = {
            "shard_number": self.shards,
            "replication_factor": self.replicas,
            "quantization_config": quantization,
        }
        return {name: value for name, value in given.items() if value is not None}


def connect(
    url: str, options: ServerOptions, api_key: str | None = None, *, sleep: Callable[[float], object] = time.sleep
) -> QdrantClient:
    """Return a client that retries failed requests as `options` specify. It sends no request yet.

    Args:
        url: of the server.
        options: protocol, timeout and retries.
        api_key: the key for the server.
        sleep: waits for the given number of seconds between two attempts.
    """
    from qdrant_client import QdrantClient

    trust: dict[str, Any] = {} if options.ca is None else {"verify": ssl.create_default_context(cafile=str(options.ca))}
    client = QdrantClient(
        url=url,
        api_key=api_key,
        prefer_grpc=options.grpc,
        grpc_port=options.grpc_port,
        timeout=options.timeout,
        check_compatibility=False,  # the check sends a request that could not be retried
        **trust,
    )
    return cast("QdrantClient", _RetryingClient(client, options.retries, sleep))


class _RetryingClient:
    """A client that retries transient failures with exponential back-off."""

    def __init__(self, client: QdrantClient, retries: int, sleep: Callable[[float], object]) -> None:
        self._client, self._retries, self._sleep = client, retries, sleep

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return self._retrying(attribute) if callable(attribute) and name != "close" else attribute

    def _retrying(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            for attempts in range(self._retries):
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    requested = _requested_pause(error)
                    if requested is None:
                        raise
                    backoff = min(MAX_BACKOFF, INITIAL_BACKOFF * 2**attempts) * random.uniform(0.5, 1)
                    pause = requested or backoff
                    _log.warning("%s failed (%s). Retrying in %.1f s.", call.__name__, _first_line(error), pause)
                    self._sleep(pause)
            return call(*args, **kwargs)

        return attempt


def _requested_pause(error: Exception) -> float | None:
    """The pause that the server requests, in seconds; 0 if it requests none; None if the error is not transient."""
    import grpc
    import httpx
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    match error:
        case ResourceExhaustedResponse():
            return min(float(error.retry_after_s), 6 * MAX_BACKOFF)
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
