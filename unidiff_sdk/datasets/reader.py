"""Read a catalog: images with captions and columns, from a folder with a table or from webdataset shards.

The folder's convention is Hugging Face's `imagefolder`: `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, in
which `file_name` is the image's path inside the folder and `text` its caption; every other column is payload. A folder
of `.tar` files without such a table, or one `.tar`, is read as shards (`datasets.shards`).
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidiff_sdk.errors import DataError

from .parquet import open_parquet
from .shards import Member, Sample, count_samples, find_shards, read_shards

__all__ = ["TABLES", "InvalidRow", "Row", "count_rows", "read_catalog"]

TABLES = (".jsonl", ".csv", ".parquet")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One product: an image that exists inside the folder or a shard of it, its caption, its other columns."""

    source: Path | Member
    text: str
    payload: dict[str, Any] = field(default_factory=dict)
    line: int = 0  # in the metadata file, from 1; the header of a csv is line 1; of shards, the sample's number

    @property
    def name(self) -> str:
        """The image file's name, for messages."""
        return self.source.name

    def image(self) -> Path | bytes:
        """What `load_image` takes: the file's path, or its bytes where it lies in a shard (may raise DataError)."""
        return self.source.read() if isinstance(self.source, Member) else self.source


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used, and why."""

    line: int
    file_name: str
    reason: str
    hides_later_rows: bool = False  # it stands for all that would have followed

    def __str__(self) -> str:
        return f"line {self.line}{f' ({self.file_name})' if self.file_name else ''}: {self.reason}"


def read_catalog(
    path: str | Path,
    *,
    images: str | Path | None = None,
    strict: bool = False,
    on_error: Callable[[InvalidRow], None] | None = None,
) -> Iterator[Row]:
    """Read the rows of a catalog, one at a time and in order.

    Args:
        path: a folder that holds images and a metadata file, a folder of `.tar` shards, one shard, or a table by
            itself: a `.jsonl`, `.csv` or `.parquet` file of any name.
        images: the folder that the paths of a table start from, and must not lead out of. Default: the table's own.
        strict: raise at the first bad row instead of passing it over.
        on_error: called with each bad row; without it, bad rows are logged as warnings.

    Raises:
        DataError: the folder or its metadata file is missing or unreadable; in strict mode, a bad row.
    """
    metadata, shards = _find(path)
    where = metadata or Path(path)
    if images is not None and not (metadata and Path(images).is_dir()):
        raise DataError(f"images={str(images)!r}: there is no such folder" if metadata else f"{path} is no table")
    rows = _read_metadata(metadata, Path(images or metadata.parent)) if metadata else _read_shards(shards)
    return _checked(where, rows, strict, on_error or (lambda bad: _log.warning("%s, %s", where, bad)))


def count_rows(path: str | Path) -> int:
    """How many rows a catalog has, good and bad. Raises DataError as `read_catalog` does."""
    metadata, shards = _find(path)
    if metadata is None:
        return count_samples(shards)
    if metadata.suffix.lower() == ".parquet":
        return int(open_parquet(metadata).metadata.num_rows)
    return sum(1 for _ in _READERS[metadata.suffix.lower()](metadata))


def _find(path: str | Path) -> tuple[Path | None, list[Path]]:
    """The metadata file, or without one the shards."""
    root = Path(path)
    if root.is_file() and root.suffix.lower() in TABLES:
        return root, []
    if not root.is_dir() and not find_shards(root):
        raise DataError(
            f"{root}: there is no such folder, or table (.jsonl, .csv, .parquet). A catalog is a folder of images "
            "with a metadata file, or of webdataset shards (.tar)."
        )
    for name in METADATA:
        if (root / name).is_file():
            return root / name, []
    if shards := find_shards(root):
        return None, shards
    raise DataError(
        f"{root} has no {', '.join(METADATA[:-1])} or {METADATA[-1]}, and no .tar shards. Each row of the metadata "
        'names an image and its caption: {"file_name": "boots.png", "text": "red leather boots", "price": 79.0}'
    )


def _checked(
    where: Path, rows: Iterator[Row | InvalidRow], strict: bool, on_error: Callable[[InvalidRow], None]
) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Row):
            yield row
        elif strict:
            raise DataError(f"{where}, {row}")
        else:
            on_error(row)


def _read_metadata(metadata: Path, images: Path) -> Iterator[Row | InvalidRow]:
    root = images.resolve()
    for line, columns in _READERS[metadata.suffix.lower()](metadata):
        yield InvalidRow(line, "", columns) if isinstance(columns, str) else _check(root, line, columns)


def _check(root: Path, line: int, columns: dict[str, Any]) -> Row | InvalidRow:
    text, payload = _text_and_payload(columns)
    name = payload.pop("file_name", None)
    if not isinstance(name, str) or not name.strip():
        return InvalidRow(line, "", "it has no file_name")
    if text is None:
        return InvalidRow(line, name, "it has no caption (text)")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return InvalidRow(line, name, "the path leads out of the catalog's folder")
        if not path.is_file():
            return InvalidRow(line, name, "there is no such image file")
    except (OSError, ValueError) as error:  # a name with a null byte, or too long for the file system
        return InvalidRow(line, name[:80], f"this is not a path ({error})")
    return Row(path, text, payload, line)


def _read_shards(shards: list[Path]) -> Iterator[Row | InvalidRow]:
    for number, sample in enumerate(read_shards(shards), start=1):
        yield _check_sample(number, sample)


def _check_sample(number: int, sample: Sample) -> Row | InvalidRow:
    text, payload = _text_and_payload(sample.columns)
    if sample.image is None:
        return InvalidRow(number, sample.name, sample.problem, sample.hides_later_rows)
    if text is None:
        return InvalidRow(number, sample.name, "it has no caption (.txt, or text in its .json)")
    return Row(sample.image, text, payload, number)


def _text_and_payload(columns: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The caption, None where there is none, and the other columns that are not missing."""
    payload = {key: value for key, value in columns.items() if not _is_missing(value)}
    text = payload.pop("text", None)
    return text.strip() or None if isinstance(text, str) else None, payload


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# ------------------------------------------------------------------------------------------------ formats
# Each yields (line, columns), or (line, what is wrong with it).

_Rows = Iterator[tuple[int, dict[str, Any] | str]]


def _read_jsonl(path: Path) -> _Rows:
    for line, content in _lines(path):
        if not content.strip():
            continue
        try:
            columns = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            yield line, f"this is not JSON ({error})"
            continue
        yield line, columns if isinstance(columns, dict) else "this is not a JSON object"


def _read_csv(path: Path) -> _Rows:
    """Two passes: a column is numeric or boolean only if all of its cells are."""
    converters: dict[str, Callable[[str], Any]] = {}
    for _, cells in _read_cells(path):
        if isinstance(cells, dict):
            for column, cell in cells.items():
                converters[column] = _narrowest(cell, converters.get(column, _KINDS[0]))
    for line, cells in _read_cells(path):
        if isinstance(cells, dict):
            yield line, {c: cell if c in ("file_name", "text") else converters[c](cell) for c, cell in cells.items()}
        else:
            yield line, cells


def _read_cells(path: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    reader = csv.reader(content for _, content in _lines(path))
    try:
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                yield reader.line_num, f"it has {len(cells)} cells where the header has {len(header)}"
            else:
                yield reader.line_num, {column: cell for column, cell in zip(header, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _to_bool(cell: str) -> bool:
    return {"true": True, "false": False}[cell.lower()]


def _to_int(cell: str) -> int:
    if str(int(cell)) != cell:  # an article number such as 00123 must not lose its zeros
        raise ValueError(cell)
    return int(cell)


def _to_float(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value) or (cell[0] == "0" and cell[1:2].isdigit()):
        raise ValueError(cell)
    return value


_KINDS: tuple[Callable[[str], Any], ...] = (_to_bool, _to_int, _to_float, str)


def _narrowest(cell: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The first kind, from `kind` on, that can hold this cell."""
    for candidate in _KINDS[_KINDS.index(kind) :]:
        try:
            candidate(cell)
        except (ValueError, KeyError):
            continue
        return candidate
    return str


def _read_parquet(path: Path) -> _Rows:
    line = 0
    for batch in open_parquet(path).iter_batches(batch_size=1024):
        for columns in batch.to_pylist():
            line += 1
            yield line, columns


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
