"""What the page needs of the items: their vectors as one matrix, their columns as JSON, and packed thumbnails.

vectors.bin            float32 or int8 [items, dim], little-endian
scales.bin             with int8: float32[items]; a vector is its row times its scale
items.json             ids, captions, columns, and the position of each thumbnail: shard, first byte, size
thumbnails/000.bin …   WebP files, one after the other
latents.bin            for re-ranking: float16[items, channels, height, width]
errors.bin             for re-ranking: float32[items, timesteps], without a text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.catalog.snapshot import CatalogParts
from unidiff_sdk.retrieval.columns import column_kinds
from unidiff_sdk.retrieval.reranking.latents import ImageLatents
from unidiff_sdk.store import Record
from unidiff_sdk.store.images import ImageStore
from unidiff_sdk.store.payload import RESERVED, system_of

__all__ = ["Items", "quantize_rows", "write_items", "write_latents"]

Float32 = NDArray[np.float32]

SHARD_BYTES = 1 << 20
"""A shard of thumbnails ends once it is this large. The page fetches those that it shows."""

LATENTS_AT_ONCE = 32


@dataclass
class Items:
    """The items of a site, in the order of the store.

    Attributes:
        records: their ids and payloads.
        vectors: float32[items, dim].
    """

    records: list[Record]
    vectors: Float32 = field(repr=False)

    @classmethod
    def read(cls, parts: CatalogParts) -> Items:
        """All items of a catalog."""
        records = [record for batch in parts.store.scroll() for record in batch]
        vectors = np.array([record.vector for record in records], np.float32).reshape(len(records), parts.store.dim)
        return cls(records, vectors)

    @property
    def captions(self) -> list[str]:
        """The captions of the items that have one."""
        return [text for record in self.records if (text := record.payload.get("text"))]


def write_items(
    items: Items,
    parts: CatalogParts,
    folder: Path,
    *,
    int8: bool,
    advance: Callable[[int, int], None],
) -> None:
    """Write the vectors, columns and thumbnails of all items. Raises ImageError if an image cannot be read."""
    if int8:
        codes, scales = quantize_rows(items.vectors)
        (folder / "vectors.bin").write_bytes(codes.tobytes())
        (folder / "scales.bin").write_bytes(scales.astype("<f4").tobytes())
    else:
        (folder / "vectors.bin").write_bytes(items.vectors.astype("<f4").tobytes())
    positions = _write_thumbnails(items, parts.images, folder / "thumbnails", advance)
    payloads = [record.payload for record in items.records]
    document = {
        "ids": [payload["id"] for payload in payloads],
        "texts": [payload.get("text") for payload in payloads],
        "columns": [{name: value for name, value in each.items() if name not in RESERVED} for each in payloads],
        "kinds": {name: kind for name, kind in column_kinds(parts.store).items() if name not in RESERVED},
        "thumbnails": positions,
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    (folder / "items.json").write_text(text, encoding="utf-8")


def quantize_rows(vectors: Float32) -> tuple[NDArray[np.int8], Float32]:
    """int8[n, dim] and float32[n], whose products are the vectors up to half a step: scale = max |v| / 127."""
    scales = np.abs(vectors).max(axis=1, initial=0) / np.float32(127)
    codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return codes, scales.astype(np.float32)


def write_latents(
    items: Items,
    latents_of: Callable[[list[Record]], Mapping[str, ImageLatents]],
    timesteps: tuple[int, ...],
    folder: Path,
    advance: Callable[[int, int], None],
) -> None:
    """Write what re-ranking needs of each image. `latents_of` returns it for some records, by the hash of the image."""
    done = 0
    with (folder / "latents.bin").open("wb") as latents, (folder / "errors.bin").open("wb") as errors:
        for batch in batched(items.records, LATENTS_AT_ONCE):
            found = latents_of(list(batch))
            for record in batch:
                each = found[system_of(record.payload)["sha256"]]
                latents.write(each.latents.astype("<f2").tobytes())
                errors.write(np.array([each.errors[timestep] for timestep in timesteps], "<f4").tobytes())
            done += len(batch)
            advance(done, len(items.records))


def _write_thumbnails(
    items: Items, images: ImageStore, folder: Path, advance: Callable[[int, int], None]
) -> list[tuple[int, int, int]]:
    """Write the shards, and return the position of each thumbnail. Items with the same image share one."""
    folder.mkdir()
    known: dict[str, tuple[int, int, int]] = {}
    positions, shard, content = [], 0, bytearray()
    for done, (sha256, uri) in enumerate(_images(items), start=1):
        if sha256 not in known:
            thumbnail = images.thumbnail(sha256, uri)
            known[sha256] = (shard, len(content), len(thumbnail))
            content += thumbnail
        positions.append(known[sha256])
        if len(content) >= SHARD_BYTES or (content and done == len(items.records)):
            (folder / f"{shard:03}.bin").write_bytes(content)
            shard, content = shard + 1, bytearray()
        advance(done, len(items.records))
    return positions


def _images(items: Items) -> Iterator[tuple[str, str]]:
    for record in items.records:
        system: dict[str, Any] = system_of(record.payload)
        yield system["sha256"], system["uri"]
