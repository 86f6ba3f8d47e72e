"""The location of a catalog's vectors: a subfolder of the catalog folder, or a collection on a Qdrant server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff_sdk._internal.files import resolve_stored
from unidiff_sdk._internal.text import Secret, redact_url
from unidiff_sdk.errors import OptionError, StoreError

from .payload import is_item
from .protocol import Store

if TYPE_CHECKING:
    from .server.connection import ServerOptions

__all__ = ["STORE_NAME", "VECTORS", "Location"]

VECTORS = "vectors"
"""The store name of a new catalog. A reindexed store appends the fingerprint of its bundle."""

STORE_NAME = re.compile(rf"{VECTORS}(-[0-9a-f]{{12}})?", re.ASCII)
"""The names of stores. A folder with another name is never opened and never deleted."""


@dataclass(frozen=True)
class Location:
    """Where the stores of one catalog are. `open` opens one by the name that `catalog.json` records.

    Attributes:
        folder: the catalog folder.
        quantization: of a store in the folder: "scalar" or None. An existing store keeps its own.
        url: the Qdrant server; None for a store in the folder.
        collection: the name of the first collection on the server. Later ones append the suffix of the store name.
        api_key: the key for the server. It is never shown and never pickled.
        options: timeouts, retries and layout of collections on the server.

    Raises:
        OptionError: the URL has a user name, a password or a query, which the server would not receive.
    """

    folder: Path
    quantization: str | None = None
    url: str | None = None
    collection: str = "catalog"
    api_key: str | None = None
    options: ServerOptions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", Secret.of(self.api_key))
        if self.url is not None and (shown := redact_url(self.url)) != self.url:
            object.__setattr__(self, "url", shown)
            raise OptionError(
                f"The URL {shown} has a user name, a password or a query, which Qdrant does not read. Give the plain "
                "URL, and the key as api_key=."
            )

    def open(self, name: str, dim: int, fingerprint: str, *, create: bool) -> Store:
        """Open a store.

        Args:
            name: `VECTORS`, with or without a suffix.
            dim: the length of the vectors.
            fingerprint: of the bundle that makes the vectors.
            create: create the store if it is missing. If False, that is an error: its items were lost.

        Raises:
            StoreError: the store is missing or damaged, cannot be opened, is in use, or was made with another bundle.
        """
        if not STORE_NAME.fullmatch(name):
            raise StoreError(
                f"{name!r:.200} is not the name of a store. Accepted: {VECTORS}, or {VECTORS}-FINGERPRINT."
            )
        if self.url is None:
            from .edge.store import EdgeStore

            return EdgeStore(resolve_stored(self.folder, name, StoreError), dim, self.quantization, create=create)
        from .server.connection import ServerOptions, connect
        from .server.store import ServerStore

        options = self.options or ServerOptions()
        collection = self.collection + name.removeprefix(VECTORS)
        return ServerStore(
            connect(self.url, options, self.api_key),
            collection,
            dim,
            fingerprint,
            options,
            create=create,
            is_record=is_item,
        )
