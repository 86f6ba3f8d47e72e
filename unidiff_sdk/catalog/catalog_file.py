"""Where a catalog is, and its file `catalog.json`, which names its bundle and its vectors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidiff_sdk._internal.files import folder_hint, replacement_folder, resolve_stored, write_atomically
from unidiff_sdk._internal.json_values import parse_json, read_json
from unidiff_sdk._internal.text import redact_url
from unidiff_sdk.errors import BundleError, OptionError, StoreError
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.folder.hub import cached_name
from unidiff_sdk.inference.folder.signature import KeyFile
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.store.images.object_storage import ObjectFolder, ObjectStorage, image_place, user_cache
from unidiff_sdk.store.location import STORE_NAME, VECTORS, Location

if TYPE_CHECKING:
    from unidiff_sdk.store.server.connection import ServerOptions

__all__ = ["FILE_NAME", "MEMORY", "BundleRef", "CatalogFile", "CatalogPlace", "file_lock", "restore_place"]

FILE_NAME, LOCK_NAME = "catalog.json", "catalog.lock"
FORMAT = "unidiff-catalog"
SCHEMA_VERSION = 1
MAX_SIZE = 1 << 20  # bytes of a catalog.json, which has less than 1,000 unless its paths are very long
MAX_DIM = 65_536  # the longest vectors that the engine stores

TINY_NAME = "tiny"
MEMORY = ":memory:"
DEFAULT_COLLECTION = "catalog"
_SCHEME = re.compile("([a-z][a-z0-9+.-]*)://", re.IGNORECASE)

# ------------------------------------------------------------------------------------------------ places


@dataclass(frozen=True)
class CatalogPlace:
    """Where the parts of a catalog are.

    Attributes:
        location: as given to `Catalog`.
        folder: the folder of `catalog.json` and of the images, unless those are in object storage.
        stores: opens a store of vectors by the name in `catalog.json`.
        storage: the object storage of the images. It holds a `catalog.json` too, by which other machines find the
            catalog, and by which another catalog finds that the place is taken.
        temporary: whether the folder is deleted with the catalog.
    """

    location: str
    folder: Path
    stores: Location
    storage: ObjectStorage | None = None
    temporary: bool = False

    @classmethod
    def resolve(
        cls,
        location: str | Path,
        quantization: str | None,
        images: str | Path | ObjectStorage | None,
        collection: str,
        api_key: str | None,
        server: ServerOptions | None,
    ) -> CatalogPlace:
        """Interpret the arguments of `Catalog`. Creates a temporary folder for ":memory:".

        Raises:
            OptionError: with a URL, `images` is missing or `quantization` is given; without one, an argument for a
                server is given; or the URL is not http or https.
        """
        if not isinstance(location, str | os.PathLike) or not str(location) or "\0" in str(location):
            raise OptionError(
                f"location is {location!r:.60}. Give a folder, {MEMORY!r}, or the URL of a Qdrant server."
            )
        name = str(location)
        scheme = _SCHEME.match(name)
        if scheme and scheme[1].lower() not in ("http", "https"):
            raise OptionError(f"{redact_url(name):.200} has the scheme {scheme[1]}. Give a folder, or an http(s) URL.")
        image_folder = storage = None
        if images is not None:
            place = image_place(images)
            image_folder, storage = (place, None) if isinstance(place, Path) else (None, place)
        if not _is_url(name):
            for_servers = {"images": image_folder, "api_key": api_key, "server": server}
            ignored = [argument for argument, value in for_servers.items() if value is not None]
            ignored += ["collection"] if collection != DEFAULT_COLLECTION else []
            if ignored:
                raise OptionError(
                    f"{', '.join(ignored)}: only for a Qdrant server, and {name:.200} is a folder. Give the URL of the "
                    "server, or omit them. The images of a folder may be at a URL such as s3://bucket/prefix."
                )
            temporary = name == MEMORY
            if temporary and storage is not None:
                raise OptionError(f"A catalog at {MEMORY!r} is temporary, and its images too. Omit images=.")
            folder = _temporary_folder() if temporary else Path(location)
            return cls(name, folder, Location(folder, quantization), storage, temporary)
        if quantization is not None:
            raise OptionError(
                f"quantization={quantization!r} applies to a folder. For a server, give the quantization of the "
                "collection: server=ServerOptions(quantization=…)"
            )
        if images is None:
            raise OptionError(
                "A Qdrant server stores no images. Give a folder or a URL for them: Catalog(url, images='folder')"
            )
        folder = image_folder or user_cache("images", storage.url if storage else "")
        return cls(name, folder, Location(folder, None, name, collection, api_key, server), storage)

    @property
    def image_url(self) -> str:
        """The URL of the images; "" if they are in the folder."""
        return self.storage.url if self.storage is not None else ""

    def read(self) -> CatalogFile | None:
        """The content of `catalog.json`; None for a new catalog.

        If only the vectors are on a server, the file in object storage decides, and the folder has a copy with the
        places of bundles on this machine.

        Raises:
            StoreError: there is something else, or another catalog; or the images are elsewhere.
        """
        if self.storage is None:
            return self._checked(CatalogFile.read(self.folder))
        shared = ObjectFolder(self.storage).read(FILE_NAME)
        if self.stores.url is not None:
            return self._copied(shared)
        file = self._checked(CatalogFile.read(self.folder))
        if shared is not None and (file is None or CatalogFile.parse(shared, self.image_url).created != file.created):
            raise StoreError(
                f"{self.image_url} has the images of another catalog. Choose another prefix. If that catalog is gone, "
                f"delete {self.image_url}/{FILE_NAME}."
            )
        return file

    def publish(self, file: CatalogFile, *, new: bool = False) -> None:
        """Write `catalog.json` to the object storage, if there is one. With `new`, it must not be there yet.

        Raises:
            StoreError: the storage cannot be written; or with `new`, another process has created a catalog there.
        """
        if self.storage is None:
            return
        objects = ObjectFolder(self.storage)
        if not new:
            objects.write(FILE_NAME, file.to_bytes())
        elif not objects.create(FILE_NAME, file.to_bytes()):
            raise StoreError(f"Another process has created a catalog at {self.image_url}. Open it again.")

    def _checked(self, file: CatalogFile | None) -> CatalogFile | None:
        """The file, if it names the place of the images that was given."""
        if file is not None and file.images != self.image_url:
            here = f"at {file.images}. Give images={file.images!r}" if file.images else "in its folder. Omit images="
            raise StoreError(f"The images of {self.location} are {here}.")
        return file

    def _copied(self, shared: bytes | None) -> CatalogFile | None:
        """The file in object storage, or its copy in the folder if that is of the same state."""
        if shared is None:
            (self.folder / FILE_NAME).unlink(missing_ok=True)
            return None
        file = CatalogFile.parse(shared, self.image_url)
        copy = CatalogFile.read(self.folder)
        if copy is None or (copy.created, copy.vectors, copy.bundle.fingerprint) != (
            file.created,
            file.vectors,
            file.bundle.fingerprint,
        ):
            file.write(self.folder)
            return file
        return copy


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="unidiff-"))
    except OSError as error:
        raise StoreError(f"No temporary folder can be created for {MEMORY!r}: {error.strerror or error}.") from error


@contextmanager
def restore_place(location: str | Path) -> Iterator[str | Path]:
    """Where to restore a catalog so that its folder is complete or absent: in a sibling folder, renamed at the end.

    A URL and ":memory:" are restored in place.

    Raises:
        StoreError: the folder is not empty or cannot be written, or a restore into it is running.
    """
    if str(location) == MEMORY or _is_url(str(location)):
        yield location
        return
    folder = Path(location)
    _check_unused(folder)
    try:
        with replacement_folder(folder, StoreError) as building:
            yield building
            _check_unused(folder)  # again, because a restore takes minutes
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _check_unused(folder: Path) -> None:
    """Raise StoreError if there is a catalog or anything else in a folder."""
    if CatalogFile.read(folder) is not None:
        raise StoreError(f"There is a catalog at {folder} already. Restore into a new folder.")


def _is_url(location: str) -> bool:
    return bool(_SCHEME.match(location))


# ------------------------------------------------------------------------------------------------ catalog.json


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a catalog's `catalog.json` against other threads and processes, from reading it to writing it.

    Raises:
        StoreError: the folder cannot be written. One with a `catalog.json` may be read-only: nobody changes it then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = resolve_stored(folder, LOCK_NAME, StoreError).open("a")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS) and (folder / FILE_NAME).is_file():
            yield
            return
        raise StoreError(f"{folder} cannot be written: {error.strerror}.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may have a copy of the open file


@dataclass(frozen=True)
class BundleRef:
    """A reference to the bundle that produced the embeddings of a catalog.

    Attributes:
        name: the name of the bundle.
        path: "tiny" for the built-in bundle. Relative to the folder of the catalog if the bundle is in it or next to
            it, so that both can be moved together; otherwise absolute.
        absolute: the absolute path, for a catalog that was moved alone.
        fingerprint: identifies the content of the bundle.
        dim: the number of dimensions of its embeddings.
    """

    name: str
    path: str
    absolute: str
    fingerprint: str
    dim: int

    @classmethod
    def of(cls, bundle: Bundle, folder: Path) -> BundleRef:
        """The reference to a bundle from the catalog in `folder`."""
        path, folder = bundle.path.resolve(), folder.resolve()
        where = absolute = TINY_NAME if path == TINY.resolve() else str(path)
        if path.is_relative_to(folder.parent) and where != TINY_NAME:
            where = Path(os.path.relpath(path, folder)).as_posix()
        return cls(bundle.name, where, absolute, bundle.fingerprint, bundle.dim)

    def check(self, bundle: Bundle, folder: Path) -> None:
        """Raise StoreError if `bundle` is not the one that the catalog in `folder` was indexed with."""
        self._check(bundle.fingerprint, bundle.dim, bundle.path, folder)

    def open(self, folder: Path, trusted_keys: Sequence[KeyFile] | None = None) -> Bundle:
        """Open the bundle. A stranger may have named its path, so only its manifest is read before they match.

        Raises:
            BundleError: the bundle is missing, damaged, or not signed by a trusted key.
            StoreError: it is another bundle.
        """
        path = self.locate(folder)
        if not path.is_dir():
            raise BundleError(
                f'The bundle "{self.name}" that {folder} was indexed with is not at {path}. Move it back, or give its '
                f"new place: Catalog(location, bundle={cached_name(path) or '…'})."
            )
        manifest = Manifest.read(path)
        self._check(manifest.fingerprint, manifest.embedding.dim if manifest.embedding else 0, path, folder)
        return Bundle.open(path, fingerprint=self.fingerprint, trusted_keys=trusted_keys)

    def _check(self, fingerprint: str, dim: int, path: Path, folder: Path) -> None:
        if fingerprint == self.fingerprint:
            return
        sizes = f"; {dim} dimensions instead of {self.dim}" if dim != self.dim else ""
        raise StoreError(
            f'{folder} was indexed with the bundle "{self.name}" (fingerprint {self.fingerprint[:12]}), but {path} is '
            f"another bundle (fingerprint {fingerprint[:12]}{sizes}). Embeddings of different bundles cannot be "
            "compared. To re-encode the catalog, open it without bundle= and call "
            f"catalog.reindex({str(path)!r})."
        )

    def portable(self, folder: Path) -> str:
        """A path for `Bundle.open` that is valid everywhere on this machine."""
        return TINY_NAME if self.path == TINY_NAME else str(self.locate(folder))

    def locate(self, folder: Path) -> Path:
        """The path of the bundle, for a catalog that is now in `folder`."""
        if self.path == TINY_NAME:
            return TINY
        relative = Path(os.path.normpath(folder.resolve() / self.path))
        return relative if os.path.isdir(relative) else Path(self.absolute)

    def describe(self, path: str) -> dict[str, Any]:
        """The reference as JSON, with `path` as the path of the bundle."""
        return {"name": self.name, "path": path, "fingerprint": self.fingerprint, "dim": self.dim}

    def purpose(self, folder: Path) -> str | None:
        """What the bundle can do, see `ModelDescription.purpose`. None if its manifest cannot be read."""
        try:
            return Manifest.read(self.locate(folder)).purpose
        except BundleError:  # it was moved; what needs the bundle says so
            return None


@dataclass(frozen=True)
class CatalogFile:
    """The content of `catalog.json`.

    Attributes:
        bundle: the bundle that produced the embeddings.
        vectors: the name of the current store (`store.location`).
        created: the date and time of creation, ISO 8601.
        images: the URL of the images; "" if they are in the folder. It is compared, never opened: a stranger may have
            written it.
    """

    bundle: BundleRef
    vectors: str
    created: str
    images: str = ""

    @classmethod
    def new(cls, bundle: Bundle, folder: Path, images: str = "") -> CatalogFile:
        """The content for a new catalog."""
        precision = "microseconds" if images else "seconds"  # tells catalogs in object storage apart
        return cls(BundleRef.of(bundle, folder), VECTORS, datetime.now(UTC).isoformat(timespec=precision), images)

    @classmethod
    def parse(cls, data: bytes, place: str) -> CatalogFile:
        """The content of a file at a URL. Raises StoreError if it is damaged or of a later version."""
        name = f"{place}/{FILE_NAME}"
        return cls._of(parse_json(data, name, error=StoreError, kind=dict), name)

    @classmethod
    def read(cls, folder: Path) -> CatalogFile | None:
        """The content in `folder`; None if the folder is missing or empty.

        Raises:
            StoreError: the folder holds something else, or the file is damaged or of a later version.
        """
        path = folder / FILE_NAME
        try:
            if not path.is_file():
                if folder.exists() and not (folder.is_dir() and _is_unused(folder)):
                    if hint := folder_hint(folder):
                        raise StoreError(f"{folder} is not a catalog: it has no {FILE_NAME}.{hint}")
                    raise StoreError(
                        f"{folder} is not a catalog: it has no {FILE_NAME}. Choose a new folder. If it is a damaged "
                        f"catalog, restore {FILE_NAME} from a backup."
                    )
                return None
            content = read_json(resolve_stored(folder, FILE_NAME, StoreError), error=StoreError, max_size=MAX_SIZE)
        except (OSError, StoreError) as error:
            if isinstance(error, StoreError) and not path.is_file():
                raise
            raise StoreError(f"{path} is damaged ({error}). Restore it from a backup.") from error
        return cls._of(content, path)

    @classmethod
    def _of(cls, content: Any, path: Path | str) -> CatalogFile:
        """The content of a parsed file. Raises StoreError if it is damaged or of a later version."""
        try:
            version = content["schema_version"]
            if content["format"] == FORMAT and version == SCHEMA_VERSION:
                return cls._checked(content)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged ({error}). Restore it from a backup.") from error
        raise StoreError(
            f"{path} has schema version {version!r:.40}; this version of unidiff-sdk reads {SCHEMA_VERSION}. "
            "Upgrade unidiff-sdk, or index into a new folder."
        )

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> CatalogFile:
        """The content, with the type and form of every value checked. Raises KeyError, TypeError or ValueError."""
        bundle, vectors, created = BundleRef(**content["bundle"]), content["vectors"], content["created"]
        images = content.get("images", "")
        texts = bundle.name, bundle.path, bundle.absolute, bundle.fingerprint, vectors, created, images
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise TypeError(
                "name, path, absolute and fingerprint of the bundle, vectors, created and images must be text"
            )
        if type(bundle.dim) is not int or not 0 < bundle.dim <= MAX_DIM:
            raise ValueError(f"dim is {bundle.dim!r:.40}, not a number from 1 to {MAX_DIM}")
        if (
            not os.path.normpath(f"parent/folder/{bundle.path}").startswith("parent/")
            and not Path(bundle.path).is_absolute()
        ):
            raise ValueError(
                f"the path of the bundle is {bundle.path!r:.200}, which is neither in nor next to the folder"
            )
        if not STORE_NAME.fullmatch(vectors):
            raise ValueError(f'vectors is {vectors!r:.200}, not "{VECTORS}" or "{VECTORS}-FINGERPRINT"')
        return cls(bundle, vectors, created, images)

    def adopt(self, bundle: Bundle, folder: Path) -> CatalogFile:
        """Record the current path of the bundle. Raises StoreError if it is another bundle."""
        self.bundle.check(bundle, folder)
        current = replace(self, bundle=BundleRef.of(bundle, folder))
        if current != self:
            current.write(folder)
        return current

    def write(self, folder: Path) -> None:
        """Write `catalog.json` durably. Raises StoreError."""
        write_atomically(folder / FILE_NAME, self.to_bytes(), fsync=True)

    def to_bytes(self) -> bytes:
        """The content of a file."""
        content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        if not self.images:
            del content["images"]
        return (json.dumps(content, indent=2) + "\n").encode()


def _is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or was left by a process that was killed before it had created a catalog there."""
    names = {entry.name for entry in folder.iterdir()}
    return not names or (LOCK_NAME in names and all(name in (LOCK_NAME, VECTORS) for name in names))
