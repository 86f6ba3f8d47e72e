"""The stages of bulk indexing, each of which runs in processes of its own: read, encode, store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.catalog.catalog import Catalog
from unidiff_sdk.catalog.items import Item, item_of
from unidiff_sdk.catalog.writer import PreparedBatch
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError, ImageError, OptionError, UniDiffError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store.images import ItemImage

from .batching import BatchSize
from .parts import Part, pack, read_chunks, unpack
from .remote import FETCHED_ROWS, fetched
from .rows import RawRow

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
                yield {"number": row["number"], "chunk": number, "last": last, "rows": pack((origin, rows, invalid))}
    except UniDiffError as error:
        yield {"number": row["number"], "chunk": number, "last": False, "rows": pack(error.with_traceback(None))}


class Encode:
    """Encodes chunks with one open bundle.

    Args:
        bundle: its path.
        device: as for `Bundle.open`.
        batch_size, processes: as for `BatchSize`.
    """

    def __init__(self, bundle: str, device: str, batch_size: int | None, processes: int) -> None:
        self._bundle, self._device = bundle, device
        self._batch = BatchSize(batch_size, processes)

    @cached_property
    def _encoder(self) -> Encoder:
        threads = 1 if self._device == "cpu" else None
        return Encoder(Bundle.open(self._bundle, device=self._device, threads=threads))

    def __call__(self, batch: Batch) -> Batch:
        return replaced(batch, self._encode)

    def _encode(self, chunk: Any) -> tuple[list[Item], list[InvalidRow]]:
        source, rows, invalid = chunk
        contents = (row for some in batched(rows, FETCHED_ROWS) for row in fetched(some, invalid))
        items = (item for row in contents if (item := self._item(row, source, invalid)) is not None)
        encoded: list[Item] = []
        while some := list(islice(items, self._batch.size)):
            pixels = np.stack([item.pixels for item in some if item.pixels is not None])
            with self._batch.measured(len(some), pixels[0].nbytes):
                vectors = self._encoder.encode_pixels(pixels)
            encoded += [replace(item, pixels=None, vector=vector) for item, vector in zip(some, vectors, strict=True)]
        return encoded, invalid

    def _item(self, row: RawRow, source: str, invalid: list[InvalidRow]) -> Item | None:
        payload = dict(row.payload)
        image = Path(row.image) if isinstance(row.image, str) else row.image
        try:
            item = item_of(ItemImage(image), row.text or None, payload.pop("id", None), payload)
            pixels = self._encoder.pixels(item.image.decoded)
        except (DataError, ImageError, OptionError) as error:
            invalid.append(InvalidRow(row.line, row.name, str(error)))
            return None
        item.image.release()
        return replace(item, name=row.name, line=row.line, source=source, pixels=pixels)


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
        writer, snapshot = self._catalog._writer, self._catalog._current.get()
        latest = list({item.key: item for item in items}.values())  # the last of equal ids
        changed = writer.changed(latest)
        for _ in writer.store([PreparedBatch(snapshot, [], changed, [], [])], copy=True):
            pass
        failed = [(row.line, row.file_name, row.reason, row.hides_later_rows) for row in invalid]
        return {"added": len(changed), "skipped": len(items) - len(changed), "failed": failed}


def replaced(batch: Batch, work: Callable[[Any], Any]) -> Batch:
    """The batch with the result of a stage, or with its error: Ray would replace an error by its traceback."""
    chunk = unpack(batch["rows"][0])
    if not isinstance(chunk, UniDiffError):
        try:
            chunk = work(chunk)
        except UniDiffError as error:
            chunk = error.with_traceback(None)
    return {**batch, "rows": np.array([pack(chunk)], dtype=object)}
