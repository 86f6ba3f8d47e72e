"""Snapshots, each a store and the bundle that produced its embeddings; and an open catalog, which has a current one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from unidiff_sdk._internal.files import remove_unfinished
from unidiff_sdk._internal.lifetimes import Owner, finalize_in_owner
from unidiff_sdk._internal.memory import DiskFullError
from unidiff_sdk._internal.text import Secret
from unidiff_sdk._internal.warnings import safe_logger, warn
from unidiff_sdk.errors import ForbiddenError, StoreError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.folder.signature import KeyFile
from unidiff_sdk.retrieval.columns import column_kinds
from unidiff_sdk.retrieval.reranking.latents import LatentStore
from unidiff_sdk.retrieval.reranking.reranker import Reranker, check_generator
from unidiff_sdk.retrieval.results import Hit
from unidiff_sdk.retrieval.searcher import Searcher
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.images import ImageStore, open_images
from unidiff_sdk.store.payload import system_of
from unidiff_sdk.store.protocol import MAX_DELETED_SHARE

from .aio import OPENING, Resource, async_variant
from .catalog_file import CatalogFile, CatalogPlace, file_lock

if TYPE_CHECKING:
    from PIL import Image

    from unidiff_sdk.generation.generator import Generator
    from unidiff_sdk.store.images.object_storage import ObjectStorage
    from unidiff_sdk.store.server.connection import ServerOptions

__all__ = ["CatalogParts", "CurrentSnapshot", "OpenCatalog", "Snapshot", "publish"]

_log = safe_logger(__name__)

# Building a graph index of 20,000 vectors takes 10 s and does not speed up searches; with 100,000 it does tenfold.
OPTIMIZE_FROM = 50_000
# How far the deleted share may be overestimated after a write, so that writing item by item need not wait for the disk
# each time.
DELETED_SHARE_TOLERANCE = 0.01


class Snapshot:
    """A store and the bundle that produced its embeddings. Reindexing replaces both as one.

    Code that needs both takes them from the same snapshot, so that a query encoded by the old bundle never meets the
    embeddings of the new one.

    Args:
        store: embeddings and payloads.
        folder: the folder of the catalog; relative paths to the bundle start here.
        file: the content of `catalog.json`, which names the bundle.
        bundle: the bundle, if it is open already. Otherwise it is opened when first needed.
        trusted_keys: as for `Bundle.open`, for this bundle and the next ones.

    Attributes:
        latents: the stored latents of its items by its bundle.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        file: CatalogFile,
        bundle: Bundle | None = None,
        trusted_keys: Sequence[KeyFile] | None = None,
    ) -> None:
        self.store, self.folder, self.file, self.trusted_keys = store, folder, file, trusted_keys
        self._bundle = bundle
        self._encoder: Encoder | None = None
        self._generator: Generator | None = None
        self._reranker: Reranker | None = None
        self.latents = LatentStore(folder, file.bundle.fingerprint)
        self._lock = threading.RLock()
        self._rebuilding = threading.Lock()

    @classmethod
    def open(
        cls,
        place: CatalogPlace,
        bundle: Bundle | str | Path | None,
        *,
        create: bool,
        trusted_keys: Sequence[KeyFile] | None = None,
    ) -> Snapshot:
        """Open the catalog at a place, or create it there.

        Args:
            place: where its parts are.
            bundle: the bundle. Default: the one in `catalog.json`, or the built-in one for a new catalog.
            create: whether to create a missing catalog.
            trusted_keys: as for `Bundle.open`.

        Raises:
            StoreError: there is no catalog, it is in use, or another bundle created it.
            BundleError: the bundle is missing or damaged.
        """
        file = place.read()
        if file is None and not create:
            where = place.image_url or place.folder
            raise StoreError(f"There is no catalog at {where}. Create one: unidiff index FOLDER {place.folder}")
        opened: Bundle | None = None
        if bundle is not None or file is None:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, trusted_keys=trusted_keys)
        with file_lock(place.folder):
            remove_unfinished(place.folder)
            file = place.read()  # again: another process may have created the catalog meanwhile
            if file is not None:
                store, file = _open_existing(place, file, opened)
            elif opened is not None:
                store, file = _create(place, opened)
            else:
                raise StoreError(f"The catalog at {place.folder} was deleted while it was opened. Open it again.")
        try:
            publish(store)
        except BaseException:
            store.close()
            raise
        _log.debug("opened %s, indexed with the bundle %s", place.location, file.bundle.name)
        return cls(store, place.folder, file, opened, trusted_keys)

    @property
    def bundle(self) -> Bundle:
        """The bundle. Raises BundleError if it is missing, StoreError if it is not the one that was indexed with."""
        with self._lock:
            if self._bundle is None:
                self._bundle = self._open_bundle()
            return self._bundle

    def _open_bundle(self) -> Bundle:
        bundle = self.file.bundle.open(self.folder, self.trusted_keys)
        with file_lock(self.folder):
            file = CatalogFile.read(self.folder)
            if file is not None and file.bundle.fingerprint == bundle.fingerprint:  # not reindexed in the meantime
                self.file = file.adopt(bundle, self.folder)
        return bundle

    @property
    def encoder(self) -> Encoder:
        """The encoder of the bundle."""
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(self.bundle)
            return self._encoder

    @property
    def generator(self) -> Generator:
        """The generator of the bundle."""
        from unidiff_sdk.generation.generator import Generator  # most searches need neither it nor its samplers

        with self._lock:
            if self._generator is None:
                self._generator = Generator(self.bundle)
            return self._generator

    def stop_generating(self, reason: str) -> None:
        """End all generations with a StoreError, also those that wait for their turn."""
        if self._generator is not None:
            self._generator.stop(reason)

    def reranker(self, images: ImageStore) -> Reranker:
        """The reranker of items with images in a store. Raises BundleError if the bundle has no generator."""
        with self._lock:
            if self._reranker is None:
                self._reranker = Reranker(self.bundle, lambda: self.generator, images.load, self.latents)
            return self._reranker

    def generate_queries(self, texts: Sequence[str], n: int) -> list[Image.Image]:
        """Generate `n` images of each text to search with, in the order of the texts."""
        return self.generator.query_images(texts, n)

    def optimize(self) -> None:
        """Build the search index."""
        self.store.optimize()

    def optimize_if_large(self) -> None:
        """Build the search index if searches would be slow without it, or if much of it was deleted.

        On a full disk, that is a warning: everything is stored, and searches find it without an index, but slower.
        """
        try:
            if self.store.unindexed_count() >= OPTIMIZE_FROM or self.store.deleted_share() > MAX_DELETED_SHARE:
                self.store.optimize()
        except DiskFullError as error:
            warn(f"All items are stored, but the search index was not built. Call optimize() later. {error}")

    def optimize_if_deleted(self) -> None:
        """Build the search index again if more than `MAX_DELETED_SHARE` of it was deleted or replaced.

        Does nothing while another thread does it. A failure is a warning: what was written is kept, and searches find
        everything without a new index, but slower.
        """
        if not self._rebuilding.acquire(blocking=False):
            return
        try:
            shares = map(self.store.deleted_share, (DELETED_SHARE_TOLERANCE, 0.0))
            if all(share > MAX_DELETED_SHARE for share in shares):
                self.store.optimize()
        except StoreError as error:
            warn(f"All changes are stored, but the search index was not built again: {error}")
        finally:
            self._rebuilding.release()

    def describe_bundle(self) -> dict[str, Any]:
        """The bundle as JSON, with a path that is valid everywhere on this machine."""
        return self.file.bundle.describe(self.file.bundle.portable(self.folder))

    def describe(self) -> dict[str, Any]:
        """The number of items, date of creation, columns and bundle, as in `Catalog.info`."""
        reference = self.file.bundle
        return {
            "items": self.store.count(),
            "created": self.file.created,
            "columns": column_kinds(self.store),
            "bundle": reference.describe(str(reference.locate(self.folder)))
            | {"purpose": reference.purpose(self.folder)},
        }


def publish(store: Store) -> None:
    """Let the alias on a server lead to the store. A key that may only read leaves it as it is."""
    if (act := getattr(store, "publish", None)) is not None:
        try:
            act()
        except ForbiddenError as error:
            warn(f"The alias of the collection was not updated: {error}")


def _open_existing(place: CatalogPlace, file: CatalogFile, bundle: Bundle | None) -> tuple[Store, CatalogFile]:
    """Open the store of a catalog. It must exist: a missing one is damage, not a new catalog."""
    if bundle is not None:
        file.bundle.check(bundle, place.folder)
    store = place.stores.open(file.vectors, file.bundle.dim, file.bundle.fingerprint, create=False)
    try:
        return store, file if bundle is None else file.adopt(bundle, place.folder)
    except BaseException:
        store.close()
        raise


def _create(place: CatalogPlace, bundle: Bundle) -> tuple[Store, CatalogFile]:
    """Create a catalog. `catalog.json` is written last, so that it never names a store that does not exist."""
    file = CatalogFile.new(bundle, place.folder, place.image_url)
    store = place.stores.open(file.vectors, bundle.dim, bundle.fingerprint, create=True)
    try:
        if place.stores.url is None and (count := store.count()):
            raise StoreError(
                f"{place.folder} has {count} vectors but no catalog.json. Restore catalog.json from a backup, or "
                "choose a new folder."
            )
        place.publish(file, new=True)
        file.write(place.folder)
    except BaseException:
        store.close()
        raise
    return store, file


class CurrentSnapshot:
    """The current snapshot of an open catalog, the searcher over it, and the changes during a reindexing.

    Args:
        snapshot: the first one; `replace` exchanges it.
        images: the images of the items.
        location: the location of the catalog, for messages.

    Attributes:
        lock: held while the store is changed or the snapshot is replaced.
        reindexing: held during a reindexing.
        make_hit: (payload, score) to a hit.
        owner: the process that opened the catalog.
        warned: whether a warning about real images was issued.
        prepares_rerank: whether the latents of new items are computed when they are added.
    """

    def __init__(self, snapshot: Snapshot, images: ImageStore, location: str) -> None:
        self.snapshot, self.location, self.images = snapshot, location, images
        self.prepares_rerank = False
        self.owner = Owner(f"The catalog {location}")
        self.lock = threading.RLock()
        self.reindexing = threading.Lock()
        self.make_hit = partial(Hit.from_payload, images=images)  # holds no reference to the catalog
        self._searcher: Searcher | None = None
        self._searcher_lock = threading.Lock()
        self._written: set[str] | None = None  # keys, while a reindexing tracks changes
        self.replaced_stores: set[str] = set()  # names of stores that running searches or generations still read
        self._is_closing = self._is_closed = False
        self.warned = False

    def get(self) -> Snapshot:
        """The current snapshot. Raises StoreError if the catalog is closed or being closed.

        Keep a reference to it while using its store: the store of a replaced snapshot is closed with the last one.
        """
        if self._is_closing:
            raise StoreError(f"The catalog {self.location} is closed.")
        return self.snapshot

    def searcher(self) -> Searcher:
        """The searcher over the current snapshot. Raises StoreError if the catalog is closed."""
        with self._searcher_lock:
            snapshot = self.get()
            if self._searcher is None:
                self._searcher = Searcher(
                    snapshot.store,
                    lambda: snapshot.encoder,
                    self.make_hit,
                    snapshot.generate_queries,
                    partial(snapshot.reranker, self.images),
                )
            return self._searcher

    def replace(self, snapshot: Snapshot) -> None:
        """Answer with another snapshot from now on. Call it under `lock`."""
        with self._searcher_lock:
            self.snapshot, self._searcher = snapshot, None

    def prepare_rerank(self, records: Sequence[Record]) -> int:
        """Compute and store the latents of items that have none. Returns the number of images.

        Raises:
            BundleError: the bundle has no generator.
            ImageError: an image cannot be read.
            StoreError: the disk is full.
        """
        snapshot = self.get()
        latents = snapshot.reranker(self.images).prepare(records)
        with self.lock:  # no item is deleted between the check and the writing
            kept = {system_of(record.payload)["sha256"] for record in snapshot.store.retrieve([r.id for r in records])}
            for sha256 in latents.keys() & kept:
                snapshot.latents.write(sha256, latents[sha256])
        return len(latents)

    @contextmanager
    def while_not_reindexing(self) -> Iterator[Snapshot]:
        """The current snapshot, which no reindexing replaces meanwhile. Raises StoreError if one is running."""
        if not self.reindexing.acquire(blocking=False):
            raise StoreError(f"{self.location} is being reindexed already. Wait until that has finished.")
        try:
            yield self.get()
        finally:
            self.reindexing.release()

    def track_changes(self) -> None:
        """Start recording the keys of all items that are written or deleted."""
        with self.lock:
            self._written = set()

    def record_changes(self, keys: Iterable[str]) -> None:
        """Record changed keys if a reindexing tracks them. Call it under `lock`."""
        if self._written is not None:
            self._written.update(keys)

    def take_changes(self) -> set[str]:
        """The keys recorded since the last call."""
        with self.lock:
            written, self._written = self._written or set(), set()
        return written

    def stop_tracking(self) -> None:
        """Stop recording keys."""
        with self.lock:
            self._written = None

    def close(self) -> bool:
        """Close the store once running writes have ended. Returns False if it was closed before.

        New calls are refused at once. Calls that wait end with a StoreError: those that generate images, and those
        that would repeat a request to a server.
        """
        self._is_closing = True
        self.snapshot.stop_generating(f"The catalog {self.location} was closed, which ended the generation.")
        if (interrupt := getattr(self.snapshot.store, "interrupt", None)) is not None:
            interrupt()
        with self.lock:
            if self._is_closed:
                return False
            self._is_closed = True
            self.snapshot.store.close()
            return True


@dataclass(frozen=True)
class CatalogParts:
    """What a catalog consists of, for code that reads more of it than `Catalog` returns, such as all vectors.

    They belong to the catalog and are valid until it is closed. After a reindexing they are those before it.

    Attributes:
        store: embeddings and payloads.
        images: the images of the items.
        bundle: the bundle that produced the embeddings.
    """

    store: Store
    images: ImageStore
    bundle: Bundle
    _snapshot: Snapshot = field(repr=False)  # the store of a replaced one is closed with the last reference to it


class OpenCatalog(Resource):
    """The parts of an open catalog: how it is opened, built from given parts, and closed."""

    def __init__(
        self,
        location: str | Path = ":memory:",
        bundle: Bundle | str | Path | None = None,
        *,
        create: bool = True,
        quantization: str | None = None,
        images: str | Path | ObjectStorage | None = None,
        collection: str = "catalog",
        api_key: str | None = None,
        server: ServerOptions | None = None,
        references: str | Path | None = None,
        trusted_keys: Sequence[KeyFile] | None = None,
        rerank: bool = False,
    ) -> None:
        api_key = Secret.of(api_key)  # also hides it in tracebacks that show local variables
        place = CatalogPlace.resolve(location, quantization, images, collection, api_key, server)
        if place.temporary:
            self._remove_temporary = finalize_in_owner(self, shutil.rmtree, place.folder, ignore_errors=True)
        image_store = open_images(place.folder, place.storage, None if references is None else Path(references))
        snapshot = Snapshot.open(place, bundle, create=create, trusted_keys=trusted_keys)
        self._assemble(place.location, snapshot, image_store, place)
        self._opened.prepares_rerank = rerank
        if rerank:
            try:
                check_generator(snapshot.bundle)
            except BaseException:
                self.close()
                raise

    @classmethod
    def from_parts(cls, store: Store, images: ImageStore, bundle: Bundle) -> Self:
        """Build a catalog from its parts, for a store of your own or for tests.

            catalog = Catalog.from_parts(EdgeStore(Path("vectors"), bundle.dim), ImageStore(Path("shop")), bundle)

        There is no `catalog.json`: the caller keeps track of which bundle belongs to which store. `close` closes the
        store. `reindex` is not available, because it opens a second store.

        Args:
            store: embeddings and payloads; any implementation of the protocol `store.Store`.
            images: the image store.
            bundle: the bundle that produced the embeddings in the store.

        Raises:
            StoreError: the store and the bundle have different dimensions.
        """
        if store.dim != bundle.dim:
            raise StoreError(f"The store has {store.dim} dimensions, the bundle {bundle.dim}: give a matching pair.")
        catalog = cls.__new__(cls)
        snapshot = Snapshot(store, images.root, CatalogFile.new(bundle, images.root), bundle)
        catalog._assemble(str(images.root), snapshot, images, None)
        return catalog

    def parts(self) -> CatalogParts:
        """The store, the images and the bundle, as `from_parts` takes them. Write to them only through the catalog.

        Raises:
            BundleError: the bundle is missing.
            StoreError: the catalog is closed.
        """
        snapshot = self._current.get()
        return CatalogParts(snapshot.store, self._images, snapshot.bundle, snapshot)

    def _assemble(self, location: str, snapshot: Snapshot, images: ImageStore, place: CatalogPlace | None) -> None:
        self.location, self.folder = location, images.root
        self._images, self._place = images, place
        self._opened = CurrentSnapshot(snapshot, images, location)

    @property
    def _current(self) -> CurrentSnapshot:
        """What every operation starts from. Raises StoreError in a forked child."""
        self._opened.owner.check()
        return self._opened

    @property
    def bundle(self) -> Bundle:
        """The bundle, opened when first needed. Raises BundleError if it is missing, StoreError if it was replaced."""
        return self._current.snapshot.bundle

    @property
    def _store(self) -> Store:
        return self._current.snapshot.store

    def close(self) -> None:
        """Write all data and release the folder. Closing twice is allowed; any other call after it is an error.

        In a forked child it does nothing: the catalog belongs to the parent.
        """
        if self._opened.owner.is_current and self._opened.close() and hasattr(self, "_remove_temporary"):
            self._remove_temporary()

    aclose = async_variant(close, OPENING)

    def __repr__(self) -> str:
        if "_opened" not in vars(self):  # in the traceback of an error while it is opened
            return f"<{type(self).__name__}, not open>"
        return f"Catalog({self.location!r}, bundle={self._opened.snapshot.file.bundle.name!r})"
