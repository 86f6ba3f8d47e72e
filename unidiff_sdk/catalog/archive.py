"""A whole catalog in one parquet file, to keep, to move to another back end, or to read with other tools.

One row an item:

    id         string                   the caller's id, an integer as its digits
    id_is_int  bool                     7 and "7" are two different ids
    text       string                   the caption; null if there is none
    payload    string                   the other columns, the marks of generated pictures too, as a JSON object
    vector     fixed_size_list<float>   the embedding of the bundle that the file names
    image      binary                   the original picture file, byte for byte, also where it was only referenced
    sha256     string                   of its content, by which the catalog knows it
    source     string                   the folder or table it was indexed from; null if it was added by hand

Thumbnails, payload indexes and the search index are made anew by restoring. The file's metadata hold, under the key
"unidiff", the format's version and the bundle as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unidiff_sdk._internal.files import atomic_file
from unidiff_sdk.datasets.parquet import open_parquet, pyarrow_parquet
from unidiff_sdk.errors import BundleError, DataError, ImageError, StoreError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.store import Record, Store, Vector
from unidiff_sdk.store.filters import Clause
from unidiff_sdk.store.images import ImageStore, ItemImage
from unidiff_sdk.store.payload import SYSTEM

__all__ = ["Archive", "ArchivedItem", "write_archive"]

KEY, FORMAT, SCHEMA_VERSION = b"unidiff", "unidiff-export", 1
ROW_GROUP = 32 << 20  # bytes of pictures that are held in memory, here and by readers
BATCH_SIZE = 64
_OWN = {"id", "text", SYSTEM}  # of a stored payload, what has a column of its own here


@dataclass(frozen=True)
class ArchivedItem:
    """One row of an archive."""

    id: str | int
    text: str | None
    payload: dict[str, Any]
    vector: Vector
    image: bytes
    sha256: str
    source: str | None

    def picture(self) -> ItemImage:
        """The picture, which is certainly the one that was archived. Raises ImageError."""
        picture = ItemImage(self.image)
        if picture.sha256 != self.sha256:  # the hash of an array or a PIL image is that of its pixels
            picture = ItemImage(picture.decoded)
        if picture.sha256 != self.sha256:
            raise ImageError(f"the picture of {self.id!r} is not the one that was exported: its hash differs")
        return picture


# ------------------------------------------------------------------------------------------------ writing


def write_archive(
    path: Path,
    store: Store,
    images: ImageStore,
    bundle: dict[str, Any],
    where: Clause | None,
    advance: Callable[[int], None],
) -> int:
    """Write what passes a filter, a row group at a time; the file is there whole or not at all. Returns how many.

    Args:
        path: a file of that name is replaced if it is an archive.
        bundle: name, path, fingerprint and dim of what made the vectors.
        advance: called with how many are written.

    Raises:
        DataError: pyarrow is missing, or `path` is another file.
        ImageError: a picture is gone or has changed since it was indexed.
        StoreError: the file cannot be written.
    """
    parquet = pyarrow_parquet("export")
    if path.exists():
        Archive.open(path)  # whatever else lies there is not to be lost
    schema = _schema(store.dim).with_metadata(
        {KEY: json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, "bundle": bundle})}
    )
    count = 0
    with (
        atomic_file(path) as temporary,
        parquet.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for group in _groups(_rows(store, images, where)):
            writer.write_table(_table(group, schema))
            count += len(group)
            advance(count)
    return count


def _schema(dim: int) -> Any:
    import pyarrow as pa

    text, given = pa.string(), {"nullable": False}
    return pa.schema(
        [
            pa.field("id", text, **given),
            pa.field("id_is_int", pa.bool_(), **given),
            pa.field("text", text),
            pa.field("payload", text, **given),
            pa.field("vector", pa.list_(pa.float32(), dim), **given),
            pa.field("image", pa.binary(), **given),
            pa.field("sha256", text, **given),
            pa.field("source", text),
        ]
    )


def _rows(store: Store, images: ImageStore, where: Clause | None) -> Iterator[dict[str, Any]]:
    for batch in store.scroll(BATCH_SIZE, where):
        for record in batch:
            try:
                yield _row(record, images)
            except ImageError:
                # Replaced or deleted a moment ago, and with it the picture?
                for now in store.retrieve([record.id]):
                    yield _row(now, images)


def _row(record: Record, images: ImageStore) -> dict[str, Any]:
    id, system = record.payload["id"], record.payload[SYSTEM]
    source = system.get("source")
    return {
        "id": str(id),
        "id_is_int": isinstance(id, int),
        "text": record.payload.get("text"),
        "payload": json.dumps({k: v for k, v in record.payload.items() if k not in _OWN}, ensure_ascii=False),
        "vector": record.vector,
        "image": _original(images.path(system["uri"]), system["sha256"], id),
        "sha256": system["sha256"],
        "source": None if source is None else str(images.path(source)),
    }


def _original(path: Path, sha256: str, id: str | int) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"the picture of {id!r} cannot be read: {path} ({error.strerror})") from error
    # A copy lies under its hash; a file outside may have become another one.
    if sha256 not in path.name and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(f"the picture of {id!r} has changed since it was indexed: index {path} again")
    return data


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"])
        if size >= ROW_GROUP or len(group) == 1024:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(rows: Sequence[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in schema}
    return pa.table(columns, schema=schema)


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Archive:
    """A file that `write_archive` wrote, looked at.

    Attributes:
        bundle: name, path and fingerprint of the bundle that made the vectors, of `dim` numbers each.
        rows: how many there are.
    """

    path: Path
    bundle: dict[str, str]
    dim: int
    rows: int

    @classmethod
    def open(cls, path: str | Path) -> Archive:
        """Raises DataError if it is no such file, or one of a later version."""
        path = Path(path)
        file = open_parquet(path)
        try:
            head = json.loads((file.schema_arrow.metadata or {})[KEY])
            version = head["schema_version"] if head["format"] == FORMAT else None
            bundle = {name: str(head["bundle"][name]) for name in ("name", "path", "fingerprint")}
            dim = int(head["bundle"]["dim"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not what Catalog.export writes: it has no such metadata") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version!r} and this version of unidiff-sdk reads {SCHEMA_VERSION}. "
                "Upgrade unidiff-sdk."
            )
        if not file.schema_arrow.equals(_schema(dim)):
            raise DataError(f"{path} does not have the columns of an export: {', '.join(file.schema_arrow.names)}")
        return cls(path, bundle, dim, file.metadata.num_rows)

    def bundle_for(self, given: Bundle | str | Path | None, reencode: bool) -> Bundle:
        """The bundle that was given, or else the one of the export, if it may go with these vectors.

        Raises:
            BundleError: it is missing or damaged.
            StoreError: it is another one than that of the export, and the pictures are not to be encoded anew.
        """
        path = self.bundle["path"]
        if given is None and path != "tiny" and not Path(path).is_dir():
            raise BundleError(
                f'The bundle "{self.bundle["name"]}" that {self.path} was exported with is not at {path}: say where it '
                "is now, bundle=…"
            )
        bundle = given if isinstance(given, Bundle) else Bundle.open(given or path)
        if not reencode and bundle.fingerprint != self.bundle["fingerprint"]:
            raise StoreError(
                f'{self.path} holds vectors of the bundle "{self.bundle["name"]}" (fingerprint '
                f"{self.bundle['fingerprint'][:12]}), and {bundle.path} is another one (fingerprint "
                f"{bundle.fingerprint[:12]}): their vectors do not compare. Restore it with that bundle, or with "
                "reencode=True, which encodes the pictures anew."
            )
        return bundle

    def batches(self, size: int) -> Iterator[list[ArchivedItem]]:
        """All rows, in lists of at most `size`, a row group at a time. Raises DataError at a damaged one."""
        import pyarrow as pa

        file = open_parquet(self.path)
        for group in range(file.num_row_groups):
            try:
                for batch in file.read_row_group(group).to_batches(max_chunksize=size):
                    yield [_item(row) for row in batch.to_pylist()]
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{self.path}: a row is damaged ({error})") from error


def _item(row: dict[str, Any]) -> ArchivedItem:
    payload = json.loads(row["payload"])
    if not isinstance(payload, dict) or payload.keys() & _OWN:
        raise ValueError(f"the payload of {row['id']!r} is no object of other columns")
    return ArchivedItem(
        id=int(row["id"]) if row["id_is_int"] else row["id"],
        text=row["text"],
        payload=payload,
        vector=np.array(row["vector"], np.float32),
        image=row["image"],
        sha256=row["sha256"],
        source=row["source"],
    )
