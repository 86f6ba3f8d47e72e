"""The argument CATALOG of a command: a folder, or the URL of a Qdrant server with its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unidiff_sdk._internal.text import Secret, redact_url
from unidiff_sdk.cli.console import Option
from unidiff_sdk.errors import InUseError, OptionError
from unidiff_sdk.store.images.object_storage import is_object_storage

from .server_file import ServerFile

if TYPE_CHECKING:
    from unidiff_sdk.catalog.catalog import Catalog

    from .served_catalog import ServedCatalog

__all__ = ["CatalogLocation", "catalog_options", "qdrant_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class CatalogLocation:
    """Where the catalog of a command is.

    Attributes:
        place: the folder, or the http(s) URL of a Qdrant server.
        images: the URL of the images; with the URL of a server, their folder or URL.
        collection: with a URL, the collection. Default: the one that `Catalog` uses.
        api_key: with a URL, its API key.

    Raises:
        OptionError: a URL comes without its folder of images, or a folder with options of a URL.
    """

    place: str
    images: str | None = None
    collection: str | None = None
    api_key: Secret | None = None

    def __post_init__(self) -> None:
        given = [
            option
            for option, value in (
                ("--image-store", None if is_object_storage(self.images) else self.images),
                ("--collection", self.collection),
                ("--qdrant-api-key-file", self.api_key),
            )
            if value is not None
        ]
        if given and not self.is_url:
            raise OptionError(f"{', '.join(given)}: only for the URL of a Qdrant server, and {self} is a folder.")
        if self.is_url and self.images is None:
            raise OptionError(f"{self} stores no images. Give their folder or URL: --image-store FOLDER")

    def __str__(self) -> str:
        return redact_url(self.place)

    @property
    def is_url(self) -> bool:
        """Whether the catalog is on a Qdrant server."""
        return "://" in self.place

    @property
    def is_bundle(self) -> bool:
        """Whether the folder is that of a bundle."""
        names = ("manifest.json", "model_index.json")
        return not self.is_url and any((Path(self.place) / name).is_file() for name in names)

    def exists(self) -> bool:
        """Whether there is a folder of this name, or the catalog is on a server."""
        return self.is_url or Path(self.place).exists()

    def open(self, bundle: str | None = None, *, create: bool = False, **options: Any) -> Catalog:
        """Open the catalog: see `Catalog` for the arguments and errors.

        Raises StoreError with the address of the server if `unidiff serve` has the folder open.
        """
        from unidiff_sdk.catalog.catalog import Catalog

        try:
            return Catalog(self.place, bundle, create=create, **self.opening(), **options)
        except InUseError as error:
            if (server := ServerFile.find(Path(self.place))) is None:
                raise
            raise InUseError(
                f"{self} is held by `unidiff serve` at {server.url} (process {server.process}). Change the catalog "
                f"through that server (it needs --allow-writes), or stop it first."
            ) from error

    def opening(self) -> dict[str, Any]:
        """The arguments of `Catalog` that belong to a URL."""
        given = {"images": self.images, "collection": self.collection, "api_key": self.api_key}
        return {name: value for name, value in given.items() if value is not None}

    @contextmanager
    def reading(self, **options: Any) -> Iterator[Catalog | ServedCatalog]:
        """Open the catalog, or ask the server that has its folder open.

        Args:
            options: arguments of `Catalog`. The server has its own, so these are then errors unless they are None.

        Raises:
            OptionError: an option was given that the server would ignore.
            StoreError: the folder is in use, but not by a server that answers.
        """
        try:
            catalog = self.open(**options)
        except InUseError:
            from .served_catalog import ServedCatalog

            server = ServerFile.find(Path(self.place))
            if server is None or not server.answers():
                raise
            if given := [name for name, value in options.items() if value is not None]:
                raise OptionError(
                    f"{self} is held by `unidiff serve` at {server.url}, which ignores "
                    f"{', '.join(f'--{name}'.replace('_', '-').removesuffix('s') for name in given)}. Stop that server "
                    "first."
                ) from None
            yield ServedCatalog(server, Path(self.place), self.images)
            return
        with catalog:
            yield catalog


def qdrant_options(function: Function) -> Function:
    """Add the options of a catalog on a Qdrant server. The function receives `locate`, a function of CATALOG."""

    @click.option(
        "--image-store", cls=Option, theme="With a URL", metavar="FOLDER|URL",
        help="Folder or URL (s3://…, gs://…) of the images. Required with a URL of a server.",
    )  # fmt: skip
    @click.option(
        "--collection", cls=Option, theme="With a URL", metavar="NAME", help="Name of the collection. Default: catalog."
    )
    @click.option(
        "--qdrant-api-key-file", cls=Option, theme="With a URL", metavar="FILE", type=click.Path(path_type=Path),
        help="File with the API key of the Qdrant server.",
    )  # fmt: skip
    @wraps(function)
    def with_location(
        *, image_store: str | None, collection: str | None, qdrant_api_key_file: Path | None, **rest: Any
    ) -> Any:
        def locate(place: str) -> CatalogLocation:
            return CatalogLocation(place, image_store, collection, _key_in(qdrant_api_key_file))

        return function(locate=locate, **rest)

    return with_location  # type: ignore[return-value]


def catalog_options(function: Function) -> Function:
    """Add the same options to a command with the argument CATALOG. The function receives it as a `CatalogLocation`."""

    @qdrant_options
    @wraps(function)
    def with_catalog(*, catalog: str, locate: Callable[[str], CatalogLocation], **rest: Any) -> Any:
        return function(catalog=locate(catalog), **rest)

    return with_catalog  # type: ignore[return-value]


def _key_in(file: Path | None) -> Secret | None:
    if file is None:
        return None
    try:
        return Secret(file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: cannot be read ({error})") from error
