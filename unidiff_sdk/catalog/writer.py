"""Adding and deleting items: rows are read, compared with the store, encoded and stored in overlapping batches."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk._internal.memory import DiskFullError
from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk._internal.warnings import safe_logger, warn
from unidiff_sdk.datasets.compact_set import CompactSet
from unidiff_sdk.datasets.reader import TABLES, InvalidRow, Row, check_invalid_count, count_rows, read_catalog
from unidiff_sdk.errors import DataError, ImageError, OptionError, StoreError, UniDiffError
from unidiff_sdk.store import Record, Store, Vector
from unidiff_sdk.store.filters import Compare
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ImageStore, ItemImage
from unidiff_sdk.store.images.object_storage import is_object_storage
from unidiff_sdk.store.payload import SYSTEM, is_item, system_of
from unidiff_sdk.store.protocol import check_records

from .items import Item, checked_columns, images_of, item_of, refuse_reserved
from .results import AddReport
from .snapshot import CurrentSnapshot, OpenCatalog, Snapshot

if TYPE_CHECKING:
    from PIL import Image

    from unidiff_sdk.generation.options import GenerationOptions

__all__ = ["BATCH_SIZE", "COMMIT_SIZE", "BulkAccess", "PreparedBatch", "Writer"]

BATCH_SIZE = 32  # images encoded at once
COMMIT_SIZE = 256  # records in one call of the store

_NO_VECTOR = np.zeros(0, np.float32)
_log = safe_logger(__name__)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of rows, read and compared with the store.

    Attributes:
        snapshot: the snapshot that the rows were compared with.
        unchanged: items stored already.
        changed: items to store.
        repeated: items with the id of an earlier row.
        invalid: rows that cannot be used.
    """

    snapshot: Snapshot
    unchanged: list[Item]
    changed: list[Item]
    repeated: list[Item]
    invalid: list[InvalidRow]


class Writer:
    """Adds items with their images to a catalog and deletes them.

    Args:
        current: the snapshot to write to.
        images: the image store.
    """

    def __init__(self, current: CurrentSnapshot, images: ImageStore) -> None:
        self._current, self._images = current, images

    def add(self, items: Sequence[Item], *, copy: bool) -> None:
        """Encode all items, then store them in batches; see `Catalog.add`."""
        # 1. Encode everything: an item that is invalid stores nothing.
        snapshot = self._current.get()
        pending: list[tuple[Item, Record]] = []
        for batch in batched(items, BATCH_SIZE):
            some = self.changed(batch, copy=copy)
            pending += zip(some, self._encode(snapshot, some, copy), strict=True)
        check_records([record for _, record in pending], snapshot.store.dim)

        # 2. Store it.
        waiting = {item.id for item, _ in pending}
        try:
            for part in batched(pending, COMMIT_SIZE):
                self._commit(snapshot, [record for _, record in part], [item for item, _ in part], copy)
                waiting -= {item.id for item, _ in part}
        except UniDiffError as error:
            stored = tuple(item.id for item in items if item.id not in waiting)
            if not stored:
                raise
            raise StoreError(
                f"{error} {len(stored):,} of {len(items):,} items are stored; StoreError.stored_ids has their ids. Add "
                "the others again.",
                stored_ids=stored,
            ) from error
        self._current.get().optimize_if_deleted()

    def add_table(
        self,
        path: str | Path,
        images: str | Path | None,
        *,
        columns: Mapping[str, str | None] | None,
        kinds: Mapping[str, str] | None,
        prune: bool,
        strict: bool,
        progress: bool,
        copy: bool,
    ) -> AddReport:
        """Store the rows of a table; see `Catalog.add_table`."""
        if not checked_path(path, DataError).is_file() or Path(path).suffix.lower() not in TABLES:
            raise DataError(f"{path} is not a table ({', '.join(TABLES)}). For a folder, use add_folder.")
        return self.add_source(
            path, images, columns=columns, kinds=kinds, prune=prune, strict=strict, progress=progress, copy=copy
        )

    def add_source(
        self,
        path: str | Path,
        images: str | Path | None = None,
        *,
        columns: Mapping[str, str | None] | None,
        kinds: Mapping[str, str] | None,
        prune: bool,
        strict: bool,
        progress: bool,
        copy: bool,
    ) -> AddReport:
        """Store the rows of a folder, shard or table; see `Catalog.add_folder`."""
        started = time.perf_counter()
        source = self._images.reference(checked_path(path, DataError))
        invalid: list[InvalidRow] = []
        added = skipped = 0
        keys = CompactSet()
        rows = read_catalog(
            path,
            images=images,
            columns=columns,
            kinds=kinds,
            captions=False,
            strict=strict,
            on_error=invalid.append,
        )
        total = count_rows(path, captions=False) if progress else 0

        # 1. Store what is new or has changed.
        with (
            progress_bar("Indexing", progress) as advance,
            closing(self._add_rows(rows, source, keys, strict=strict, copy=copy)) as stored,
        ):
            for batch in stored:
                added, skipped = added + len(batch.changed), skipped + len(batch.unchanged)
                invalid.extend(batch.invalid)
                check_invalid_count(source, len(invalid))
                advance(added + skipped + len(invalid), total)

        # 2. Delete what is no longer in the source.
        if prune and (hiding := next((row for row in invalid if row.hides_later_rows), None)):
            raise DataError(f"{source}: {hiding.reason}. Nothing was pruned; all readable rows are stored.")
        removed = self._prune(source, keys) if prune else 0

        # 3. Build the search index if searches would be slow without it.
        self._current.get().optimize_if_large()
        invalid.sort(key=lambda row: row.line)
        report = AddReport(added, skipped, tuple(invalid), time.perf_counter() - started, removed)
        _log.info("%s: %s from %s", self._current.location, report, source)
        return report

    def store(self, prepared: Iterable[PreparedBatch], *, copy: bool) -> Generator[PreparedBatch, None, None]:
        """Encode and store batches; each is encoded while the previous one is stored. Yields the stored batches."""
        with closing(buffered_map(lambda b: (b, self._encode_prepared(b, copy)), prepared, workers=1)) as encoded:
            for batch, records in encoded:
                self._commit(batch.snapshot, records, batch.changed, copy, batch.repeated)
                yield batch

    def update(self, id: str | int, columns: Mapping[str, Any]) -> bool:
        """Change columns of an item; see `Catalog.update`."""
        refuse_reserved(columns)
        changed = checked_columns(columns)
        with self._current.lock:
            store = self._current.get().store
            record = next(iter(store.retrieve([key_of(id)])), None)
            if record is None or not is_item(record.id, record.payload):
                return False
            removed = {name for name, value in changed.items() if value is None}
            payload = {name: value for name, value in (record.payload | changed).items() if name not in removed}
            if payload != record.payload:
                self._current.record_changes([record.id])
                store.upsert([replace(record, payload=payload)])
        return True

    def delete(self, ids: Sequence[str | int]) -> int:
        """Delete items and the images that no other item uses. Returns the number of items that existed."""
        with self._current.lock:
            snapshot = self._current.get()
            records = snapshot.store.retrieve([key_of(id) for id in ids])
            self._delete_records(snapshot.store, records)
        if records:
            snapshot.optimize_if_deleted()
        return len(records)

    # -------------------------------------------------------------------------------------------- stages

    def _add_rows(
        self, rows: Iterable[Row], source: str, keys: CompactSet, *, strict: bool, copy: bool
    ) -> Generator[PreparedBatch, None, None]:
        """Store rows; yields the stored batches.

        Batches are read, decoded and reduced to thumbnails on all cores, while one is encoded and another is stored.

        Args:
            rows: the rows from `read_catalog`.
            source: the URI of the folder, shard or table.
            keys: collects the keys of all valid rows.
            strict: raise DataError at the first invalid row.
            copy: whether to copy the images into the catalog.
        """
        prepare = partial(self._prepare, source=source, strict=strict, copy=copy)
        prepared = buffered_map(prepare, batched(rows, BATCH_SIZE, lambda row: row.nbytes), workers=os.cpu_count() or 1)
        with closing(prepared):
            yield from self.store((_without_repeated_ids(batch, keys, strict) for batch in prepared), copy=copy)

    def _prepare(self, rows: list[Row], source: str, strict: bool, copy: bool) -> PreparedBatch:
        """Read rows, drop those stored already, and decode and preprocess the images of the others."""
        items: list[Item] = []
        invalid: list[InvalidRow] = []
        snapshot = self._current.get()

        def reject(name: str, line: int, error: UniDiffError) -> None:
            invalid.append(_invalid_row(line, name, str(error), strict))

        for row in rows:
            payload = dict(row.payload)
            try:
                item = item_of(ItemImage(row.image()), row.text or None, payload.pop("id", None), payload)
                items.append(replace(item, name=row.name, line=row.line, source=source))
            except (DataError, ImageError, OptionError) as error:
                reject(row.name, row.line, error)
        pending = self.changed(items, copy=copy)
        lines = {item.line for item in pending}
        changed: list[Item] = []
        for item in pending:
            try:
                self._images.add(item.image, copy=copy)
                pixels = snapshot.encoder.pixels(item.image.decoded) if item.vector is None else None
                changed.append(replace(item, pixels=pixels))
            except ImageError as error:
                reject(item.name, item.line, error)
            item.image.release()  # only the preprocessed pixels wait to be encoded, whatever the size of the image
        return PreparedBatch(snapshot, [item for item in items if item.line not in lines], changed, [], invalid)

    def changed(self, items: Sequence[Item], *, copy: bool = True) -> list[Item]:
        """The items that differ from what is stored.

        An item that is stored with the same image, but with other columns or another location of the image, keeps its
        stored vector.
        """
        snapshot = self._current.get()
        stored = {record.id: record for record in snapshot.store.retrieve([item.key for item in items])}
        changed: list[Item] = []
        for item in items:
            old = stored.get(item.key)
            if old is None or not is_item(old.id, old.payload) or system_of(old.payload)["sha256"] != item.image.sha256:
                changed.append(item)
                continue
            uri = self._images.expected_uri(item.image, system_of(old.payload)["uri"], copy=copy)
            if old.payload != item.payload(uri):
                changed.append(replace(item, vector=old.vector))
        return changed

    def _encode_prepared(self, batch: PreparedBatch, copy: bool) -> list[Record]:
        pixels = [item.pixels for item in batch.changed if item.pixels is not None]
        vectors = batch.snapshot.encoder.encode_pixels(np.stack(pixels)) if pixels else ()
        return self._records(batch.changed, vectors, copy)

    def _encode(self, snapshot: Snapshot, items: Sequence[Item], copy: bool) -> list[Record]:
        images = [item.image.decoded for item in items if item.vector is None]
        vectors = snapshot.encoder.encode_images(images) if images else ()
        return self._records(items, vectors, copy)

    def _records(self, items: Sequence[Item], vectors: Iterable[Vector], copy: bool) -> list[Record]:
        """The records of items; `vectors` are those of the items without a vector."""
        encoded = iter(vectors)
        records = []
        for item in items:
            vector = next(encoded) if item.vector is None else item.vector
            records.append(Record(item.key, vector, item.payload(self._images.add(item.image, copy=copy))))
            item.image.release()
        return records

    def _commit(
        self,
        snapshot: Snapshot,
        records: list[Record],
        items: Sequence[Item],
        copy: bool,
        repeated: Sequence[Item] = (),
    ) -> None:
        """Store the records of items; delete the images that they replace, and those of `repeated` items."""
        self._warn_about_real_images(items)
        with self._current.lock:
            now = self._current.get()
            if snapshot is not now:  # reindexed in the meantime: these vectors are from the previous bundle
                records = []
                for some in batched(items, BATCH_SIZE):
                    records += self._encode(now, [replace(item, vector=None) for item in some], copy)
            self._current.record_changes(record.id for record in records)
            unused = {item.image.sha256: self._images.add(item.image, copy=copy) for item in repeated}
            for batch in batched(records, COMMIT_SIZE):
                # Read here and not when the rows were read, because another thread may have written since.
                unused |= images_of(now.store.retrieve([record.id for record in batch]))
                now.store.upsert(batch)
            # Again, because a concurrent delete may have removed the same image. From now on, the items keep it.
            for item in items:
                self._images.add(item.image, copy=copy)
            used = {item.image.sha256 for item in items}
            self._release_images(now.store, {sha256: uri for sha256, uri in unused.items() if sha256 not in used})
        if self._current.prepares_rerank:
            self._prepare_rerank(records)

    def _prepare_rerank(self, records: Sequence[Record]) -> None:
        try:
            for batch in batched(records, BATCH_SIZE):
                self._current.prepare_rerank(batch)
        except UniDiffError as error:
            warn(f"The items are stored, but not prepared for rerank=: {error}. Call prepare_rerank() later.")

    def _prune(self, source: str, keys: CompactSet) -> int:
        """Delete the items of a source whose keys are not in `keys`. Returns their number."""
        if not keys:
            raise DataError(f"{source} has no valid row: prune=True would delete all items that came from it")
        removed: list[Record] = []
        snapshot = self._current.get()
        for batch in snapshot.store.scroll(where=Compare(f"{SYSTEM}.source", "eq", source)):
            kept = keys.has(uuid.UUID(record.id).bytes for record in batch)
            removed += [replace(r, vector=_NO_VECTOR) for r, is_kept in zip(batch, kept, strict=True) if not is_kept]
        with self._current.lock:
            for some in batched(removed, COMMIT_SIZE):
                self._delete_records(self._current.get().store, some)
        return len(removed)

    def _delete_records(self, store: Store, records: Sequence[Record]) -> None:
        """Delete records and the images that no other item uses; under the lock."""
        keys = [record.id for record in records]
        self._current.record_changes(keys)
        store.delete(keys)
        self._release_images(store, images_of(records))

    def _release_images(self, store: Store, images: dict[str, str]) -> None:
        """Delete the images (sha256 -> uri) that no item uses, and their latents."""
        try:
            for sha256, uri in images.items():
                if not store.count(Compare(f"{SYSTEM}.sha256", "eq", sha256)):
                    self._images.remove(sha256, uri)
                    self._current.snapshot.latents.remove(sha256)
        except DiskFullError as error:  # the first search for a hash creates an index
            warn(f"The items are changed, but the images that they no longer use were not deleted: {error}")

    def _warn_about_real_images(self, items: Sequence[Item]) -> None:
        bundle = self._current.get().bundle
        if self._current.warned or not bundle.synthetic:
            return
        from unidiff_sdk.datasets.synthetic import CATALOGS

        if any(item.columns.get("catalog") not in CATALOGS and not item.columns.get("generated") for item in items):
            self._current.warned = True
            warn(
                f'The bundle "{bundle.name}" was trained on rendered, synthetic products only. On other images its '
                "results are not meaningful: fine-tune it on your own data (unidiff-train, unidiff-export)."
            )


class BulkAccess:
    """An open catalog as bulk jobs (`scale`) use it, beyond the methods of `Catalog`.

    Args:
        catalog: the catalog.
    """

    def __init__(self, catalog: OpenCatalog) -> None:
        self._current, self._images = catalog._current, catalog._images
        self._writer = Writer(self._current, self._images)

    @property
    def bundle(self) -> dict[str, Any]:
        """Name, path, fingerprint and dimensions of the bundle, as archives have them."""
        return self._current.get().describe_bundle()

    def source_uri(self, source: str) -> str:
        """The absolute path or URL of a dataset as `Catalog.add_folder` records it."""
        return source if is_object_storage(source) else self._images.reference(Path(source))

    def check_options(self, options: GenerationOptions) -> None:
        """Raise OptionError or BundleError for options that the bundle cannot generate with."""
        self._current.get().generator.resolve(options)

    def encode(self, image: Image.Image) -> Vector:
        """The embedding of an image."""
        vector: Vector = self._current.get().encoder.encode_images([image])[0]
        return vector

    def store(self, items: Sequence[Item]) -> int:
        """Store items that have their embeddings; of equal ids, the last one. Returns how many were new or changed."""
        changed = self._writer.changed(list({item.key: item for item in items}.values()))
        for _ in self._writer.store([PreparedBatch(self._current.get(), [], changed, [], [])], copy=True):
            pass
        return len(changed)

    def optimize_if_large(self) -> None:
        """Build the search index if searches would be slow without it."""
        self._current.get().optimize_if_large()


def _without_repeated_ids(batch: PreparedBatch, keys: CompactSet, strict: bool) -> PreparedBatch:
    """Reject the rows with the id of an earlier row. Two images of one id would otherwise alternate with every run."""
    items = sorted(batch.unchanged + batch.changed, key=lambda item: item.line)
    known = keys.add(uuid.UUID(item.key).bytes for item in items)
    repeated = [item for item, is_known in zip(items, known, strict=True) if is_known]
    reason = "an earlier row has the same id, or the same image and caption and no id"
    lines = {item.line for item in repeated}
    return PreparedBatch(
        batch.snapshot,
        [item for item in batch.unchanged if item.line not in lines],
        [item for item in batch.changed if item.line not in lines],
        repeated,
        batch.invalid + [_invalid_row(item.line, item.name, reason, strict) for item in repeated],
    )


def _invalid_row(line: int, name: str, reason: str, strict: bool) -> InvalidRow:
    row = InvalidRow(line, name, reason)
    if strict:
        raise DataError(str(row))
    return row
