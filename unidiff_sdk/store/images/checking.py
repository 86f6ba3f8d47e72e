"""The check of a catalog: whether the stored items and the image files agree, and what killed processes left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unidiff_sdk._internal.files import unfinished_files
from unidiff_sdk.errors import StoreError
from unidiff_sdk.store.filters import Compare
from unidiff_sdk.store.location import STORE_NAME
from unidiff_sdk.store.payload import SYSTEM, is_item
from unidiff_sdk.store.protocol import Record, Store

from .image_store import ImageStore, StoredFile

__all__ = ["CheckReport", "check"]

_SHARED_AGE = 3600  # seconds; a process stores the item of an image that it wrote much earlier
_SHOWN = 5  # ids in a message


@dataclass(frozen=True)
class CheckReport:
    """The result of `Catalog.check`: what was found, before anything was repaired.

    Attributes:
        items: the number of items.
        missing_images: ids of items whose image file is missing or empty.
        damaged: ids of records that are not items of this SDK.
        missing_vectors: ids of items without a usable vector, which no search finds.
        orphaned_images: images, thumbnails and latents that no item uses, as paths relative to the image store.
        leftovers: files and folders of killed processes, as paths relative to the catalog folder.
        unindexed: the number of items that searches scan, because the search index lacks them. 0 for a server.
        deleted_share: the share of the search index that is deleted or replaced, 0 to 1. 0 for a server.
        repaired: whether the index was built again, and orphaned images and leftovers were deleted.
        remaining: what was not fixed, each as a sentence that says what to do.
    """

    items: int
    missing_images: tuple[str | int, ...]
    missing_vectors: tuple[str | int, ...]
    damaged: tuple[str, ...]
    orphaned_images: tuple[str, ...]
    leftovers: tuple[str, ...]
    unindexed: int
    deleted_share: float
    repaired: bool
    remaining: tuple[str, ...]


def check(
    store: Store, images: ImageStore, lock: AbstractContextManager[object], vectors: str | None, *, repair: bool
) -> CheckReport:
    """Check a catalog, and repair it if asked; see `Catalog.check`.

    Args:
        store: the items.
        images: their images.
        lock: held by whoever changes the store.
        vectors: the name of the current store of vectors in the folder of the images; None if it is elsewhere, so that
            other processes may write images at the same time.
        repair: fix what can be fixed.
    """
    # 1. List the files first: an image is stored before its item.
    # Only a repair may write, and only it needs the clock of the storage.
    now = images.now() if repair and vectors is None else time.time()
    newest = now - _SHARED_AGE if vectors is None else float("inf")
    files = list(images.stored_files())
    present = {file.name for file in files if file.size}
    leftovers = list(_leftovers(images, vectors))

    # 2. Read the items.
    items, used = 0, set[str]()
    missing_images: list[str | int] = []
    missing_vectors: list[str | int] = []
    damaged: list[str | int] = []
    for record in (record for batch in store.scroll() for record in batch):
        if not is_item(record.id, record.payload):
            damaged.append(record.id)
            continue
        items += 1
        system, id = record.payload[SYSTEM], record.payload["id"]
        used.add(system["sha256"])
        if system["uri"] not in present and not images.has(system["uri"]):
            missing_images.append(id)
        if not _is_usable(record, store.dim):
            missing_vectors.append(id)
    unread = len(getattr(store, "foreign", ()))  # points that a server store skips
    orphans = [file for file in files if file.sha256 not in used and file.modified < newest]
    unindexed, deleted_share = store.unindexed_count(), store.deleted_share()

    # 3. Repair.
    if repair:
        if not (damaged or unread):  # whose images are not known
            for file in orphans:
                _delete_orphan(store, images, lock, file)
        for path in leftovers:
            _delete_leftover(path)
        if unindexed or deleted_share:
            store.optimize()
    return CheckReport(
        items=items,
        missing_images=tuple(missing_images),
        missing_vectors=tuple(missing_vectors),
        damaged=tuple(map(str, damaged)),
        orphaned_images=tuple(sorted(file.name for file in orphans)),
        leftovers=tuple(sorted(path.relative_to(images.root).as_posix() for path in leftovers)),
        unindexed=unindexed,
        deleted_share=deleted_share,
        repaired=repair,
        remaining=(
            *_lost(missing_images, missing_vectors, damaged, unread),
            *_left(
                sum(not repair or images.exists(file.name) for file in orphans),
                sum(map(os.path.lexists, leftovers)),
                store.deleted_share(),
                repair,
            ),
        ),
    )


def _lost(images: list[str | int], vectors: list[str | int], damaged: list[str | int], unread: int) -> Iterator[str]:
    """Sentences about what no repair can restore."""
    if images:
        yield f"The images of the items {_some(images)} are missing. Add these items again, or delete them."
    if vectors:
        yield f"No search finds the items {_some(vectors)}: they have no usable vector. Add them again, or delete them."
    if unread:
        yield (
            f"{unread:,} records have no usable vector, or were not stored by this SDK. Images that no item uses are "
            "kept, because they may belong to them. Delete these records, or restore a backup."
        )
    if damaged:
        yield (
            f"The records {_some(damaged)} were not stored by this SDK, or are damaged. Images that no item uses are "
            "kept, because they may belong to them. Restore the catalog from a backup."
        )


def _left(orphans: int, leftovers: int, deleted_share: float, repair: bool) -> Iterator[str]:
    """Sentences about what was not repaired."""
    advice = "They are in use or cannot be deleted. Check again later." if repair else "repair=True deletes them."
    if orphans:
        yield f"{orphans:,} image files belong to no item. {advice}"
    if leftovers:
        yield f"{leftovers:,} files or folders were left by processes that were killed. {advice}"
    if deleted_share and not repair:
        yield f"{deleted_share:.0%} of the search index is deleted, so searches are slower. repair=True removes it."


def _some(ids: list[str | int]) -> str:
    more = f" and {len(ids) - _SHOWN:,} others" if len(ids) > _SHOWN else ""
    return f"{', '.join(map(repr, ids[:_SHOWN]))}{more}"


def _is_usable(record: Record, dim: int) -> bool:
    return record.vector.shape == (dim,) and bool(np.isfinite(record.vector).all() and record.vector.any())


def _delete_orphan(store: Store, images: ImageStore, lock: AbstractContextManager[object], file: StoredFile) -> None:
    """Delete a file unless an item uses it now: an item is stored under the lock, and stores its image again then."""
    with lock:
        if not store.count(Compare(f"{SYSTEM}.sha256", "eq", file.sha256)):
            with suppress(StoreError):  # `_left` reports what is still there
                images.delete(file.name)


# ------------------------------------------------------------------------------------------------ leftovers


def _leftovers(images: ImageStore, vectors: str | None) -> Iterator[Path]:
    """The unfinished files and the stores of vectors that no process uses, other than the current one."""
    for folder in (images.root, *images.folders()):
        yield from unfinished_files(folder)
    for folder in images.root.iterdir() if vectors is not None else ():
        is_store = STORE_NAME.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
        if is_store and folder.name != vectors:
            with _unused(folder) as is_unused:
                if is_unused:
                    yield folder


@contextmanager
def _unused(store: Path) -> Iterator[bool]:
    """Lock a store of vectors as its user does. Yields whether nobody uses it."""
    lock = store / "lock"
    if lock.is_symlink() or not lock.is_file():
        yield True
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _delete_leftover(path: Path) -> None:
    if path.is_dir():
        with _unused(path) as is_unused:
            if is_unused:
                shutil.rmtree(path, ignore_errors=True)
        return
    for unfinished in unfinished_files(path.parent):
        if unfinished == path:
            with suppress(OSError):
                path.unlink()
