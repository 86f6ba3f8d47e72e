"""The embeddings of a bulk job as Parquet files. A later run takes them from there instead of encoding again.

    folder/embeddings.json                     the bundle that produced them
    folder/3fa94c1d8e02b7a6/000003.parquet     the items of chunk 3 of a part, whose name gives the hash

`catalog.archive` describes the columns. A chunk is written as a whole before it is stored in the catalog. Of a file, a
run takes the embeddings of the images that the source still has, by the hash of their content. So changed rows are
encoded, and captions and columns are always those of the source.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.catalog.archive import EMBEDDINGS, EMBEDDINGS_HEADER, Archive, write_embeddings
from unidiff_sdk.catalog.items import Item
from unidiff_sdk.errors import DataError, StoreError
from unidiff_sdk.store import Record, Vector
from unidiff_sdk.store.images.image_store import copy_uri
from unidiff_sdk.store.images.object_storage import ObjectFolder, ObjectStorage, image_place

from .parts import CHUNK_ROWS

__all__ = ["Embeddings"]


@dataclass(frozen=True)
class Embeddings:
    """The embedding files of a job. It can be passed to other processes.

    Args:
        place: a folder under an absolute path, or object storage.
        bundle: the bundle that produces the embeddings, see `BulkAccess.bundle`.
        source: the absolute path or URL of the dataset.
    """

    place: Path | ObjectStorage
    bundle: Mapping[str, Any]
    source: str

    @classmethod
    def open(cls, place: str | Path | ObjectStorage, bundle: Mapping[str, Any], source: str) -> Embeddings:
        """Open a place, or make it one of this bundle if it is empty.

        Raises:
            OptionError: the place is not a folder or URL.
            DataError: the file that names the bundle is damaged.
            StoreError: the embeddings there are of another bundle, or the place cannot be read or written.
        """
        found = image_place(place, "embeddings")
        embeddings = cls(Path(os.path.abspath(found)) if isinstance(found, Path) else found, bundle, source)
        embeddings._check_bundle()
        return embeddings

    @property
    def name(self) -> str:
        """The folder or URL."""
        return self._files.url

    def read(self, part: str, chunk: int) -> bytes | None:
        """The file of a chunk; None if there is none. Raises StoreError."""
        return self._files.read(_name(part, chunk))

    def vectors(self, file: bytes | None) -> dict[str, Vector]:
        """The embeddings in a file by the hash of their image. A damaged file has none."""
        if file is None:
            return {}
        with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
            copy = Path(folder) / "chunk.parquet"
            copy.write_bytes(file)
            try:
                archive = Archive.open(copy)
                if archive.bundle["fingerprint"] != self.bundle["fingerprint"]:
                    return {}  # moved here from another place
                return {item.sha256: item.vector for items in archive.batches(CHUNK_ROWS) for item in items}
            except DataError:
                return {}

    def write(self, part: str, chunk: int, items: Sequence[Item], *, last: bool, existing: bytes | None) -> None:
        """Write the file of a chunk, complete or not at all.

        Args:
            part, chunk: the name of the part, and the number of the chunk.
            items: the encoded items. Of equal ids, the last one is written, as it is stored.
            last: whether it is the last chunk. Then files of later ones are from an earlier version of the part, and
                are deleted.
            existing: what `read` returned. An equal file is not written again.

        Raises:
            StoreError: the file cannot be written.
        """
        latest = list({item.key: item for item in items}.values())
        if not latest and existing is not None:
            self._files.delete(_name(part, chunk))
        elif latest and (data := self._encoded(latest)) != existing:
            self._files.write(_name(part, chunk), data)
        while last and self._files.has(_name(part, chunk := chunk + 1)):
            self._files.delete(_name(part, chunk))

    @cached_property
    def _files(self) -> ObjectFolder:
        return ObjectFolder(self.place)

    def _encoded(self, items: Sequence[Item]) -> bytes:
        records = []
        for item in items:
            assert item.vector is not None
            payload = replace(item, source=self.source).payload(copy_uri(item.image))
            records.append(Record(item.key, item.vector, payload))
        with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
            file = Path(folder) / "chunk.parquet"
            write_embeddings(file, records, self.bundle)
            return file.read_bytes()

    def _check_bundle(self) -> None:
        header = self._files.read(EMBEDDINGS_HEADER)
        if header is None:
            self._files.write(EMBEDDINGS_HEADER, json.dumps({"format": EMBEDDINGS, "bundle": self.bundle}).encode())
            return
        try:
            content = parse_json(header.decode(), EMBEDDINGS_HEADER, kind=dict)
            name, fingerprint = str(content["bundle"]["name"]), str(content["bundle"]["fingerprint"])
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.name}/{EMBEDDINGS_HEADER} is damaged: it does not name the bundle of the embeddings. Choose "
                "another place."
            ) from error
        if fingerprint != self.bundle["fingerprint"]:
            raise StoreError(
                f'{self.name} holds embeddings of the bundle "{name}" (fingerprint {fingerprint[:12]}), but the '
                f'catalog has the bundle "{self.bundle["name"]}" (fingerprint {self.bundle["fingerprint"][:12]}). '
                "Choose another place for its embeddings."
            )


def _name(part: str, chunk: int) -> str:
    return f"{hashlib.sha256(part.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}/{chunk:06d}.parquet"
