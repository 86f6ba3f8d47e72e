"""The stages of bulk indexing, each of which runs in processes of its own: read, encode, store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.catalog.items import Item, item_of
from unidiff_sdk.catalog.writer import BulkAccess
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import BundleError, DataError, ImageError, OptionError, UniDiffError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Vector
from unidiff_sdk.store.images import ItemImage

from .batching import BatchSize
from .embeddings import Embeddings
from .parts import Part, pack, read_chunks, unpack
from .remote import FETCHED_ROWS, RawRow, fetched

__all__ = ["Encode", "Store", "read", "replaced"]

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


class Encode:
    """Encodes chunks with one open bundle.

    Args:
        bundle: its path.
        fingerprint: the one that it must have.
        device: as for `Bundle.open`.
        batch_size, processes: as for `BatchSize`.
        embeddings: where known embeddings are, and those of encoded chunks are written.
    """

    def __init__(
        self,
        bundle: str,
        fingerprint: str,
        device: str,
        batch_size: int | None,
        processes: int,
        embeddings: Embeddings | None = None,
    ) -> None:
        self._bundle, self._fingerprint, self._device, self._embeddings = bundle, fingerprint, device, embeddings
        self._batch = BatchSize(batch_size, processes)

    @cached_property
    def _encoder(self) -> Encoder:
        threads = 1 if self._device == "cpu" else None
        bundle = Bundle.open(self._bundle, fingerprint=self._fingerprint, device=self._device, threads=threads)
        return Encoder(bundle)

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
        items = (item for row in contents if (item := self._item(row, source, invalid, known)) is not None)
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

    def _item(self, row: RawRow, source: str, invalid: list[InvalidRow], known: Mapping[str, Vector]) -> Item | None:
        payload = dict(row.payload)
        image = Path(row.image) if isinstance(row.image, str) else row.image
        try:
            item = item_of(ItemImage(image), row.text or None, payload.pop("id", None), payload)
            vector = known.get(item.image.sha256)
            pixels = self._encoder.pixels(item.image.decoded) if vector is None else None
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
        added = BulkAccess(self._catalog).store(items)
        failed = [(row.line, row.file_name, row.reason, row.hides_later_rows) for row in invalid]
        return {"added": added, "skipped": len(items) - added, "failed": failed}


def replaced(batch: Batch, work: Callable[[Any], Any]) -> Batch:
    """The batch with the result of a stage, or with its error: Ray would replace an error by its traceback."""
    chunk = unpack(batch["rows"][0])
    if not isinstance(chunk, UniDiffError):
        try:
            chunk = work(chunk)
        except UniDiffError as error:
            chunk = error.with_traceback(None)
    return {**batch, "rows": np.array([pack(chunk)], dtype=object)}
