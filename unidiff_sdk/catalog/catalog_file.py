"""`catalog.json`: what a catalog's folder must remember to be opened again, from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk.errors import StoreError
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.store.location import VECTORS

__all__ = ["CHANGING", "FILE_NAME", "BundleRef", "CatalogFile", "new_place"]

FILE_NAME = "catalog.json"
FORMAT = "unidiff-catalog"
SCHEMA_VERSION = 1

TINY_NAME = "tiny"

CHANGING = threading.Lock()
"""Held from reading a `catalog.json` to writing it. No other lock is taken under it."""


@dataclass(frozen=True)
class BundleRef:
    """The bundle that made a catalog's vectors.

    Attributes:
        path: "tiny" for the built-in one; relative to the catalog's folder if it lies in or beside it, so that both
            can move together; else absolute.
        absolute: where it was, for a catalog that has moved alone.
    """

    name: str
    path: str
    absolute: str
    fingerprint: str
    dim: int

    @classmethod
    def of(cls, bundle: Bundle, folder: Path) -> BundleRef:
        path, folder = bundle.path.resolve(), folder.resolve()
        where = absolute = TINY_NAME if path == TINY.resolve() else str(path)
        if path.is_relative_to(folder.parent) and where != TINY_NAME:
            where = Path(os.path.relpath(path, folder)).as_posix()
        return cls(bundle.name, where, absolute, bundle.fingerprint, bundle.dim)

    def check(self, bundle: Bundle, folder: Path) -> None:
        """Raise StoreError if the vectors of the catalog in `folder` were made by another bundle than this one."""
        if bundle.fingerprint == self.fingerprint:
            return
        sizes = f" and of {self.dim} dimensions, not {bundle.dim}" if bundle.dim != self.dim else ""
        raise StoreError(
            f'{folder} was indexed with the bundle "{self.name}" (fingerprint {self.fingerprint[:12]}), and '
            f"{bundle.path} is another one (fingerprint {bundle.fingerprint[:12]}){sizes}: their vectors do not "
            "compare. To re-encode the catalog, open it without bundle= and call "
            f"catalog.reindex({str(bundle.path)!r})."
        )

    def portable(self, folder: Path) -> str:
        """What `Bundle.open` takes, from anywhere on this machine."""
        return TINY_NAME if self.path == TINY_NAME else str(self.locate(folder))

    def locate(self, folder: Path) -> Path:
        """Where the bundle is, for a catalog that is now at `folder`."""
        if self.path == TINY_NAME:
            return TINY
        beside = Path(os.path.normpath(folder.resolve() / self.path))
        return beside if beside.is_dir() else Path(self.absolute)


@contextmanager
def new_place(location: str | Path) -> Iterator[str | Path]:
    """Where to build a catalog that is to be there whole or not at all: beside its folder, which it then becomes.

    A URL and ":memory:" are built where they are.

    Raises:
        StoreError: the folder is not empty, or is just being built.
    """
    if str(location) == ":memory:" or str(location).startswith(("http://", "https://")):
        yield location
        return
    folder = Path(location)
    if CatalogFile.read(folder) is not None:
        raise StoreError(f"There is a catalog at {folder} already: restore into a new folder.")
    building = folder.parent / f".{folder.name}.restoring"
    try:
        building.mkdir(parents=True)
    except FileExistsError:
        raise StoreError(
            f"{building} is there: {folder} is being restored by another process, or was by one that was killed. "
            "If so, delete it."
        ) from None
    except OSError as error:
        raise StoreError(f"{building} cannot be written: {error.strerror}.") from error
    try:
        yield building
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


@dataclass(frozen=True)
class CatalogFile:
    """The content of `catalog.json`; `vectors` names the current store (`store.location`)."""

    bundle: BundleRef
    vectors: str
    created: str

    @classmethod
    def new(cls, bundle: Bundle, folder: Path) -> CatalogFile:
        return cls(BundleRef.of(bundle, folder), VECTORS, datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def read(cls, folder: Path) -> CatalogFile | None:
        """None if the folder is missing or empty. Raises StoreError if it holds something that is not a catalog."""
        path = folder / FILE_NAME
        try:
            if not path.is_file():
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise StoreError(
                        f"{folder} exists and is not a catalog: it has no {FILE_NAME}. Choose a new folder."
                    )
                return None
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
            if content["format"] == FORMAT and version == SCHEMA_VERSION:
                return cls(BundleRef(**content["bundle"]), str(content["vectors"]), str(content["created"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}). Restore it from a backup.") from error
        raise StoreError(
            f"{path} has schema version {version!r} and this version of unidiff-sdk reads {SCHEMA_VERSION}. "
            "Upgrade unidiff-sdk, or index into a new folder."
        )

    def adopt(self, bundle: Bundle, folder: Path) -> CatalogFile:
        """Remember where the bundle is now. Raises StoreError if it is another one."""
        self.bundle.check(bundle, folder)
        found = replace(self, bundle=BundleRef.of(bundle, folder))
        if found != self:
            found.write(folder)
        return found

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        write_atomically(folder / FILE_NAME, (json.dumps(content, indent=2) + "\n").encode(), fsync=True)
