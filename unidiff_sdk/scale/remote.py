"""Datasets in object storage: what a URL holds, and its images, which the processes that encode fetch themselves."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from unidiff_sdk._internal.images import MAX_FILE_SIZE
from unidiff_sdk.datasets.layouts import METADATA, Layout, layout_of
from unidiff_sdk.datasets.reader import TABLES, InvalidRow, caption_of, spellings
from unidiff_sdk.errors import DataError
from unidiff_sdk.store.images.object_storage import ObjectFolder, ObjectStorage

__all__ = ["FETCHED_ROWS", "RawRow", "fetched", "find_below", "folder_at", "remote_layout"]

FETCHED_ROWS = 16
"""Rows whose images a process fetches at the same time, which hides the latency of the storage."""

Facts = Mapping[Path, tuple[int, float]]
"""The size in bytes of files, and their modification in seconds since 1970."""


@dataclass(frozen=True)
class RawRow:
    """A row whose image is not decoded yet. The processes of bulk indexing pass it on.

    Attributes:
        image: its bytes; a path that all machines can read; or with `url`, a name in object storage.
        url: the object storage that holds `image` and `caption`.
        caption: the name of the text file that holds the caption.
    """

    image: bytes | str
    text: str
    payload: dict[str, Any]
    name: str
    line: int
    url: str | None = None
    caption: str | None = None


def folder_at(url: str) -> ObjectFolder:
    """The files below a URL. Raises OptionError, StoreError."""
    return ObjectFolder(ObjectStorage(url))


def remote_layout(url: str) -> tuple[str, Layout, Facts]:
    """What a URL holds: the folder, the layout with paths relative to it, and the facts about the files of the layout.

    A folder with a metadata table is not listed: millions of images take a thousand requests.

    Raises:
        DataError: there is nothing that can be read.
        StoreError: the object storage cannot be read.
    """
    url = url.rstrip("/")
    parent, _, name = url.rpartition("/")
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (*TABLES, ".tar") and (facts := folder_at(parent).facts(name)) is not None:
        file = Path(name)
        found = Layout(Path(), shards=(file,)) if suffix == ".tar" else Layout(Path(), tables=((file, Path()),))
        return parent, found, {file: facts}
    folder = folder_at(url)
    for table in METADATA:
        if (facts := folder.facts(table)) is not None:
            return url, Layout(Path(), tables=((Path(table), Path()),)), {Path(table): facts}
    files = {Path(name): (size, modified) for name, size, modified in folder.list("") if not _is_hidden(name)}
    if not files:
        raise DataError(f"{url}: there are no files. Give the URL of a dataset, such as s3://bucket/products.")
    if shards := tuple(sorted(file for file in files if file.suffix.lower() == ".tar" and len(file.parts) == 1)):
        return url, Layout(Path(), shards=shards), files  # before tables next to them, as of a folder on a disk
    ordered = sorted(files, key=lambda file: (file.parent, file.name))
    folders = ((place, [file.name for file in some]) for place, some in groupby(ordered, lambda file: file.parent))
    return url, layout_of(url, Path(), folders, captions=False), files


def find_below(_: Path, name: str) -> Path | str:
    """The image of a table below its folder, or what is wrong with its path. It is not looked for."""
    path = posixpath.normpath(name)
    slashes = posixpath.normpath(name.replace("\\", "/"))
    if slashes.startswith(("/", "../")) or slashes == ".." or "\0" in name:
        return "the path leads out of the folder of the images"
    return Path(path)


def fetched(rows: Sequence[RawRow], invalid: list[InvalidRow]) -> list[RawRow]:
    """Rows of one part with the content of their files, in the place of names. Invalid rows are appended to `invalid`.

    Raises:
        StoreError: the object storage cannot be read.
    """
    remote = [row for row in rows if row.url is not None]
    if not remote:
        return list(rows)
    folder = folder_at(str(remote[0].url))
    names = [name for row in remote for name in (row.image, row.caption) if isinstance(name, str)]
    contents = dict(zip(names, folder.read_several(names, MAX_FILE_SIZE + 1), strict=True))
    ready: list[RawRow] = []
    for row in rows:
        try:
            ready.append(row if row.url is None else _filled(row, folder, contents))
        except DataError as error:
            invalid.append(InvalidRow(row.line, row.name, str(error)))
    return ready


def _filled(row: RawRow, folder: ObjectFolder, contents: Mapping[str, bytes | None]) -> RawRow:
    given = str(row.image)
    image = contents[given]
    if image is None:
        others = (folder.read(name) for name in spellings(given)[1:])
        image = next((content for content in others if content is not None), None)
    if image is None:
        raise DataError("there is no such image file")
    if len(image) > MAX_FILE_SIZE:
        raise DataError(f"the image has more than {MAX_FILE_SIZE:,} bytes, which is the most that is allowed")
    text = row.text
    if row.caption is not None:
        caption = contents[row.caption]
        if caption is None:
            raise DataError(f"the caption is missing ({row.caption}: there is no such file)")
        text = caption_of(caption)
    return replace(row, image=image, text=text, url=None, caption=None)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/")[:-1])
