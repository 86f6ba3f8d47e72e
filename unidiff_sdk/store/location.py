"""Where a catalog's vectors are: in subfolders of its folder or in collections of a server, of which one counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .protocol import Store

if TYPE_CHECKING:
    from .server.connection import ServerOptions

__all__ = ["VECTORS", "Location"]

VECTORS = "vectors"  # what a new catalog's are called; those of a reindexing have the bundle's fingerprint added


@dataclass(frozen=True)
class Location:
    """How to open a store by the name that `catalog.json` gives it.

    Attributes:
        folder: the catalog's.
        quantization: of stores in the folder, "scalar" or none; None keeps what a store has.
        url: of a server; None for stores in the folder.
        collection: what the first collection is called there; for later ones what is added to `VECTORS` is added to it.
        api_key, options: for the server.
    """

    folder: Path
    quantization: str | None = None
    url: str | None = None
    collection: str = "catalog"
    api_key: str | None = None
    options: ServerOptions | None = None

    def open(self, name: str, dim: int, fingerprint: str) -> Store:
        """The store of that name, made if there is none, for vectors of `dim` numbers by the bundle of a fingerprint.

        Raises:
            StoreError: it cannot be opened, is in use, or was made with another bundle.
        """
        if self.url is None:
            from .edge.store import EdgeStore

            return EdgeStore(self.folder / name, dim, self.quantization)
        from .server.connection import ServerOptions, connect
        from .server.store import ServerStore

        options = self.options or ServerOptions()
        collection = self.collection + name.removeprefix(VECTORS)
        return ServerStore(connect(self.url, options, self.api_key), collection, dim, fingerprint, options)
