"""The stages of bulk indexing, each of which runs in processes of its own: read, encode, store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.catalog.catalog_file import CatalogFile
from unidiff_sdk.catalog.items import Item, item_of
from unidiff_sdk.catalog.writer import BulkAccess
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import BundleError, DataError, ImageError, OptionError, StoreError, UniDiffError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Vector
from unidiff_sdk.store.images import ImageStore, ItemImage

from .batching import BatchSize
from .embeddings import Embeddings
from .parts import Part, pack, read_chunks, unpack
from .remote import FETCHED_ROWS, RawRow, fetched

__all__ = ["Encode", "ImageFolder", "Store", "read", "replaced"]

STORED_IMAGES = 8
"""Images that a process stores at the same time, which hides the latency of object storage."""

Batch = dict[str, Any]
"""A chunk as Ray passes it on: columns of one value each."""


def read(row: dict[str, Any], columns: Any = None, kinds: Any = None) -> Iterator[dict[str, Any]]:
    """Read the chunks of a part that are not done yet. An error takes the place of a chunk, see `replaced`."""
    part: Part
    part, origin, done = unpack(row["part"])
    number = 0
    try:
        for number, (rows, invalid, last) in enumerate(read_chunks(part, columns, kinds)):
            if number not in done:
                content = pack((part.name, origin, rows, invalid))
                yield {"number": row["number"], "chunk": number, "last": last, "rows": content}
    except UniDiffError as error:
        yield {"number": row["number"], "chunk": number, "last": False, "rows": pack(error.with_traceback(None))}


@dataclass(frozen=True)
class ImageFolder:
    """The folder of a catalog that has its images there.

    Attributes:
        path: absolute.
        created: when the catalog was created, which tells it from others.
    """

    path: Path
    created: str

    def open(self) -> ImageStore | None:
        """The images; None on a machine that does not see the catalog."""
        try:
            found = CatalogFile.read(self.path)
        except StoreError:
            return None
        return ImageStore(self.path) if found is not None and found.created == self.created else None


class Encode:
    """Encodes chunks with one open bundle. Images are stored here too, because they are decoded here.

    Args:
        bundle: its path.
        fingerprint: the one that it must have.
        device: as for `Bundle.open`.
        batch_size, processes: as for `BatchSize`.
        embeddings: where known embeddings are, and those of encoded chunks are written.
        images: where the images of the catalog are, unless they are in object storage.
    """

    def __init__(
        self,
        bundle: str,
        fingerprint: str,
        device: str,
        batch_size: int | None,
        processes: int,
        embeddings: Embeddings | None = None,
        images: ImageFolder | None = None,
    ) -> None:
        self._bundle, self._fingerprint, self._device, self._embeddings = bundle, fingerprint, device, embeddings
        self._batch, self._folder = BatchSize(batch_size, processes), images

    @cached_property
    def _encoder(self) -> Encoder:
        threads = 1 if self._device == "cpu" else None
        bundle = Bundle.open(self._bundle, fingerprint=self._fingerprint, device=self._device, threads=threads)
        return Encoder(bundle)

    @cached_property
    def _images(self) -> ImageStore | None:
        return None if self._folder is None else self._folder.open()

    def __call__(self, batch: Batch) -> Batch:
        return replaced(batch, partial(self._chunk, int(batch["chunk"][0]), bool(batch["last"][0])))

    def _chunk(self, number: int, last: bool, chunk: Any) -> tuple[list[Item], list[InvalidRow]]:
        part, source, rows, invalid = chunk
        if self._embeddings is None:
            return self._encode(rows, source, invalid, {}), invalid
        existing = self._embeddings.read(part, number)
        items = self._encode(rows, source, invalid, self._embeddings.vectors(existing))
        is_end = last and not any(row.hides_later_rows for row in invalid)
        self._embeddings.write(part, number, items, last=is_end, existing=existing)
        return items, invalid

    def _encode(
        self, rows: list[RawRow], source: str, invalid: list[InvalidRow], known: Mapping[str, Vector]
    ) -> list[Item]:
        contents = (row for some in batched(rows, FETCHED_ROWS) for row in fetched(some, invalid))
        keys: set[str] = set()
        items = (item for row in contents if (item := self._item(row, source, invalid, known, keys)) is not None)
        encoded: list[Item] = []
        failures: list[tuple[Item, BundleError]] = []
        while some := list(islice(items, self._batch.size)):
            encoded += self._with_vectors(some, failures)
        if failures and not encoded:
            raise failures[0][1]  # of the bundle, not of these images
        invalid += [InvalidRow(item.line, item.name, str(error)) for item, error in failures]
        return encoded

    def _with_vectors(self, items: list[Item], failures: list[tuple[Item, BundleError]]) -> list[Item]:
        """Items with their embeddings. One that the encoder has no embedding for is appended to `failures`."""
        pixels = [item.pixels for item in items if item.pixels is not None]
        if not pixels:
            return items
        try:
            with self._batch.measured(len(pixels), pixels[0].nbytes):
                vectors = iter(self._encoder.encode_pixels(np.stack(pixels)))
        except BundleError as error:
            if len(items) > 1:
                return [each for item in items for each in self._with_vectors([item], failures)]
            failures.append((items[0], error))
            return []
        return [item if item.pixels is None else replace(item, pixels=None, vector=next(vectors)) for item in items]

    def _item(
        self, row: RawRow, source: str, invalid: list[InvalidRow], known: Mapping[str, Vector], keys: set[str]
    ) -> Item | None:
        """The preprocessed item of a row; None if it is invalid. `keys` are those of the items before."""
        payload = dict(row.payload)
        image = Path(row.image) if isinstance(row.image, str) else row.image
        try:
            item = item_of(ItemImage(image), row.text or None, payload.pop("id", None), payload)
            vector = known.get(item.image.sha256)
            pixels = self._encoder.pixels(item.image.decoded) if vector is None else None
            if self._images is not None and item.key not in keys:  # of one id, the first is stored
                self._images.add(item.image)
                keys.add(item.key)
        except (DataError, ImageError, OptionError) as error:
            invalid.append(InvalidRow(row.line, row.name, str(error)))
            return None
        item.image.release()
        return replace(item, name=row.name, line=row.line, source=source, pixels=pixels, vector=vector)


class Store:
    """Stores encoded chunks in a catalog. A chunk that is stored already changes nothing.

    Args:
        opening: the arguments of `Catalog`.
    """

    def __init__(self, opening: Mapping[str, Any]) -> None:
        self._opening = opening

    @cached_property
    def _catalog(self) -> Catalog:
        return Catalog(**self._opening)

    def __call__(self, batch: Batch) -> Batch:
        return replaced(batch, self._store)

    def _store(self, chunk: tuple[list[Item], list[InvalidRow]]) -> dict[str, Any]:
        items, invalid = chunk
        first = {item.key: item for item in reversed(items)}
        lost: list[InvalidRow] = []
        added = BulkAccess(self._catalog).store(self._with_images(list(first.values()), lost))
        failed = [(row.line, row.file_name, row.reason, row.hides_later_rows) for row in invalid + lost]
        return {"added": added, "skipped": len(items) - len(lost) - added, "failed": failed}

    def _with_images(self, items: list[Item], lost: list[InvalidRow]) -> list[Item]:
        """The items whose images are in the catalog now. A file can be deleted or changed after it was encoded."""
        images = self._catalog.parts().images

        def missing(item: Item) -> str:
            """Why the image is not in the catalog; "" if it is."""
            try:
                images.add(item.image)
            except ImageError as error:
                return str(error)
            finally:
                item.image.release()
            return ""

        reasons = list(buffered_map(missing, items, workers=STORED_IMAGES))
        lost += [InvalidRow(i.line, i.name, reason) for i, reason in zip(items, reasons, strict=True) if reason]
        return [item for item, reason in zip(items, reasons, strict=True) if not reason]


def replaced(batch: Batch, work: Callable[[Any], Any]) -> Batch:
    """The batch with the result of a stage, or with its error: Ray would replace an error by its traceback."""
    chunk = unpack(batch["rows"][0])
    if not isinstance(chunk, UniDiffError):
        try:
            chunk = work(chunk)
        except UniDiffError as error:
            chunk = error.with_traceback(None)
    return {**batch, "rows": np.array([pack(chunk)], dtype=object)}
