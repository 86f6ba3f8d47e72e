"""The parts of a dataset, which tasks read independently, and the chunks of rows that a part consists of.

A part is one file: a shard or a table. Its chunks are the same in each run, so a run can skip those that are stored.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.datasets.layouts import find_layout
from unidiff_sdk.datasets.reader import InvalidRow, Row, read_catalog
from unidiff_sdk.errors import DataError, ImageError
from unidiff_sdk.store.images.object_storage import ObjectFolder, ObjectStorage, is_object_storage

__all__ = ["Part", "RawRow", "find_parts", "pack", "read_chunks", "unpack"]

CHUNK_ROWS = 64
"""Rows of a chunk. All rows of a chunk are encoded at once and stored at once."""

_FILES = (".tar", ".parquet")  # what is read from object storage: files that hold their images


@dataclass(frozen=True)
class Part:
    """A file of a dataset.

    Attributes:
        path: the shard, table or folder; below `url`, if there is one.
        images: the folder of the images of a table.
        url: the object storage that holds it.
        size, modified: bytes, and seconds since 1970; they tell whether the file has changed.
    """

    path: str
    images: str | None = None
    url: str | None = None
    size: int = 0
    modified: float = 0.0

    @property
    def name(self) -> str:
        """The path or URL."""
        return f"{self.url}/{self.path}" if self.url else self.path


@dataclass(frozen=True)
class RawRow:
    """A row with its image as bytes or as a path that all machines can read."""

    image: bytes | str
    text: str
    payload: dict[str, Any]
    name: str
    line: int


def find_parts(source: str | Path, images: str | Path | None = None) -> list[Part]:
    """The parts of a dataset, in order.

    Raises:
        DataError: there is nothing that can be read.
        StoreError: the object storage cannot be listed.
    """
    if is_object_storage(str(source)):
        return _remote_parts(str(source))
    layout = find_layout(source, images, captions=False)
    if layout.tables:
        return [_local_part(table, folder) for table, folder in layout.tables]
    return [_local_part(shard) for shard in layout.shards] or [_local_part(Path(source))]


def _local_part(path: Path, images: Path | None = None) -> Part:
    status = path.stat()
    folder = None if images is None else str(images.resolve())
    # Links are kept: those of the hub cache lead to files without a suffix.
    return Part(os.path.abspath(path), folder, None, status.st_size, status.st_mtime)


def _remote_parts(url: str) -> list[Part]:
    folder, name = url, ""
    if url.endswith(_FILES):
        folder, _, name = url.rpartition("/")
    found = ObjectFolder(ObjectStorage(folder)).list("")
    parts = [
        Part(file, None, folder.rstrip("/"), size, modified)
        for file, size, modified in sorted(found)
        if file.endswith(_FILES) and name in ("", file)
    ]
    if not parts:
        raise DataError(
            f"{url} has no {' or '.join(_FILES)} file. From object storage, shards and parquet files with images are "
            "read. Copy a folder of images to a file system, or write shards."
        )
    return parts


def read_chunks(
    part: Part, columns: Mapping[str, str | None] | None, kinds: Mapping[str, str] | None
) -> Iterator[tuple[list[RawRow], list[InvalidRow], bool]]:
    """Yield (valid rows, invalid rows, whether it is the last) of each chunk.

    A file that cannot be read further ends with an invalid row that says so. Nothing is raised for what a file holds.

    Raises:
        OptionError: `columns` or `kinds` is invalid.
        StoreError: the object storage cannot be read.
    """
    invalid: list[InvalidRow] = []
    with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
        try:
            rows = read_catalog(
                _local_path(part, Path(folder)),
                images=part.images,
                columns=columns,
                kinds=kinds,
                captions=False,
                on_error=invalid.append,
            )
            for chunk in batched(rows, CHUNK_ROWS, lambda row: row.nbytes):
                raw = [row for row in (_raw(row, invalid) for row in chunk) if row is not None]
                yield raw, invalid[:], False
                invalid.clear()
        except (DataError, ImageError) as error:
            invalid.append(InvalidRow(0, Path(part.path).name, str(error), hides_later_rows=True))
    yield [], invalid, True


def _local_path(part: Part, folder: Path) -> Path:
    if part.url is None:
        return Path(part.path)
    content = ObjectFolder(ObjectStorage(part.url)).read(part.path)
    if content is None:
        raise DataError(f"{part.name}: the file was deleted")
    path = folder / Path(part.path).name
    path.write_bytes(content)
    return path


def _raw(row: Row, invalid: list[InvalidRow]) -> RawRow | None:
    try:
        image = row.image()
    except DataError as error:
        invalid.append(InvalidRow(row.line, row.name, str(error)))
        return None
    return RawRow(str(image) if isinstance(image, Path) else image, row.text, row.payload, row.name, row.line)


def pack(value: Any) -> bytes:
    """A value for another process of the same job. It is never written to a file."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Any:
    """The value that `pack` was given."""
    return pickle.loads(data)
