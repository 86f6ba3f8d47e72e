"""A catalog that `unidiff serve` has open, for commands that only read it."""

from __future__ import annotations

import base64
import json
import shutil
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import atomic_file, read_regular_file
from unidiff_sdk._internal.images import MAX_FILE_SIZE
from unidiff_sdk.errors import ImageError, OptionError, StoreError
from unidiff_sdk.retrieval.results import Hit, Page
from unidiff_sdk.store.images import open_images
from unidiff_sdk.store.images.object_storage import ObjectStorage

from .server_file import ServerFile

__all__ = ["ServedCatalog"]

# The server ends a request by its own --timeout. An export sends its first byte when its file is complete.
TIMEOUT = 3600.0


class ServedCatalog:
    """The methods of `Catalog` that `unidiff info`, `search` and `export` use, answered by a server.

    Images are read from the folder, which is on this machine, or from their URL.

    Args:
        server: the server that has the folder open.
        folder: the folder of the catalog.
        images: the URL of the images, unless they are in the folder.
    """

    def __init__(self, server: ServerFile, folder: Path, images: str | None = None) -> None:
        storage = ObjectStorage(images) if images is not None else None
        self._server, self._images = server, open_images(folder, storage)

    def info(self) -> dict[str, Any]:
        """As `Catalog.info`."""
        with self._answer("info") as response:
            facts: dict[str, Any] = json.load(response)
        return facts

    def count(self) -> int:
        """The number of items."""
        return int(self.info()["items"])

    def search(
        self,
        text: str | None,
        *,
        image: Path | None = None,
        weights: tuple[float, float] | None = None,
        **options: Any,
    ) -> Page:
        """As `Catalog.search`, with an image from a file."""
        body = {name: value for name, value in options.items() if value is not None} | {"text": text}
        if weights is not None:
            body["weights"] = dict(zip(("text", "image"), weights, strict=True))
        if image is not None:
            body["image"] = base64.b64encode(read_regular_file(image, MAX_FILE_SIZE, ImageError)).decode()
        with self._answer("search", body) as response:
            page = json.load(response)
        hits = tuple(Hit(**hit, _images=self._images) for hit in page["hits"])
        cursor = page["cursor"]
        return Page(hits, page["offset"], page["limit"], page["took_ms"], None if cursor is None else lambda: cursor)

    def export(self, file: Path, *, where: Mapping[str, Any] | None, overwrite: bool, progress: bool) -> int:
        """As `Catalog.export`. Shows no progress: the server sends the file when it is complete."""
        from unidiff_sdk.catalog.archive import check_replaceable

        file = check_replaceable(file, overwrite)
        with self._answer("export", {"where": where}) as response, atomic_file(file) as temporary:
            with temporary.open("wb") as output:
                shutil.copyfileobj(response, output)
            if temporary.stat().st_size != int(response.headers["Content-Length"]):
                raise StoreError(f"The server at {self._server.url} ended before the export was complete. Try again.")
            return int(response.headers["X-Items"])

    @contextmanager
    def _answer(self, route: str, body: Any = None) -> Iterator[Any]:
        """The response to a request. Raises OptionError if an argument is invalid, StoreError if the server fails."""
        try:
            with self._server.request(f"/v1/local/{route}", body, timeout=TIMEOUT) as response:
                yield response
        except urllib.error.HTTPError as error:
            detail = _detail_of(error)
            if error.code in (404, 422):  # an item that `like` names, or another argument
                raise OptionError(detail) from error
            raise StoreError(f"The server at {self._server.url} answered {error.code}: {detail}") from error
        except OSError as error:
            raise StoreError(f"The server at {self._server.url} does not answer: {error}") from error


def _detail_of(error: urllib.error.HTTPError) -> str:
    """What a problem (RFC 9457) says about the request."""
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
