"""Find the tables, shards and images of a dataset folder.

| layout | what is read |
|---|---|
| `imagefolder` of Hugging Face | `metadata.jsonl`, `.csv` or `.parquet`, in the folder itself or in subfolders |
| a dataset repository of the hub, also in the cache | `data/train-00000-of-00001.parquet` and other parquet files |
| `save_to_disk` of Hugging Face `datasets` | `data-*.arrow` next to `dataset_info.json`, also in splits |
| webdataset | `.tar` shards, also in subfolders |
| images with captions in text files | `boots.png` and `boots.txt` |
| images alone | all images, without captions (for indexing only) |

The first layout that a folder has is read, all of its splits in the order of their names. To read one split, give its
folder. Hidden folders and links to folders are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unidiff_sdk._internal.files import checked_path, folder_hint, folder_kind
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import DataError

from .shards import IMAGES, find_shards
from .tables import TABLES

__all__ = ["METADATA", "Layout", "find_layout", "is_in_blobs_of", "layout_of"]

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

MAX_FOLDER_DEPTH = 8
"""How deep subfolders are searched."""


@dataclass(frozen=True)
class Layout:
    """What a dataset consists of. One of the three is not empty.

    Attributes:
        tables: tables, each with the folder of its images.
        shards: webdataset shards.
        images: image files.
        sidecars: text files of the same names, which hold the captions of the images: name without extension -> file.
    """

    root: Path
    tables: tuple[tuple[Path, Path], ...] = ()
    shards: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    sidecars: Mapping[Path, Path] = field(default_factory=dict)


def find_layout(path: str | Path, images: str | Path | None = None, *, captions: bool = True) -> Layout:
    """Find out what a path holds.

    Args:
        path: a folder, a table or a shard.
        images: the folder of the images of a table. Default: the folder of the table.
        captions: whether images without any caption are refused.

    Raises:
        DataError: the path does not exist, or holds nothing that can be read.
    """
    root = checked_path(path, DataError)
    if root.is_file() and root.suffix.lower() in (*TABLES, ".arrow"):  # the latter is one file of `save_to_disk`
        return Layout(root, tables=((root, Path(images or root.parent)),))
    if not root.is_dir() and not find_shards(root):
        raise DataError(
            f"{root}: there is no such folder or table ({', '.join(TABLES)}). Give a folder with images and a metadata "
            "table, or with webdataset shards (.tar)."
        )
    if table := _metadata(root, os.listdir(root) if root.is_dir() else ()):
        return Layout(root, tables=((table, Path(images or table.parent)),))
    if shards := find_shards(root):
        return Layout(root, shards=tuple(shards))
    if (kind := folder_kind(root)[0]) and kind != "a dataset":  # its images are not those of a dataset
        raise DataError(f"{root} is not a dataset.{folder_hint(root)}")
    return layout_of(root, root, _walk(root), captions=captions)


def _walk(root: Path) -> Iterator[tuple[Path, Sequence[str]]]:
    for place, folders, names in os.walk(root):
        folder = Path(place)
        is_deep = len(folder.relative_to(root).parts) >= MAX_FOLDER_DEPTH
        folders[:] = [] if is_deep else sorted(name for name in folders if not name.startswith("."))
        yield folder, [name for name in names if name not in METADATA or (folder / name).is_file()]


def layout_of(
    where: str | Path, root: Path, folders: Iterable[tuple[Path, Sequence[str]]], *, captions: bool
) -> Layout:
    """The layout of a dataset whose files are known.

    Args:
        where: the dataset, for messages.
        root: the path that those of the folders start with.
        folders: each folder with the names of its files, in order.
        captions: as for `find_layout`.

    Raises:
        DataError: they hold nothing that can be read.
    """
    parquet: list[Path] = []
    arrow: list[Path] = []
    metadata: list[Path] = []
    shards: list[Path] = []
    images: list[Path] = []
    texts: dict[Path, Path] = {}
    others: list[Path] = []
    for folder, names in folders:
        if table := next((name for name in METADATA if name in names), None):
            metadata.append(folder / table)
        saved = "dataset_info.json" in names or "state.json" in names
        for name in sorted(names):
            file = folder / name
            suffix = file.suffix.lower()
            if suffix == ".parquet" and name not in METADATA:
                parquet.append(file)
            elif suffix == ".arrow" and saved and name.startswith("data-"):
                arrow.append(file)
            elif suffix == ".tar":
                shards.append(file)
            elif suffix[1:] in IMAGES:
                images.append(file)
            elif suffix == ".txt":
                texts[file.with_suffix("")] = file
            else:
                others.append(file)
    for tables in (metadata, parquet, arrow):
        if tables:
            return Layout(root, tables=tuple((table, table.parent) for table in tables))
    if shards:
        return Layout(root, shards=tuple(shards))
    sidecars = texts if any(image.with_suffix("") in texts for image in images) else {}
    if images and (sidecars or not captions):
        if not sidecars:
            _check_ignored_files(where, images, others)
        return Layout(root, images=tuple(images), sidecars=sidecars)
    raise DataError(
        f"{where} has no {', '.join(METADATA[:-1])} or {METADATA[-1]}, no .tar shards and no images with .txt "
        'captions. Add a metadata.jsonl with a line for each image: {"file_name": "boots.png", "text": "red leather '
        'boots", "price": 79.0}'
    )


def _check_ignored_files(where: str | Path, images: Sequence[Path], others: Sequence[Path]) -> None:
    """Refuse or report files that hold captions in a way that is not read."""
    stems = {image.with_suffix("") for image in images}
    for file in others:
        if file.stem.lower() == "metadata" and file.suffix:
            raise DataError(
                f"{file} is not read, and the images would have no captions. Save it as one of {', '.join(METADATA)}."
            )
        if file.suffix.lower() in TABLES:
            advice = f"To read it: unidiff index {file} CATALOG --images {where}"
            if not isinstance(where, Path):
                advice = f"To read it, give {where}/{file.as_posix()} as the source."
            warn(f"{where} is indexed as images without captions, and {file} is not read. {advice}")
            return
        if file.suffix.lower() in (".caption", ".json", ".yaml") and file.with_suffix("") in stems:
            warn(f"{where} is indexed without captions: {file} is not read. Save captions as {file.stem}.txt.")
            return


def _metadata(folder: Path, names: Iterable[str]) -> Path | None:
    present = set(names)
    return next((folder / name for name in METADATA if name in present and (folder / name).is_file()), None)


def is_in_blobs_of(root: Path, file: Path) -> bool:
    """Whether a file is a blob of the hub cache and `root` is a folder of a snapshot of the same repository.

    The cache keeps files as `REPOSITORY/blobs/HASH` and links to them from `REPOSITORY/snapshots/REVISION/…`.
    """
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    return any(file.parent == snapshot.parent / "blobs" for snapshot in snapshots)
