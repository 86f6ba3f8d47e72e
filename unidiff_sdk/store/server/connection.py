"""The way to a Qdrant server: how to connect, what to do when it is slow or away, how a new collection is laid out."""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unidiff_sdk.errors import OptionError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = ["QUANTIZATIONS", "ServerOptions", "connect"]

QUANTIZATIONS = ("scalar", "binary", "product")
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between tries
# Overload, and what proxies answer while a node restarts. A 500 is the server's considered answer and is not repeated.
_PASSING_STATUS = (429, 502, 503, 504)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How to talk to a Qdrant server or cluster, for `Catalog(url, server=ServerOptions(…))`.

    TLS is used where the URL says https.

    Args:
        grpc: use gRPC (on `grpc_port`) where there is a choice: faster for large uploads.
        timeout: whole seconds that one request may take, at least 1.
        retries: how often a request is repeated that found the server away, overloaded or too slow. The pause before it
            doubles from 0.25 s to 10 s, with jitter, or is what the server asked for. All requests may be repeated
            safely.
        ca: a PEM file of certificate authorities to trust instead of the system's. With gRPC set the variable
            GRPC_DEFAULT_SSL_ROOTS_FILE_PATH instead.
        shards, replicas: of a collection that is created; default: the server's.
        quantization: how a collection that is created compresses its vectors for searching: "scalar" (int8, a quarter
            of the memory), "binary" or "product"; the originals are kept on disk.
        on_disk: whether a collection that is created keeps its vectors on disk rather than in memory.

    Raises:
        OptionError: a value is not a valid one.
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
                raise OptionError(f"ServerOptions({name}={value!r}): give a whole number, at least {least}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise OptionError(
                f"ServerOptions(quantization={self.quantization!r}): give one of {', '.join(QUANTIZATIONS)}, or None"
            )
        if self.ca is not None and self.grpc:
            raise OptionError(
                "ServerOptions(ca=…, grpc=True): gRPC reads its authorities from the file that the variable "
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names; set that and leave ca= out"
            )
        if self.ca is not None and not Path(self.ca).is_file():
            raise OptionError(f"ServerOptions(ca={str(self.ca)!r}): there is no such file")

    def layout(self) -> dict[str, Any]:
        """What `create_collection` takes for these options."""
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


def connect(url: str, options: ServerOptions, api_key: str | None = None) -> QdrantClient:
    """A client of a server whose every method waits and tries again as `options` say. Makes no request yet."""
    from qdrant_client import QdrantClient

    trust: dict[str, Any] = {} if options.ca is None else {"verify": ssl.create_default_context(cafile=str(options.ca))}
    client = QdrantClient(
        url=url,
        api_key=api_key,
        prefer_grpc=options.grpc,
        grpc_port=options.grpc_port,
        timeout=options.timeout,
        check_compatibility=False,  # it asks the server for its version before anything can be retried
        **trust,
    )
    return cast("QdrantClient", _Patient(client, options.retries))


class _Patient:
    """A client that repeats what failed only for a while, with exponential back-off."""

    def __init__(self, client: QdrantClient, retries: int) -> None:
        self._client, self._retries = client, retries

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return self._patiently(attribute) if callable(attribute) and name != "close" else attribute

    def _patiently(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def repeated(*args: Any, **kwargs: Any) -> Any:
            for attempt in range(self._retries):
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    asked = _pause_asked_for(error)
                    if asked is None:
                        raise
                    pause = asked or min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1)
                    _log.warning("%s failed (%s); trying again in %.1f s", call.__name__, _in_short(error), pause)
                    time.sleep(pause)
            return call(*args, **kwargs)

        return repeated


def _pause_asked_for(error: Exception) -> float | None:
    """None if the error will not pass by itself; else how many seconds the server asks to wait, 0 by default."""
    import grpc
    import httpx
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    match error:
        case ResourceExhaustedResponse():
            return min(float(error.retry_after_s), 6 * LONGEST_PAUSE)
        case UnexpectedResponse():
            return 0.0 if error.status_code in _PASSING_STATUS else None
        case ResponseHandlingException():  # the request failed on its way, or the answer was not readable
            broken_tls = isinstance(error.source.__cause__, ssl.SSLError) or "CERTIFICATE" in str(error.source)
            return 0.0 if isinstance(error.source, httpx.TransportError) and not broken_tls else None
        case grpc.RpcError():
            passing = (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            return 0.0 if cast(Any, error).code() in passing else None
    return None


def _in_short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
