"""Archives: a whole catalog in one parquet file, as a backup, for another back end, or for other tools.

One row per item:

    id         string                   the id; an integer as its digits
    id_is_int  bool                     whether the id is an integer: 7 and "7" are different ids
    text       string                   the caption; null if there is none
    payload    string                   the other columns, including those of generated images, as a JSON object
    vector     fixed_size_list<float>   the embedding by the bundle that the metadata names
    image      binary                   the original image file, byte for byte, also if it was only referenced
    sha256     string                   the content hash of the image
    source     string                   the folder, shard or table that was indexed; null for items added one by one

Restoring creates thumbnails, payload indexes and the search index again. The metadata of the file hold, under the key
"unidiff", the version of the format and the bundle as JSON.

The embedding files of bulk jobs (`scale.index(embeddings=)`) have the same columns except for `image`. Instead:

    uri        string                   the URI of the image in the image store of the catalog

A folder of them is known by the file `embeddings.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unidiff_sdk._internal.files import atomic_file, checked_path, folder_hint, remove_unfinished
from unidiff_sdk._internal.json_values import number_within, parse_json
from unidiff_sdk._internal.memory import require_free_space
from unidiff_sdk._internal.parallel import batched, buffered_map
from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk.datasets.parquet import ARCHIVE_KEY, open_parquet, pyarrow_parquet, read_parquet
from unidiff_sdk.errors import BundleError, DataError, ImageError, OptionError, StoredImageError, StoreError
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.folder.signature import KeyFile
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.retrieval.filter_kinds import warn_about_filter
from unidiff_sdk.store import Record, Store, Vector
from unidiff_sdk.store.filters import Clause, parse
from unidiff_sdk.store.images import ImageStore, ItemImage
from unidiff_sdk.store.images.object_storage import is_object_storage
from unidiff_sdk.store.payload import RESERVED, system_of

from .catalog_file import MAX_DIM, TINY_NAME, restore_place
from .items import item_of
from .snapshot import Snapshot
from .writer import BATCH_SIZE, PreparedBatch

if TYPE_CHECKING:
    from .catalog import Catalog

__all__ = [
    "EMBEDDINGS",
    "EMBEDDINGS_HEADER",
    "Archive",
    "ArchivedItem",
    "check_replaceable",
    "restore_archive",
    "write_archive",
    "write_embeddings",
]

_RESERVED = set(RESERVED)  # keys of a stored payload that have their own columns

FORMAT, EMBEDDINGS, SCHEMA_VERSION = "unidiff-export", "unidiff-embeddings", 1
ROW_GROUP_BYTES = 32 << 20  # size of the images of a row group, which writer and readers hold in memory
ROW_GROUP_ROWS = 1024
EMBEDDINGS_HEADER = "embeddings.json"  # names the bundle of a folder of embedding files
READ_SIZE = 64  # records read from the store at once
# Checksums tell damaged embeddings from others: nearly all bits of a vector can change without making it invalid.
_WRITING = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}


@dataclass(frozen=True)
class ArchivedItem:
    """One row of an archive; the attributes are its columns. In an embedding file, `image` is the URI."""

    id: str | int
    text: str | None
    payload: dict[str, Any]
    vector: Vector
    image: bytes | str
    sha256: str
    source: str | None

    def open_image(self, images: ImageStore) -> ItemImage:
        """The image, with its hash verified; `images` has those of embedding files. Raises ImageError."""
        image = ItemImage(_read_image(images, self.image, self.id) if isinstance(self.image, str) else self.image)
        if image.sha256 != self.sha256:  # arrays and PIL images are hashed by their pixels
            image = ItemImage(image.decoded)
        if image.sha256 != self.sha256:
            raise ImageError(f"The image of {self.id!r} is not the one that was exported: its hash differs.")
        return image


# ------------------------------------------------------------------------------------------------ writing


def check_replaceable(path: str | Path, overwrite: bool) -> Path:
    """The path of an archive to write.

    Raises DataError if a file is there that is no archive, or an archive that may not be overwritten.
    """
    path = checked_path(path, DataError)
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name a file.")
    if path.exists():
        Archive.open(path)  # raises for any other file
        if not overwrite:
            raise DataError(
                f"{path} is an earlier export. Name another file, or replace it: overwrite=True (--overwrite)."
            )
    return path


def write_archive(
    path: str | Path,
    snapshot: Snapshot,
    images: ImageStore,
    where: Mapping[str, Any] | None,
    *,
    overwrite: bool,
    progress: bool,
) -> int:
    """Write the items that match a filter, one row group at a time. The file is complete or absent.

    Args:
        path: the file.
        snapshot: the items.
        images: the image store.
        where: the filter; None writes all items.
        overwrite: replace an existing archive.
        progress: show a progress bar.

    Returns:
        The number of items.

    Raises:
        DataError: pyarrow is missing; `path` is not an archive, or is one and `overwrite` is false.
        FilterError: `where` is invalid.
        ImageError: an image is missing or has changed since it was indexed.
        StoreError: the file cannot be written.
    """
    path, clause = check_replaceable(path, overwrite), parse(where)
    remove_unfinished(path.parent)
    parquet = pyarrow_parquet("export")
    store = snapshot.store
    schema = _described(_schema(store.dim), FORMAT, snapshot.describe_bundle())
    warn_about_filter(store, clause)
    total, count = store.count(clause), 0
    with (
        progress_bar("Exporting", progress) as advance,
        atomic_file(path) as temporary,
        parquet.ParquetWriter(temporary, schema, **_WRITING) as writer,
    ):
        for group in _groups(_rows(store, images, clause)):
            size = sum(len(row["image"]) + len(row["payload"]) + 4 * store.dim for row in group)
            require_free_space(path.parent, size, f"{path.name}")
            writer.write_table(_table(group, schema))
            count += len(group)
            advance(count, total)
    return count


def write_embeddings(path: Path, records: Sequence[Record], bundle: Mapping[str, Any]) -> None:
    """Write an embedding file.

    Args:
        path: the file, which is replaced.
        records: the items. Their URIs are those of copies in the image store, and `source` is an absolute path or URL.
        bundle: the bundle that produced the embeddings, see `Snapshot.describe_bundle`.

    Raises:
        DataError: pyarrow is missing.
    """
    parquet = pyarrow_parquet("embeddings")
    schema = _described(_schema(bundle["dim"], images=False), EMBEDDINGS, bundle)
    rows = [_columns(record) | {"uri": system_of(record.payload)["uri"]} for record in records]
    parquet.write_table(_table(rows, schema), path, **_WRITING)


def _described(schema: Any, kind: str, bundle: Mapping[str, Any]) -> Any:
    metadata = {"format": kind, "schema_version": SCHEMA_VERSION, "bundle": bundle}
    return schema.with_metadata({ARCHIVE_KEY: json.dumps(metadata)})


def _schema(dim: int, *, images: bool = True) -> Any:
    import pyarrow as pa

    text, given = pa.string(), {"nullable": False}
    return pa.schema(
        [
            pa.field("id", text, **given),
            pa.field("id_is_int", pa.bool_(), **given),
            pa.field("text", text),
            pa.field("payload", text, **given),
            pa.field("vector", pa.list_(pa.float32(), dim), **given),
            pa.field("image", pa.binary(), **given) if images else pa.field("uri", text, **given),
            pa.field("sha256", text, **given),
            pa.field("source", text),
        ]
    )


def _rows(store: Store, images: ImageStore, where: Clause | None) -> Iterator[dict[str, Any]]:
    for batch in store.scroll(READ_SIZE, where):
        for record in batch:
            try:
                yield _row(record, images)
            except ImageError:
                # The item may have been replaced or deleted in the meantime, together with its image.
                for now in store.retrieve([record.id]):
                    yield _row(now, images)


def _row(record: Record, images: ImageStore) -> dict[str, Any]:
    columns, system = _columns(record), system_of(record.payload)
    source = columns["source"]
    return columns | {
        "image": _original(images, system["uri"], system["sha256"], record.payload["id"]),
        "source": source if source is None or is_object_storage(source) else str(images.locate(source)),
    }


def _columns(record: Record) -> dict[str, Any]:
    """The columns that exports and embedding files share."""
    system, id = system_of(record.payload), record.payload["id"]
    return {
        "id": str(id),
        "id_is_int": isinstance(id, int),
        "text": record.payload.get("text"),
        "payload": json.dumps({k: v for k, v in record.payload.items() if k not in _RESERVED}, ensure_ascii=False),
        "vector": record.vector,
        "sha256": system["sha256"],
        "source": system.get("source"),
    }


def _read_image(images: ImageStore, uri: str, id: str | int) -> bytes:
    try:
        return images.read(uri)
    except StoredImageError as error:
        raise StoredImageError(f"The image of {id!r} cannot be read: {error}") from error


def _original(images: ImageStore, uri: str, sha256: str, id: str | int) -> bytes:
    data = _read_image(images, uri, id)
    # Copies are named by their hash; a referenced file may have changed.
    if sha256 not in uri and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(f"The image of {id!r} has changed since it was indexed. Index {images.locate(uri)} again.")
    return data


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"])
        if size >= ROW_GROUP_BYTES or len(group) == ROW_GROUP_ROWS:
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
    """The header of a file that `write_archive` wrote, or of the embedding files in a folder.

    Attributes:
        path: the file or folder.
        files: the file, or those in the folder.
        bundle: name, path and fingerprint of the bundle that produced the embeddings.
        dim: the number of dimensions of the embeddings.
        rows: the number of items.
    """

    path: Path
    files: tuple[Path, ...]
    bundle: dict[str, str]
    dim: int
    rows: int

    @classmethod
    def open(cls, path: str | Path) -> Archive:
        """Read the header. Raises DataError if the file is not an archive, or one of a later version."""
        path = checked_path(path, DataError)
        if (path / EMBEDDINGS_HEADER).is_file():
            return cls._open_folder(path)
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file that `unidiff export` wrote.{folder_hint(path)}")
        file = open_parquet(path)
        try:
            head = parse_json((file.schema_arrow.metadata or {})[ARCHIVE_KEY], "the metadata", error=OptionError)
            kind = head["format"]
            version = head["schema_version"] if kind in (FORMAT, EMBEDDINGS) else None
            bundle = {name: str(head["bundle"][name]) for name in ("name", "path", "fingerprint")}
            dim = int(number_within("dim", head["bundle"]["dim"], 1, MAX_DIM, DataError, whole=True))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} was not written by Catalog.export: it lacks the metadata") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version!r}; this version of unidiff-sdk reads {SCHEMA_VERSION}. "
                "Upgrade unidiff-sdk."
            )
        if not file.schema_arrow.equals(_schema(dim, images=kind == FORMAT)):
            raise DataError(f"{path} does not have the columns of an export: {', '.join(file.schema_arrow.names)}")
        return cls(path, (path,), bundle, dim, file.metadata.num_rows)

    @classmethod
    def _open_folder(cls, path: Path) -> Archive:
        archives = [cls.open(file) for file in sorted(path.rglob("*.parquet"))]
        if not archives:
            raise DataError(f"{path} has no embeddings yet: there is no .parquet file.")
        if len({archive.bundle["fingerprint"] for archive in archives}) > 1:
            raise DataError(f"{path} has embeddings of several bundles. Run the job that wrote it again.")
        files = tuple(archive.path for archive in archives)
        return replace(archives[0], path=path, files=files, rows=sum(archive.rows for archive in archives))

    def bundle_for(
        self, given: Bundle | str | Path | None, reencode: bool, trusted_keys: Sequence[KeyFile] | None = None
    ) -> Bundle:
        """Open the given bundle, or by default the one of the export, and check that it fits the embeddings.

        Raises:
            BundleError: the bundle is missing or damaged.
            StoreError: it is not the bundle of the export, and `reencode` is False.
        """
        if given is None:
            return self._open_recorded(trusted_keys)
        bundle = given if isinstance(given, Bundle) else Bundle.open(given, trusted_keys=trusted_keys)
        if not reencode:
            self._check(bundle.fingerprint, bundle.path)
        return bundle

    def _open_recorded(self, trusted_keys: Sequence[KeyFile] | None) -> Bundle:
        """The bundle of the export. A stranger may have named its path: only its manifest is read before they match."""
        path = TINY if self.bundle["path"] == TINY_NAME else Path(self.bundle["path"])
        if not path.is_dir():
            raise BundleError(
                f'The bundle "{self.bundle["name"]}" that {self.path} was exported with is not at {path}. Give its new '
                "place as bundle=."
            )
        self._check(Manifest.read(path).fingerprint, path)
        return Bundle.open(path, fingerprint=self.bundle["fingerprint"], trusted_keys=trusted_keys)

    def _check(self, fingerprint: str, path: Path) -> None:
        if fingerprint != self.bundle["fingerprint"]:
            raise StoreError(
                f'{self.path} holds embeddings of the bundle "{self.bundle["name"]}" (fingerprint '
                f"{self.bundle['fingerprint'][:12]}), but {path} is another bundle (fingerprint {fingerprint[:12]}). "
                "Embeddings of different bundles cannot be compared. Restore with the bundle of the export, or with "
                "bundle= and reencode=True to encode the images again."
            )

    def batches(self, size: int) -> Iterator[list[ArchivedItem]]:
        """All items, in lists of at most `size`. Raises DataError at a damaged row."""
        yield from batched(self._items(), size, lambda item: len(item.image))

    def _items(self) -> Iterator[ArchivedItem]:
        for file in self.files:
            for number, row in read_parquet(file, lambda names: None):
                try:
                    if isinstance(row, str):
                        raise ValueError(row)
                    item = _item(row)
                except (TypeError, ValueError) as error:
                    raise DataError(f"{file}: a row is damaged (row {number}: {error})") from error
                yield item


def restore_archive(
    create: Callable[[str | Path, Bundle], Catalog],
    path: str | Path,
    location: str | Path,
    bundle: Bundle | str | Path | None,
    reencode: bool,
    progress: bool,
    trusted_keys: Sequence[KeyFile] | None,
) -> Catalog:
    """Create a catalog from an archive; see `Catalog.restore`. `create` opens a catalog at a place with a bundle."""
    archive = Archive.open(path)
    opened = archive.bundle_for(bundle, reencode, trusted_keys)
    with restore_place(location) as place:
        catalog = create(place, opened)
        try:
            if len(catalog):
                raise StoreError(f"{location} is not empty. Restore into another collection.")
            _load(archive, catalog, reencode, progress)
        except BaseException:
            catalog.close()
            raise
        if place == location:
            return catalog
        catalog.close()
    return create(location, opened)


def _load(archive: Archive, catalog: Catalog, reencode: bool, progress: bool) -> None:
    """Store the items of an archive in an empty catalog."""
    snapshot, images = catalog._current.get(), catalog._images

    def prepare(batch: list[ArchivedItem]) -> PreparedBatch:
        items = []
        for archived in batch:
            item = item_of(archived.open_image(images), archived.text, archived.id, archived.payload)
            images.add(item.image)
            source = archived.source
            if source is not None and not is_object_storage(source):
                source = images.reference(Path(source))
            pixels = snapshot.encoder.pixels(item.image.decoded) if reencode else None
            items.append(replace(item, source=source, pixels=pixels, vector=None if reencode else archived.vector))
            item.image.release()
        return PreparedBatch(snapshot, [], items, [], [])

    done = 0
    batches = buffered_map(prepare, archive.batches(BATCH_SIZE), workers=os.cpu_count() or 1)
    with progress_bar("Restoring", progress) as advance, closing(batches):
        for batch in catalog._writer.store(batches, copy=True):
            done += len(batch.changed)
            advance(done, archive.rows)
    snapshot.optimize_if_large()


def _item(row: dict[str, Any]) -> ArchivedItem:
    payload = parse_json(row["payload"], "the payload", error=OptionError, kind=object)
    if not isinstance(payload, dict) or payload.keys() & _RESERVED:
        raise ValueError(f"the payload of {row['id']!r} is not an object of other columns")
    return ArchivedItem(
        id=int(row["id"]) if row["id_is_int"] else row["id"],
        text=row["text"],
        payload=payload,
        vector=np.array(row["vector"], np.float32),
        image=row["uri"] if "uri" in row else row["image"],
        sha256=row["sha256"],
        source=row["source"],
    )
