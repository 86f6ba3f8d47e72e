"""Re-encoding a store with another bundle into a second one, while the first is searched and written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk.errors import ImageError
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Record, Store

__all__ = ["Reencoder"]


class Reencoder:
    """Brings records from one store to another, with vectors of another encoder.

    Args:
        old, new: the stores. What `new` holds already with the same payload is not encoded again, so that a run which
            was cut short goes on where it stopped.
        load: the picture of a record.
        encoder: makes the vectors of `new`.
        batch_size: how many pictures are encoded at once.
    """

    def __init__(
        self, old: Store, new: Store, load: Callable[[Record], Image.Image], encoder: Encoder, batch_size: int
    ) -> None:
        self.old, self.new, self.encoder, self.batch_size = old, new, encoder, batch_size
        self._load = load

    def all(self) -> Iterator[int]:
        """Bring over what the old store holds; yields, batch by batch, how many more are done."""
        yield from self._bring(self.old.scroll(self.batch_size))
        for batch in self.new.scroll():  # what was deleted since a run that was cut short
            kept = {record.id for record in self.old.retrieve([record.id for record in batch])}
            self.new.delete([record.id for record in batch if record.id not in kept])

    def some(self, keys: Collection[str]) -> None:
        """Bring over what was written or deleted in the meantime."""
        for batch in batched(sorted(keys), self.batch_size):
            records = self.old.retrieve(batch)
            self.new.delete(sorted(set(batch) - {record.id for record in records}))
            for _ in self._bring([records]):
                pass

    def _bring(self, batches: Iterable[list[Record]]) -> Iterator[int]:
        with closing(buffered_map(self._read, batches, workers=os.cpu_count() or 1)) as read:
            for seen, records, pixels in read:
                if records:
                    vectors = self.encoder.encode_pixels(np.stack(pixels))
                    self.new.upsert(
                        [replace(record, vector=vector) for record, vector in zip(records, vectors, strict=True)]
                    )
                yield seen

    def _read(self, batch: list[Record]) -> tuple[int, list[Record], list[NDArray[np.float32]]]:
        there = {record.id: record.payload for record in self.new.retrieve([record.id for record in batch])}
        records, pixels = [], []
        for record in batch:
            if there.get(record.id) == record.payload:
                continue
            try:
                pixels.append(self.encoder.pixels(self._load(record)))
                records.append(record)
            except ImageError:
                now = self.old.retrieve([record.id])
                if now and now[0].payload == record.payload:
                    raise
                # Deleted or replaced a moment ago, and with it the picture: `some` will see to it.
        return len(batch), records, pixels
