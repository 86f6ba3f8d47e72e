"""The way into a catalog: rows and pictures are read, sorted out, encoded and stored, batch beside batch."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from unidiff_sdk._internal.compact_set import CompactSet
from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.datasets.reader import InvalidRow, Row
from unidiff_sdk.errors import DataError, ImageError, OptionError, StoreError, UniDiffError
from unidiff_sdk.store import Record, Vector
from unidiff_sdk.store.filters import Compare
from unidiff_sdk.store.images import ImageStore, ItemImage
from unidiff_sdk.store.payload import SYSTEM

from .items import Item, item_of, pictures_of
from .snapshot import Serving

__all__ = ["BATCH_SIZE", "Prepared", "Writer"]

BATCH_SIZE = 32
_COMMITTED = 256  # records in one call of the store

_NO_VECTOR = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Prepared:
    """A batch of rows, read and sorted out."""

    serving: Serving
    unchanged: list[Item]
    fresh: list[Item]  # what must be stored
    repeated: list[Item]  # what an earlier row has the id of
    failed: list[InvalidRow]


class Writer:
    """Adds items to a catalog and removes them, with their pictures.

    Args:
        serving: what the catalog answers with; a reindexing puts another in its place, under the lock.
        images: the pictures.
        location: the catalog's, for what is said of it.

    Attributes:
        lock: held by whatever changes the store.
        closed: after which StoreError is raised by all.
        written: None; or, while a reindexing goes on, the keys that it must look at again, under the lock.
    """

    def __init__(self, serving: Serving, images: ImageStore, location: str) -> None:
        self.serving = serving
        self.lock = threading.RLock()
        self.closed = False
        self.written: set[str] | None = None
        self._images, self._location = images, location
        self._warned = False

    def check_open(self) -> None:
        """Raise StoreError once the catalog is closed."""
        if self.closed:
            raise StoreError(f"The catalog {self._location} is closed.")

    def serving_now(self) -> Serving:
        """To be held for as long as its store is asked: a reindexing closes that with the last that holds it."""
        self.check_open()
        return self.serving

    def add(self, items: Sequence[Item], *, copy: bool) -> None:
        """Store items, all of them or none."""
        serving = self.serving_now()
        fresh: list[Item] = []
        records: list[Record] = []
        for batch in batched(items, BATCH_SIZE):
            changed = self._changed(batch, copy)
            records += self._encode(serving, changed, copy)
            fresh += changed
        self._commit(serving, records, fresh, copy)

    def add_rows(
        self, rows: Iterable[Row], source: str, seen: CompactSet, *, strict: bool, copy: bool
    ) -> Generator[Prepared, None, None]:
        """Store rows of a catalog on disk; yields what is stored, batch by batch.

        Batches are read, decoded and thumbnailed on all cores, while one is encoded and another one is stored.

        Args:
            rows: what `read_catalog` gives.
            source: where they come from.
            seen: gets the keys of all good rows.
            strict: raise DataError at the first bad row.
            copy: whether the images are copied into the catalog.
        """
        prepare = partial(self._prepare, source=source, strict=strict, copy=copy)
        prepared = buffered_map(prepare, batched(rows, BATCH_SIZE), workers=os.cpu_count() or 1)
        with closing(prepared):
            yield from self.store((_distinct(batch, seen, strict) for batch in prepared), copy=copy)

    def store(self, prepared: Iterable[Prepared], *, copy: bool) -> Generator[Prepared, None, None]:
        """Encode and store batches, one being encoded while the one before it is stored; yields what is stored."""
        with closing(buffered_map(lambda b: (b, self._encode_prepared(b, copy)), prepared, workers=1)) as encoded:
            for batch, records in encoded:
                self._commit(batch.serving, records, batch.fresh, copy, batch.repeated)
                yield batch

    def remove(self, records: Sequence[Record]) -> None:
        """Delete items and the pictures that no other shows; under the lock."""
        keys = [record.id for record in records]
        self._note_written(keys)
        self.serving.store.delete(keys)
        self._release(pictures_of(records))

    def prune(self, source: str, seen: CompactSet) -> int:
        """Delete what came from a source and is not among the keys. Returns how many."""
        if not seen:
            raise DataError(f"{source} has not one good row: prune=True would delete everything that came from it")
        gone: list[Record] = []
        serving = self.serving_now()
        for batch in serving.store.scroll(where=Compare(f"{SYSTEM}.source", "eq", source)):
            kept = seen.has(uuid.UUID(record.id).bytes for record in batch)
            gone += [replace(record, vector=_NO_VECTOR) for record, is_in in zip(batch, kept, strict=True) if not is_in]
        with self.lock:
            for some in batched(gone, _COMMITTED):
                self.remove(some)
        return len(gone)

    # -------------------------------------------------------------------------------------------- its stages

    def _prepare(self, rows: list[Row], source: str, strict: bool, copy: bool) -> Prepared:
        """Read rows, drop those that are stored already, decode the others and keep their pixels."""
        items: list[Item] = []
        failed: list[InvalidRow] = []
        serving = self.serving

        def fail(name: str, line: int, error: UniDiffError) -> None:
            failed.append(_bad_row(line, name, str(error), strict))

        for row in rows:
            payload = dict(row.payload)
            try:
                item = item_of(ItemImage(row.image()), row.text, payload.pop("id", None), payload)
                items.append(replace(item, name=row.name, line=row.line, source=source))
            except (DataError, ImageError, OptionError) as error:
                fail(row.name, row.line, error)
        changed = self._changed(items, copy)
        lines = {item.line for item in changed}
        fresh: list[Item] = []
        for item in changed:
            try:
                self._images.add(item.picture, copy=copy)
                encodable = serving.encoder.pixels(item.picture.decoded) if item.vector is None else None
                fresh.append(replace(item, pixels=encodable))
            except ImageError as error:
                fail(item.name, item.line, error)
            item.picture.release()  # what waits to be encoded is small, whatever the size of the picture
        return Prepared(serving, [item for item in items if item.line not in lines], fresh, [], failed)

    def _changed(self, items: Sequence[Item], copy: bool) -> list[Item]:
        """The items that are not stored yet just so.

        Of those whose picture is stored under the same id, only with other columns or kept elsewhere, the vector comes
        along.
        """
        serving = self.serving_now()
        stored = {record.id: record for record in serving.store.retrieve([item.key for item in items])}
        fresh: list[Item] = []
        for item in items:
            old = stored.get(item.key)
            if old is None or old.payload[SYSTEM]["sha256"] != item.picture.sha256:
                fresh.append(item)
            elif old.payload != item.payload(
                self._images.expected_uri(item.picture, old.payload[SYSTEM]["uri"], copy=copy)
            ):
                fresh.append(replace(item, vector=old.vector))
        return fresh

    def _encode_prepared(self, batch: Prepared, copy: bool) -> list[Record]:
        pixels = [item.pixels for item in batch.fresh if item.pixels is not None]
        vectors = batch.serving.encoder.encode_pixels(np.stack(pixels)) if pixels else ()
        return self._records(batch.fresh, vectors, copy)

    def _encode(self, serving: Serving, items: Sequence[Item], copy: bool) -> list[Record]:
        pictures = [item.picture.decoded for item in items if item.vector is None]
        vectors = serving.encoder.encode_images(pictures) if pictures else ()
        return self._records(items, vectors, copy)

    def _records(self, items: Sequence[Item], vectors: Iterable[Vector], copy: bool) -> list[Record]:
        """What is stored of items; `vectors` are of those that bring none."""
        encoded = iter(vectors)
        records = []
        for item in items:
            vector = next(encoded) if item.vector is None else item.vector
            records.append(Record(item.key, vector, item.payload(self._images.add(item.picture, copy=copy))))
            item.picture.release()
        return records

    def _commit(
        self,
        serving: Serving,
        records: list[Record],
        items: Sequence[Item],
        copy: bool,
        repeated: Sequence[Item] = (),
    ) -> None:
        """Store records of items, and let go of the pictures that they take the place of, and of `repeated` ones."""
        self._warn_of_real_pictures(items)
        with self.lock:
            now = self.serving_now()
            for item in items:  # once more, as a `delete` may have removed the same picture meanwhile
                self._images.add(item.picture, copy=copy)
            if serving is not now:  # reindexed since: these vectors are of the bundle before
                records = []
                for some in batched(items, BATCH_SIZE):
                    records += self._encode(now, [replace(item, vector=None) for item in some], copy)
            self._note_written([record.id for record in records])
            left = {item.picture.sha256: self._images.add(item.picture, copy=copy) for item in repeated}
            for batch in batched(records, _COMMITTED):
                # Looked up here and not when the rows were read: another thread may have written since.
                left |= pictures_of(now.store.retrieve([record.id for record in batch]))
                now.store.upsert(batch)
            shown = {item.picture.sha256 for item in items}
            self._release({sha256: uri for sha256, uri in left.items() if sha256 not in shown})

    def _note_written(self, keys: Iterable[str]) -> None:
        """Tell a reindexing in another thread; under the lock."""
        if self.written is not None:
            self.written.update(keys)

    def _release(self, pictures: dict[str, str]) -> None:
        """Delete pictures (sha256 -> uri) that no item shows any more."""
        store = self.serving.store
        for sha256, uri in pictures.items():
            if not store.count(Compare(f"{SYSTEM}.sha256", "eq", sha256)):
                self._images.remove(sha256, uri)

    def _warn_of_real_pictures(self, items: Sequence[Item]) -> None:
        bundle = self.serving.bundle
        if self._warned or not bundle.synthetic:
            return
        from unidiff_sdk.datasets.synthetic import CATALOGS

        if any(item.columns.get("catalog") not in CATALOGS and not item.columns.get("generated") for item in items):
            self._warned = True
            warn(
                f'The bundle "{bundle.name}" was trained on drawn, synthetic products only: on other pictures '
                "its results mean little. Fine-tune on your own data (unidiff-train, unidiff-export), use that bundle."
            )


def _distinct(batch: Prepared, seen: CompactSet, strict: bool) -> Prepared:
    """A batch without the rows whose id came by before: two pictures for one id would take turns at every run."""
    items = sorted(batch.unchanged + batch.fresh, key=lambda item: item.line)
    known = seen.add(uuid.UUID(item.key).bytes for item in items)
    repeated = [item for item, is_known in zip(items, known, strict=True) if is_known]
    reason = "an earlier row has the same id, or without an id the same picture and caption"
    lines = {item.line for item in repeated}
    return Prepared(
        batch.serving,
        [item for item in batch.unchanged if item.line not in lines],
        [item for item in batch.fresh if item.line not in lines],
        repeated,
        batch.failed + [_bad_row(item.line, item.name, reason, strict) for item in repeated],
    )


def _bad_row(line: int, name: str, reason: str, strict: bool) -> InvalidRow:
    bad = InvalidRow(line, name, reason)
    if strict:
        raise DataError(str(bad))
    return bad
