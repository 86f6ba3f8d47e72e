"""The parts of a dataset, which tasks read independently, and the chunks of rows that a part consists of.

A part is one file, a shard or a table; or a folder of images in object storage. Its chunks are the same in each run, so
a run can skip those that are stored.
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
from unidiff_sdk.datasets.reader import InvalidRow, Names, Row, read_catalog
from unidiff_sdk.datasets.values import checked_kinds
from unidiff_sdk.errors import DataError, ImageError
from unidiff_sdk.store.images.object_storage import is_object_storage

from .remote import RawRow, find_below, folder_at, remote_layout

__all__ = ["Part", "find_parts", "pack", "read_chunks", "unpack"]

CHUNK_ROWS = 64
"""Rows of a chunk. All rows of a chunk are stored at once, and at most as many images are encoded at once."""


@dataclass(frozen=True)
class Part:
    """A file of a dataset, or a folder of images.

    Attributes:
        path: the shard, table or folder; below `url`, if there is one.
        images: the folder or URL of the images of a table, and the URL of a folder of images.
        url: the object storage that holds it.
        size, modified: bytes, and seconds since 1970; they tell whether the file has changed. Of a folder of images in
            object storage, they are the sum and the latest.
    """

    path: str
    images: str | None = None
    url: str | None = None
    size: int = 0
    modified: float = 0.0

    @property
    def name(self) -> str:
        """The path or URL."""
        return f"{self.url}/{self.path}".rstrip("/") if self.url else self.path


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


def _remote_parts(source: str) -> list[Part]:
    url, layout, facts = remote_layout(source)

    def images(folder: Path) -> str:
        return f"{url}/{folder.as_posix()}" if folder.parts else url

    if layout.images:  # the processes that encode fetch them, so one process can name them all
        files = [facts[file] for file in (*layout.images, *layout.sidecars.values())]
        return [Part("", url, url, sum(size for size, _ in files), max(modified for _, modified in files))]
    tables = [Part(table.as_posix(), images(folder), url, *facts[table]) for table, folder in layout.tables]
    return tables or [Part(shard.as_posix(), None, url, *facts[shard]) for shard in layout.shards]


def read_chunks(
    part: Part, columns: Mapping[str, str | None] | None, kinds: Mapping[str, str] | None
) -> Iterator[tuple[list[RawRow], list[InvalidRow], bool]]:
    """Yield (valid rows, invalid rows, whether it is the last) of each chunk.

    A file that cannot be read further ends with an invalid row that says so. Nothing is raised for what a file holds.

    Raises:
        OptionError: `columns` or `kinds` is invalid.
        StoreError: the object storage cannot be read.
    """
    if part.url is not None and not part.path:
        Names(columns or {}), checked_kinds(kinds)  # although there are no columns, as for a folder on a disk
        for named in batched(_named_rows(part.url), CHUNK_ROWS):
            yield named, [], False
        yield [], [], True
        return
    invalid: list[InvalidRow] = []
    with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
        try:
            rows = read_catalog(
                _local_path(part, Path(folder)),
                images=None if part.url else part.images,
                columns=columns,
                kinds=kinds,
                captions=False,
                on_error=invalid.append,
                find=find_below if part.url else None,
            )
            for chunk in batched(rows, CHUNK_ROWS, lambda row: row.nbytes):
                raw = [row for row in (_raw(part, row, invalid) for row in chunk) if row is not None]
                yield raw, invalid[:], False
                invalid.clear()
        except (DataError, ImageError) as error:
            invalid.append(InvalidRow(0, Path(part.path).name, str(error), hides_later_rows=True))
    yield [], invalid, True


def _named_rows(url: str) -> Iterator[RawRow]:
    """The rows of a folder of images in object storage: names that the processes that encode read."""
    _, layout, _ = remote_layout(url)
    for number, image in enumerate(layout.images, start=1):
        sidecar = layout.sidecars.get(image.with_suffix(""), image.with_suffix(".txt")) if layout.sidecars else None
        caption = None if sidecar is None else sidecar.as_posix()
        yield RawRow(image.as_posix(), "", {}, image.as_posix(), number, url, caption)


def _local_path(part: Part, folder: Path) -> Path:
    if part.url is None:
        return Path(part.path)
    path = folder / Path(part.path).name
    if not folder_at(part.url).copy(part.path, path):
        raise DataError(f"{part.name}: the file was deleted")
    return path


def _raw(part: Part, row: Row, invalid: list[InvalidRow]) -> RawRow | None:
    try:
        image = row.image()
    except DataError as error:
        invalid.append(InvalidRow(row.line, row.name, str(error)))
        return None
    if not isinstance(image, Path):
        return RawRow(image, row.text, row.payload, row.name, row.line)
    name = image.as_posix() if part.url else str(image)
    return RawRow(name, row.text, row.payload, row.name, row.line, part.images if part.url else None)


def pack(value: Any) -> bytes:
    """A value for another process of the same job. It is never written to a file."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Any:
    """The value that `pack` was given."""
    return pickle.loads(data)
