"""Read tables in JSON Lines, CSV and Parquet row by row, within limits."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import DataError

from .parquet import ARCHIVE_KEY, count_parquet_rows, open_parquet, read_arrow, read_parquet
from .values import CellTypes

__all__ = ["MAX_LINE", "TABLES", "count_table_rows", "read_lines", "read_table"]

TABLES = (".jsonl", ".csv", ".parquet")

MAX_LINE = 16 << 20
"""The longest line of a table in characters. A file without line ends would otherwise be read into memory whole."""

TableRows = Iterator[tuple[int, dict[str, Any] | str]]
"""Rows as (line, columns), or (line, what is wrong)."""

CheckHeader = Callable[[Sequence[str]], None]


def read_table(
    path: Path, check_header: CheckHeader, kinds: Mapping[str, str], strings: Collection[str] = ()
) -> TableRows:
    """Iterate over the rows of a table.

    Args:
        path: a `.jsonl`, `.csv` or `.parquet` file, or an `.arrow` file of Hugging Face `datasets`.
        check_header: called with the names of the columns before the first row, if the format has a header.
        kinds, strings: as for `values.CellTypes`.

    Raises:
        DataError: the file cannot be read, or is no table of its format.
    """
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return _read_csv(path, check_header, CellTypes(kinds, strings))
        case ".arrow":
            return read_arrow(path, check_header)
        case _:
            rows = read_parquet(path, check_header)
            return _archived(rows) if ARCHIVE_KEY in (open_parquet(path).schema_arrow.metadata or {}) else rows


def count_table_rows(path: Path) -> int:
    """Count the rows of a table, valid and invalid. Raises DataError."""
    match path.suffix.lower():
        case ".jsonl":
            return sum(1 for _, content in read_lines(path) if content is None or content.strip())
        case ".csv":
            return sum(1 for _ in _read_cells(path, lambda header: None))
        case ".arrow":
            return sum(1 for _ in read_arrow(path, lambda header: None))
        case _:
            return count_parquet_rows(path)


def _archived(rows: TableRows) -> TableRows:
    """The rows of an archive (`catalog.archive`) as they were indexed: 7 and "7" are different ids.

    Embedding files have the column `uri` instead of `image`.
    """
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        try:
            payload = parse_json(row["payload"], "the payload")
            image = "uri" if "uri" in row else "image"
            if repeated := payload.keys() & {image, "image", "file_name", "id", "text"}:
                raise DataError(f"the payload has a column {min(repeated)}. Use unidiff restore.")
            id = int(row["id"]) if row["id_is_int"] else row["id"]
            yield number, {image: row[image], "text": row["text"], "id": id, **payload}
        except (DataError, KeyError, TypeError, ValueError) as error:
            yield number, f"the row of the archive is damaged: {error}"


def _read_jsonl(path: Path) -> TableRows:
    for line, content in read_lines(path):
        if content is None:
            yield line, f"the line has more than {MAX_LINE:,} characters"
        elif content.strip():
            try:
                yield line, parse_json(content, "the line", nan=True, unique_keys=True)
            except DataError as error:
                yield line, str(error)


def _read_csv(path: Path, check_header: CheckHeader, types: CellTypes) -> TableRows:
    """Read twice: the first pass finds the type of each column."""
    for line, cells in _read_cells(path, check_header):
        if isinstance(cells, dict):
            types.observe(line, cells)
    types.warn_about_mixed_columns(str(path))
    for line, cells in _read_cells(path, check_header):
        if isinstance(cells, str):
            yield line, cells
            continue
        yield line, {column: types.convert(column, cell) for column, cell in cells.items()}


def _read_cells(path: Path, check_header: CheckHeader) -> Iterator[tuple[int, dict[str, str] | str]]:
    def contents() -> Iterator[str]:
        for line, content in read_lines(path):
            if content is None:
                raise DataError(f"{path}, line {line}: the line has more than {MAX_LINE:,} characters")
            yield content

    lines = contents()
    first = next(lines, "")
    # Tabs are unambiguous. A semicolon goes with decimal commas, which would be read as text.
    tabs = "\t" in first and "," not in first
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # of this process; by default 131,072 characters
    # Not strict, an open quote would take all rows after it into one cell.
    reader = csv.reader(
        _chain(first, lines), delimiter="\t" if tabs else ",", skipinitialspace=", " in first, strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_csv_header(path, header, check_header)
        while (cells := _next_row(reader)) is not None:
            if isinstance(cells, str):
                yield reader.line_num, cells
            elif not cells:
                continue
            elif len(cells) != len(header):
                yield reader.line_num, f"the row has {len(cells)} cells and the header has {len(header)}"
            else:
                yield reader.line_num, {column: cell for column, cell in zip(header, cells, strict=True) if cell != ""}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _next_row(reader: Any) -> list[str] | str | None:
    """The cells of the next row, what is wrong with it, or None after the last one."""
    start = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        return f"lines {start} to {reader.line_num} are not valid CSV ({error}). Double the quotes inside of a cell."


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _check_csv_header(path: Path, header: list[str], check_header: CheckHeader) -> None:
    if len(header) == 1 and ";" in header[0]:
        raise DataError(
            f'{path}: the columns are separated by ";". Save the file with "," between columns and "." in decimals.'
        )
    for number, name in enumerate(header, start=1):
        if not name:
            raise DataError(
                f"{path}: column {number} has no name. Name it in the first line, or remove it (pandas writes its row "
                "numbers there: use index=False)."
            )
    if repeated := next((name for name in header if header.count(name) > 1), None):
        raise DataError(f"{path}: there are several columns {repeated!r}. Rename all but one.")
    check_header(header)


def read_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """The lines of a file; None for one that is too long."""
    try:
        with io.TextIOWrapper(open_regular_file(path, DataError), encoding="utf-8-sig", newline="") as file:
            line = 0
            while content := file.readline(MAX_LINE):
                line += 1
                if len(content) < MAX_LINE or content.endswith(("\n", "\r")):
                    yield line, content
                    continue
                while content and not content.endswith(("\n", "\r")):
                    content = file.readline(MAX_LINE)
                yield line, None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
