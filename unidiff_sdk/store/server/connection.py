"""Connecting to a Qdrant server: options, and the layout of new collections."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from unidiff_sdk._internal.json_values import plain_number, shown_integer
from unidiff_sdk._internal.text import Secret, redact_url
from unidiff_sdk.errors import OptionError, StoreError

from .retries import RetryingClient, without_frames

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = ["QUANTIZATIONS", "ServerOptions", "connect"]

QUANTIZATIONS = ("scalar", "binary", "product")
ORDERINGS = ("weak", "medium", "strong")
CONSISTENCIES = ("majority", "quorum", "all")
_ALIAS = re.compile(r"[A-Za-z0-9._-]{1,200}", re.ASCII)
MAX_INT32 = 2**31 - 1
_MOST = {"timeout": 86_400, "retries": 1000, "grpc_port": 65_535}
MAX_CONNECTIONS = 100  # to one server; more requests wait for a free one


@dataclass(frozen=True)
class ServerOptions:
    """Connection and collection options of a Qdrant server or cluster, for `Catalog(url, server=ServerOptions(…))`.

    The connection uses TLS if the URL starts with https.

    Args:
        grpc: use gRPC where both protocols can be used. It is faster for large uploads.
        grpc_port: the port for gRPC.
        timeout: the timeout of one request and its whole response, in whole seconds, at least 1.
        retries: how many times to retry a request if the server is unreachable, overloaded or too slow, or does not
            confirm a write. The pause doubles from 0.25 s to 10 s, with jitter, unless the server asks for another
            one. All pauses of a call take at most 60 s, and `Catalog.close` ends them. Every request is idempotent.
        ca: a PEM file of certificate authorities that replaces the system's. For gRPC, set the environment variable
            GRPC_DEFAULT_SSL_ROOTS_FILE_PATH instead.
        shards: the number of shards of a new collection. Default: the server's.
        replicas: the replication factor of a new collection. Default: the server's.
        quantization: of a new collection: "scalar" (int8, a quarter of the memory), "binary" or "product". The
            originals stay on disk. Default: none.
        on_disk: whether a new collection keeps its vectors on disk instead of in memory.
        write_replicas: how many replicas of a new collection must confirm a write. Default: the server's.
        ordering: of writes: "weak", "medium" or "strong". Stronger ones wait for the leader of a shard, and give the
            same order on all replicas. Default: the server's, weak.
        consistency: how many replicas a read compares: a number, or "majority", "quorum" or "all". Default: one.
        alias: a name that leads to the current collection of the catalog, for clients other than this SDK. `reindex`
            moves it to the new collection at once.

    Every write waits until the server has applied it (`wait=true`), so that a search after it finds the items.

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
    write_replicas: int | None = None
    ordering: str | None = None
    consistency: int | str | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        numbers = {"timeout": 1, "retries": 0, "shards": 1, "replicas": 1, "grpc_port": 1, "write_replicas": 1}
        if not isinstance(self.consistency, str):
            numbers |= {"consistency": 1}
        for name, least in numbers.items():
            value, most = plain_number(getattr(self, name)), _MOST.get(name, MAX_INT32)
            if value is None and getattr(ServerOptions, name) is None:
                continue
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (is_whole and least <= value <= most):
                shown = shown_integer(value) if is_whole else f"{value!r:.60}"
                raise OptionError(f"ServerOptions({name}={shown}): {name} must be an integer from {least} to {most:,}")
            object.__setattr__(self, name, value)
        if self.grpc_port != ServerOptions.grpc_port and not self.grpc:
            raise OptionError(f"ServerOptions(grpc_port={self.grpc_port}) has no effect without grpc=True. Add it.")
        self._check_words()
        if self.ca is not None and self.grpc:
            raise OptionError(
                "ServerOptions(ca=…, grpc=True): gRPC ignores ca. Set the environment variable "
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH to the file and omit ca="
            )
        if self.ca is not None and not Path(self.ca).is_file():
            raise OptionError(f"ServerOptions(ca={str(self.ca)!r}): there is no such file. Give a PEM file")

    def _check_words(self) -> None:
        words = {"quantization": QUANTIZATIONS, "ordering": ORDERINGS}
        if isinstance(self.consistency, str):
            words |= {"consistency": CONSISTENCIES}
        for name, accepted in words.items():
            if (value := getattr(self, name)) not in (None, *accepted):
                number = "a number, " if name == "consistency" else ""
                raise OptionError(
                    f"ServerOptions({name}={value!r:.60}): {name} must be None, {number}or one of {', '.join(accepted)}"
                )
        if self.alias is not None and not (isinstance(self.alias, str) and _ALIAS.fullmatch(self.alias)):
            raise OptionError(
                f"ServerOptions(alias={self.alias!r:.60}): give letters, digits, dots, underscores and hyphens"
            )

    def write_parameters(self) -> dict[str, Any]:
        """Keyword arguments of the client's writes for these options."""
        from qdrant_client import models

        return {} if self.ordering is None else {"ordering": models.WriteOrdering(self.ordering)}

    def read_parameters(self) -> dict[str, Any]:
        """Keyword arguments of the client's reads for these options."""
        from qdrant_client import models

        if self.consistency is None:
            return {}
        by_name = isinstance(self.consistency, str)
        return {"consistency": models.ReadConsistencyType(self.consistency) if by_name else self.consistency}

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
            "write_consistency_factor": self.write_replicas,
            "quantization_config": quantization,
        }
        return {name: value for name, value in given.items() if value is not None}


def connect(
    url: str, options: ServerOptions, api_key: str | None = None, *, sleep: Callable[[float], object] | None = None
) -> QdrantClient:
    """Return a client that retries failed requests as `options` specify. It sends no request yet.

    Args:
        url: of the server.
        options: protocol, timeout and retries.
        api_key: the key for the server.
        sleep: waits for the given number of seconds between two attempts. Default: `RetryingClient.interrupt` ends it.

    Raises:
        StoreError: the URL is invalid.
    """
    import httpx
    from qdrant_client import QdrantClient

    from .transport import BoundedTransport

    api_key = key = Secret.of(api_key)
    verify: ssl.SSLContext | bool = options.ca is None or ssl.create_default_context(cafile=str(options.ca))
    try:
        is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        limits = (
            httpx.Limits(max_keepalive_connections=0) if is_local else httpx.Limits(max_connections=MAX_CONNECTIONS)
        )
        http: dict[str, Any] = {"verify": verify, "limits": limits}
        if (
            "all" not in getproxies()
        ):  # a proxy for all hosts would be replaced; those for http and https take precedence
            http["mounts"] = {"all://": BoundedTransport(options.timeout, **http)}
        client = QdrantClient(
            url=url,
            api_key=key and key.reveal(),
            prefer_grpc=options.grpc,
            grpc_port=options.grpc_port,
            timeout=options.timeout,
            check_compatibility=False,  # the check sends a request that could not be retried
            **http,
        )
    except Exception as error:
        raise StoreError(
            f"{redact_url(url)} is not the URL of a Qdrant server ({error}). Give one such as http://localhost:6333."
        ) from without_frames(error)
    return cast("QdrantClient", RetryingClient(client, url, options.retries, api_key, sleep))
