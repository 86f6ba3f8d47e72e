"""Reading parquet and Arrow files within limits. pyarrow is an optional dependency and is imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk.errors import DataError

__all__ = ["count_parquet_rows", "open_parquet", "parquet_errors", "pyarrow_parquet", "read_arrow", "read_parquet"]

BATCH_MEMORY = 32 << 20
"""The memory in bytes that a batch of average rows takes."""

MAX_BATCH_ROWS = 1024

MAX_COLUMN_CHUNK = 1 << 30
"""The largest uncompressed column of one row group in bytes. A file of kilobytes can claim gigabytes."""

MAX_ROW = 64 << 20
"""The largest row in bytes of its strings and binary values. Parquet stores a value once for many rows."""

_BUILT_IN = (OSError, ValueError, TypeError, LookupError, ArithmeticError)

CheckHeader = Callable[[Sequence[str]], None]
Rows = Iterator[tuple[int, dict[str, Any] | str]]


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Convert the errors of pyarrow on damaged files to DataErrors. It raises many built-in exceptions, too."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (*_BUILT_IN, MemoryError, RecursionError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def pyarrow_parquet(purpose: str) -> Any:
    """Return the module `pyarrow.parquet`. Raises DataError if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{purpose}: parquet needs pyarrow. Run: pip install 'unidiff-sdk[parquet]'") from error
    return pyarrow.parquet


def open_parquet(path: Path, *, keep_dictionaries: bool = False) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`.

    Args:
        path: the file.
        keep_dictionaries: whether values that are stored once for many rows take memory once. Their columns then have
            dictionary types.

    Raises:
        DataError: the file cannot be read, or claims more memory than `MAX_COLUMN_CHUNK`.
    """
    parquet = pyarrow_parquet(str(path))
    open_regular_file(path, DataError).close()
    with parquet_errors(path):
        file = parquet.ParquetFile(path)
        metadata = file.metadata
        in_dictionaries = set()
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(number)
                if chunk.total_uncompressed_size > MAX_COLUMN_CHUNK:
                    raise DataError(
                        f"{path}: the column {chunk.path_in_schema} takes {chunk.total_uncompressed_size:,} bytes in a "
                        f"row group; at most {MAX_COLUMN_CHUNK:,} are allowed. Write the file with smaller row groups."
                    )
                if chunk.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in name for name in chunk.encodings):
                    in_dictionaries.add(chunk.path_in_schema)
        return parquet.ParquetFile(path, read_dictionary=sorted(in_dictionaries)) if keep_dictionaries else file


def count_parquet_rows(path: Path) -> int:
    """The number of rows. Raises DataError."""
    return int(open_parquet(path).metadata.num_rows)


def read_parquet(path: Path, check_header: CheckHeader) -> Rows:
    """Iterate over the rows as (number from 1, columns), or (number, what is wrong). Raises DataError."""
    file = open_parquet(path, keep_dictionaries=True)
    check_header(file.schema_arrow.names)
    with parquet_errors(path):
        yield from _rows(file.iter_batches(batch_size=_batch_rows(file.metadata)))


def read_arrow(path: Path, check_header: CheckHeader) -> Rows:
    """The same for a stream of Arrow, which is what `save_to_disk` of Hugging Face `datasets` writes."""
    pyarrow_parquet(str(path))
    import pyarrow as pa

    open_regular_file(path, DataError).close()
    with parquet_errors(path), pa.memory_map(str(path)) as file:
        stream = pa.ipc.open_stream(file)
        check_header(stream.schema.names)
        yield from _rows(stream)


def _rows(batches: Iterable[Any]) -> Rows:
    number = 0
    for batch in batches:
        columns = [_as_python_can_hold_it(column) for column in batch.columns]
        for row in range(batch.num_rows):
            number += 1
            yield number, _row(batch.schema.names, columns, row)


def _batch_rows(metadata: Any) -> int:
    """So many rows that a batch of average rows takes `BATCH_MEMORY`."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    return int(max(1, min(MAX_BATCH_ROWS, BATCH_MEMORY // max(1, largest))))


def _as_python_can_hold_it(column: Any) -> Any:
    """Nanoseconds, which `datetime` does not have, become values of numpy, and in a time of day a string."""
    import pyarrow as pa

    if (pa.types.is_timestamp(column.type) or pa.types.is_duration(column.type)) and column.type.unit == "ns":
        return column.to_numpy(zero_copy_only=False)
    if pa.types.is_time64(column.type) and column.type.unit == "ns":
        return column.cast(pa.string())
    return column


def _row(names: Sequence[str], columns: Sequence[Any], row: int) -> dict[str, Any] | str:
    """One row, or what is wrong with it."""
    values = {}
    size = 0
    for name, column in zip(names, columns, strict=True):
        try:
            value = column[row]
            value = value.as_py() if hasattr(value, "as_py") else value
        except _BUILT_IN as error:
            return f"the column {name} holds a value that cannot be read ({error})"
        size += _size(value)
        if size > MAX_ROW:
            return f"the row has {size:,} bytes; at most {MAX_ROW:,} are allowed"
        values[name] = value
    return values


def _size(value: Any) -> int:
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(_size(member) for member in value.values())
        case list():
            return sum(_size(member) for member in value)
    return 8
