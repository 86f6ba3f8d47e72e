"""Reindexing: re-encode a catalog with another bundle while it is searched and written to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import finalize_in_owner
from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk._internal.warnings import safe_logger
from unidiff_sdk.errors import BusyError, ImageError, OptionError, StoreError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Record, Store
from unidiff_sdk.store.images import ImageStore
from unidiff_sdk.store.location import STORE_NAME, VECTORS, Location
from unidiff_sdk.store.payload import system_of

from .catalog_file import BundleRef, CatalogPlace, file_lock
from .snapshot import CurrentSnapshot, Snapshot, publish
from .writer import BATCH_SIZE

__all__ = ["Reencoder", "reindex"]

_log = safe_logger(__name__)

CATCH_UP_ROUNDS = 8  # rounds over concurrent writes before writers have to wait


def reindex(
    current: CurrentSnapshot,
    images: ImageStore,
    place: CatalogPlace | None,
    bundle: Bundle | str | Path | None,
    *,
    progress: bool,
) -> int:
    """Re-encode a catalog and make the new bundle its own; see `Catalog.reindex`.

    Args:
        current: the snapshot to replace.
        images: the image store.
        place: where the catalog is; None for a catalog built from parts.
        bundle: the new bundle.
        progress: show a progress bar.

    Returns:
        The number of items; 0 if the bundle is the current one.
    """
    if bundle is None:  # which would open the built-in bundle
        raise OptionError('reindex() needs a bundle: give a folder, a Bundle, or "tiny"')
    if place is None:
        raise StoreError(
            "A catalog built by from_parts cannot open a second store. Add the items to a new catalog instead."
        )
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, trusted_keys=current.get().trusted_keys)
    with current.while_not_reindexing() as snapshot:
        if opened.fingerprint == snapshot.file.bundle.fingerprint:
            return 0
        try:
            return _reindex(current, images, place, opened, progress)
        finally:
            current.stop_tracking()


def _reindex(current: CurrentSnapshot, images: ImageStore, place: CatalogPlace, bundle: Bundle, progress: bool) -> int:
    before = current.get()
    if _store_name(bundle) in current.replaced_stores:
        raise BusyError(
            f"{current.location} had the bundle {bundle.name} before, and searches or generations that began then "
            "still read its store. Try again when they have ended."
        )
    after = _new_snapshot(before, place.stores, bundle)
    try:
        # 1. Re-encode what the new store lacks, and record concurrent writes.
        reencoder = Reencoder(before.store, after.store, images, after.encoder)
        current.track_changes()
        total, done = before.store.count(), 0
        with progress_bar("Re-encoding", progress) as advance:
            for count in reencoder.copy_all():
                done += count
                advance(done, total)
        after.optimize_if_large()

        # 2. Catch up with concurrent writes: with most of them while writing goes on, with the rest during the swap.
        for _ in range(CATCH_UP_ROUNDS):
            written = current.take_changes()
            reencoder.copy(written)
            if len(written) <= BATCH_SIZE:
                break
        with current.lock:
            current.get()  # raises if the catalog was closed
            reencoder.copy(current.take_changes())

            # 3. Swap. The one write of catalog.json decides which store and bundle the catalog has.
            with file_lock(after.folder):
                place.publish(after.file)
                after.file.write(after.folder)
            current.replace(after)
    except BaseException:
        after.store.close()
        raise
    # Searches that are still running hold the old snapshot; its store is deleted with the last of them.
    current.replaced_stores.add(before.file.vectors)
    finalize_in_owner(before, _delete_store, before.store, before.folder, before.file.vectors, current.replaced_stores)
    after.latents.remove_others()
    _log.info("%s: reindexed %d items with the bundle %s", current.location, done, bundle.name)
    publish(after.store)
    return after.store.count()


def _store_name(bundle: Bundle) -> str:
    return f"{VECTORS}-{bundle.fingerprint[:12]}"


def _new_snapshot(before: Snapshot, stores: Location, bundle: Bundle) -> Snapshot:
    """The snapshot to re-encode into. Its store holds the progress of an interrupted reindexing with this bundle."""
    folder, vectors = before.folder, _store_name(bundle)
    # Left by an interrupted reindexing with another bundle, or by one that was killed after the swap.
    for left in folder.glob(f"{VECTORS}*"):
        is_store = STORE_NAME.fullmatch(left.name) and left.is_dir() and not left.is_symlink()
        if is_store and left.name not in (before.file.vectors, vectors):
            shutil.rmtree(left)
    stores = replace(stores, quantization=getattr(before.store, "quantization", None))
    store = stores.open(vectors, bundle.dim, bundle.fingerprint, create=True)
    file = replace(before.file, bundle=BundleRef.of(bundle, folder), vectors=vectors)
    return Snapshot(store, folder, file, bundle, before.trusted_keys)


def _delete_store(store: Store, folder: Path, name: str, replaced_stores: set[str]) -> None:
    store.close()
    shutil.rmtree(folder / name, ignore_errors=True)
    replaced_stores.discard(name)


class Reencoder:
    """Copies records from one store to another, with the embeddings of another encoder.

    Args:
        old, new: the stores. Records that `new` holds with the same payload are not encoded again, so an interrupted
            run continues where it stopped.
        images: the image store.
        encoder: produces the embeddings of `new`.
    """

    def __init__(self, old: Store, new: Store, images: ImageStore, encoder: Encoder) -> None:
        self.old, self.new, self.images, self.encoder = old, new, images, encoder

    def copy_all(self) -> Iterator[int]:
        """Copy all records of the old store; yields the number of records of each finished batch."""
        yield from self._copy(self.old.scroll(BATCH_SIZE))
        for batch in self.new.scroll():  # delete what was deleted since an interrupted run
            kept = {record.id for record in self.old.retrieve([record.id for record in batch])}
            self.new.delete([record.id for record in batch if record.id not in kept])

    def copy(self, keys: Collection[str]) -> None:
        """Copy the records with these keys, and delete those that the old store no longer holds."""
        for batch in batched(sorted(keys), BATCH_SIZE):
            records = self.old.retrieve(batch)
            self.new.delete(sorted(set(batch) - {record.id for record in records}))
            for _ in self._copy([records]):
                pass

    def _copy(self, batches: Iterable[list[Record]]) -> Iterator[int]:
        with closing(buffered_map(self._prepare, batches, workers=os.cpu_count() or 1)) as prepared:
            for count, records, pixels in prepared:
                if records:
                    vectors = self.encoder.encode_pixels(np.stack(pixels))
                    self.new.upsert(
                        [replace(record, vector=vector) for record, vector in zip(records, vectors, strict=True)]
                    )
                yield count

    def _prepare(self, batch: list[Record]) -> tuple[int, list[Record], list[NDArray[np.float32]]]:
        """The size of a batch, the records of it that must be encoded, and their preprocessed images."""
        stored = {record.id: record.payload for record in self.new.retrieve([record.id for record in batch])}
        records, pixels = [], []
        for record in batch:
            if stored.get(record.id) == record.payload:
                continue
            try:
                pixels.append(self.encoder.pixels(self.images.load(system_of(record.payload)["uri"])))
                records.append(record)
            except ImageError:
                now = self.old.retrieve([record.id])
                if now and now[0].payload == record.payload:
                    raise
                # The item was deleted or replaced in the meantime, together with its image; `copy` handles it.
        return len(batch), records, pixels
