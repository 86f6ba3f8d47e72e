"""The parts of a dataset, which tasks read independently, and the chunks of rows that a part consists of.

A part is one file, a shard or a table; or a folder of images in object storage. Its chunks are the same in each run, so
a run can skip those that are stored.
"""

from __future__ import annotations

import os
import pickle
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unidiff_sdk._internal.parallel import BATCH_BYTES, batched
from unidiff_sdk.datasets.layouts import Layout, find_layout
from unidiff_sdk.datasets.reader import InvalidRow, Names, Row, read_catalog
from unidiff_sdk.datasets.values import checked_kinds
from unidiff_sdk.errors import DataError, ImageError, StoreError, UniDiffError
from unidiff_sdk.store.images.object_storage import is_object_storage

from .remote import RawRow, find_below, folder_at, remote_layout

__all__ = ["Part", "find_parts", "pack", "read_chunks", "unpack"]

CHUNK_ROWS = 64
"""Rows of a chunk. All rows of a chunk are stored at once, and at most as many images are encoded at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A file of a dataset, or a folder of images.

    Attributes:
        path: the shard, table or folder; below `url`, if there is one.
        images: the folder or URL of the images of a table, and the URL of a folder of images.
        url: the object storage that holds it.
        size, modified: bytes, and seconds since 1970; they tell whether the file has changed. Of a folder of images in
            object storage, they are the sum and the latest; of one on a disk, the number of files and the time of the
            folder that changed last.
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
    if layout.images:
        return [_images_part(Path(source), layout)]
    return [_local_part(shard) for shard in layout.shards]


def _local_part(path: Path, images: Path | None = None) -> Part:
    status = path.stat()
    folder = None if images is None else str(images.resolve())
    # Links are kept: those of the hub cache lead to files without a suffix.
    return Part(os.path.abspath(path), folder, None, status.st_size, status.st_mtime)


def _images_part(path: Path, layout: Layout) -> Part:
    """A folder of images. The time of a folder changes whenever a file is added to it or deleted."""
    files = (*layout.images, *layout.sidecars.values())
    modified = max(folder.stat().st_mtime for folder in {file.parent for file in files})
    return Part(os.path.abspath(path), size=len(files), modified=modified)


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

    A chunk holds `CHUNK_ROWS` consecutive rows, valid or not. So a run finds the chunks of an earlier one, although
    images were added or deleted meanwhile. Where images in the part itself are large, a chunk is divided by their
    sizes. A file whose content cannot be read further ends with an invalid row that says so.

    Raises:
        OptionError: `columns` or `kinds` is invalid.
        StoreError: the part is missing, has changed, or cannot be read: another machine or a later run may read it.
    """
    if part.url is not None and not part.path:
        Names(columns or {}), checked_kinds(kinds)  # although there are no columns, as for a folder on a disk
        yield from _with_last((named, []) for named in batched(_named_rows(part.url), CHUNK_ROWS))
        return
    _check_unchanged(part)
    invalid: list[InvalidRow] = []
    with tempfile.TemporaryDirectory(prefix="unidiff-") as folder:
        rows = _rows(part, Path(folder), columns, kinds, invalid)
        for chunk, before, last in _with_last(_chunks(rows, invalid)):
            raw = [row for row in (_raw(part, row, before) for row in chunk) if row is not None]
            yield raw, before, last


def _check_unchanged(part: Part) -> None:
    """Raise StoreError unless the file of a part is the one that was found when the job began."""
    if part.url is not None:
        facts = folder_at(part.url).facts(part.path)
    else:
        try:
            status = Path(part.path).stat()
        except OSError as error:
            raise StoreError(
                f"{part.name} cannot be read by a process of this job: {error.strerror}. The source must be under this "
                "path on all machines."
            ) from error
        # A folder of images may change: each image is read by itself.
        facts = (part.size, part.modified) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime)
    if facts != (part.size, part.modified):
        what = "is missing" if facts is None else "has changed since the job began"
        raise StoreError(f"{part.name} {what}. Run the job again without --resume.")


def _rows(
    part: Part,
    folder: Path,
    columns: Mapping[str, str | None] | None,
    kinds: Mapping[str, str] | None,
    invalid: list[InvalidRow],
) -> Iterator[Row]:
    """The valid rows of a part; the others are appended to `invalid`. Raises OptionError, StoreError."""
    try:
        yield from read_catalog(
            _local_path(part, folder),
            images=None if part.url else part.images,
            columns=columns,
            kinds=kinds,
            captions=False,
            on_error=invalid.append,
            find=find_below if part.url else None,
        )
    except (DataError, ImageError) as error:
        _check_content(error)
        invalid.append(InvalidRow(0, Path(part.path).name, str(error), hides_later_rows=True))


def _check_content(error: UniDiffError) -> None:
    """Raise StoreError if the operating system failed to read a file, which says nothing about its content."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:  # decoders of damaged content set no errno
        raise StoreError(str(error)) from error


def _chunks(rows: Iterable[Row], invalid: list[InvalidRow]) -> Iterator[tuple[list[Row], list[InvalidRow]]]:
    """Rows and the invalid rows among them, by chunks. The bytes of rows count only if the part itself holds them."""
    chunk: list[Row] = []
    number = size = 0
    for row in rows:
        while number < _chunk_of(row.line):
            yield chunk, _taken(invalid, number)
            chunk, size, number = [], 0, number + 1
        chunk.append(row)
        size += 0 if isinstance(row.source, Path) else row.nbytes
        if size >= BATCH_BYTES:
            yield chunk, []
            chunk, size = [], 0
    yield chunk, invalid


def _chunk_of(line: int) -> int:
    return (line - 1) // CHUNK_ROWS


def _taken(invalid: list[InvalidRow], number: int) -> list[InvalidRow]:
    """Take the invalid rows up to the end of a chunk."""
    taken = [row for row in invalid if _chunk_of(row.line) <= number]
    invalid[:] = [row for row in invalid if _chunk_of(row.line) > number]
    return taken


def _with_last(chunks: Iterable[tuple[T, list[InvalidRow]]]) -> Iterator[tuple[T, list[InvalidRow], bool]]:
    """Chunks, with whether each is the last."""
    ahead = iter(chunks)
    current = next(ahead, None)
    while current is not None:
        following = next(ahead, None)
        yield *current, following is None
        current = following


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
        raise StoreError(f"{part.name} was deleted during the job.")
    return path


def _raw(part: Part, row: Row, invalid: list[InvalidRow]) -> RawRow | None:
    try:
        image = row.image()
    except DataError as error:
        _check_content(error)
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
