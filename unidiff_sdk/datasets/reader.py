"""Read a dataset: images with captions and columns, from a folder with a metadata table or from webdataset shards.

The folder follows the `imagefolder` convention of Hugging Face:

    products/
        metadata.jsonl          or metadata.csv, or metadata.parquet
        boots.png
        shirts/0001.jpg

    {"file_name": "boots.png", "text": "red leather boots", "price": 79.0, "tags": ["new", "sale"]}
    {"file_name": "shirts/0001.jpg", "text": "a striped shirt", "id": "S-1", "price": 25}

`file_name` is the path of the image in the folder and `text` its caption. Both are required. `id` is optional. Every
other column becomes payload. Null, NaN and empty csv cells are left out. A csv column becomes numeric or boolean only
if all of its cells are, so an article number such as 00123 stays a string. Files are UTF-8.

The table can also be a file of any name (`spring.csv`) with its images in another folder. A folder of `.tar` files
without a table, or a single `.tar`, is read as webdataset shards (`shards` has their format).
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
    """One valid row of a dataset.

    Attributes:
        source: the image: an existing file in the folder, or a member of a shard.
        text: the caption.
        payload: the other columns.
        line: the line in the table, from 1 (the header of a csv is line 1), or the number of the sample in the shards.
    """

    source: Path | Member
    text: str
    payload: dict[str, Any] = field(default_factory=dict)
    line: int = 0

    @property
    def name(self) -> str:
        """The name of the image file, for messages."""
        return self.source.name

    def image(self) -> Path | bytes:
        """The image for `load_image`: a path, or bytes from a shard. Raises DataError if the shard cannot be read."""
        return self.source.read() if isinstance(self.source, Member) else self.source


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used.

    Attributes:
        line: as `Row.line`.
        file_name: the image, as far as it is known.
        reason: what is wrong.
        hides_later_rows: whether the rows after it could not be read either, because a shard is damaged.
    """

    line: int
    file_name: str
    reason: str
    hides_later_rows: bool = False

    def __str__(self) -> str:
        return f"line {self.line}{f' ({self.file_name})' if self.file_name else ''}: {self.reason}"


def read_catalog(
    path: str | Path,
    *,
    images: str | Path | None = None,
    strict: bool = False,
    on_error: Callable[[InvalidRow], None] | None = None,
) -> Iterator[Row]:
    """Iterate over the valid rows of a dataset, in order.

    Args:
        path: a folder with images and a metadata table, a folder of `.tar` shards, one shard, or a table (a `.jsonl`,
            `.csv` or `.parquet` file of any name).
        images: the folder that the paths in a table are relative to and must stay inside. Default: the folder of the
            table.
        strict: raise DataError at the first invalid row instead of skipping it.
        on_error: called with each invalid row. By default, invalid rows are logged as warnings.

    Raises:
        DataError: the folder or its table is missing or unreadable, or in strict mode a row is invalid.
    """
    metadata, shards = _find(path)
    where = metadata or Path(path)
    if images is not None and not (metadata and Path(images).is_dir()):
        if metadata:
            raise DataError(f"images={str(images)!r}: there is no such folder. Give the folder with the images.")
        raise DataError(f"images= needs a table ({', '.join(TABLES)}), and {path} is not one. Omit images=.")
    rows = _read_metadata(metadata, Path(images or metadata.parent)) if metadata else _read_shards(shards)
    return _checked(where, rows, strict, on_error or (lambda invalid: _log.warning("%s, %s: skipped", where, invalid)))


def count_rows(path: str | Path) -> int:
    """Count the rows of a dataset, valid and invalid. Raises DataError as `read_catalog` does."""
    metadata, shards = _find(path)
    if metadata is None:
        return count_samples(shards)
    if metadata.suffix.lower() == ".parquet":
        return int(open_parquet(metadata).metadata.num_rows)
    return sum(1 for _ in _READERS[metadata.suffix.lower()](metadata))


def _find(path: str | Path) -> tuple[Path | None, list[Path]]:
    """The table, or else the shards."""
    root = Path(path)
    if root.is_file() and root.suffix.lower() in TABLES:
        return root, []
    if not root.is_dir() and not find_shards(root):
        raise DataError(
            f"{root}: there is no such folder or table ({', '.join(TABLES)}). Give a folder with images and a metadata "
            "table, or with webdataset shards (.tar)."
        )
    for name in METADATA:
        if (root / name).is_file():
            return root / name, []
    if shards := find_shards(root):
        return None, shards
    raise DataError(
        f"{root} has no {', '.join(METADATA[:-1])} or {METADATA[-1]}, and no .tar shards. Add a metadata.jsonl with a "
        'line for each image: {"file_name": "boots.png", "text": "red leather boots", "price": 79.0}'
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
        return InvalidRow(line, "", "file_name is missing")
    if text is None:
        return InvalidRow(line, name, "the caption (text) is missing")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return InvalidRow(line, name, "the path leads out of the folder of the images")
        if not path.is_file():
            return InvalidRow(line, name, "there is no such image file")
    except (OSError, ValueError) as error:  # a name with a null byte, or one too long for the file system
        return InvalidRow(line, name[:80], f"file_name is not a valid path ({error})")
    return Row(path, text, payload, line)


def _read_shards(shards: list[Path]) -> Iterator[Row | InvalidRow]:
    for number, sample in enumerate(read_shards(shards), start=1):
        yield _check_sample(number, sample)


def _check_sample(number: int, sample: Sample) -> Row | InvalidRow:
    text, payload = _text_and_payload(sample.columns)
    if sample.image is None:
        return InvalidRow(number, sample.name, sample.problem, sample.hides_later_rows)
    if text is None:
        return InvalidRow(number, sample.name, "the caption is missing (.txt, or text in the .json)")
    return Row(sample.image, text, payload, number)


def _text_and_payload(columns: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The caption, or None, and the other columns that have a value."""
    payload = {key: value for key, value in columns.items() if not _is_missing(value)}
    text = payload.pop("text", None)
    return text.strip() or None if isinstance(text, str) else None, payload


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# ------------------------------------------------------------------------------------------------ formats
# Each reader yields (line, columns), or (line, error message).

_Rows = Iterator[tuple[int, dict[str, Any] | str]]


def _read_jsonl(path: Path) -> _Rows:
    for line, content in _lines(path):
        if not content.strip():
            continue
        try:
            columns = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            yield line, f"the line is not valid JSON ({error})"
            continue
        yield line, columns if isinstance(columns, dict) else "the line is not a JSON object"


def _read_csv(path: Path) -> _Rows:
    """Read twice: the first pass finds out which columns are numeric or boolean in all of their cells."""
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
                yield reader.line_num, f"the row has {len(cells)} cells and the header has {len(header)}"
            else:
                yield reader.line_num, {column: cell for column, cell in zip(header, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _to_bool(cell: str) -> bool:
    return {"true": True, "false": False}[cell.lower()]


def _to_int(cell: str) -> int:
    if str(int(cell)) != cell:  # an article number such as 00123 must keep its zeros
        raise ValueError(cell)
    return int(cell)


def _to_float(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value) or (cell[0] == "0" and cell[1:2].isdigit()):
        raise ValueError(cell)
    return value


_KINDS: tuple[Callable[[str], Any], ...] = (_to_bool, _to_int, _to_float, str)


def _narrowest(cell: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The first kind, starting at `kind`, that can represent the cell."""
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
        raise DataError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
