"""Reading parquet and Arrow files within limits. pyarrow is an optional dependency and is imported on first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk.errors import DataError

__all__ = [
    "ARCHIVE_KEY",
    "count_parquet_rows",
    "open_parquet",
    "parquet_errors",
    "pyarrow_parquet",
    "read_arrow",
    "read_parquet",
    "value_sizes",
]

ARCHIVE_KEY = b"unidiff"
"""The key of the metadata of an archive, which `Catalog.export` writes."""

BATCH_MEMORY = 32 << 20
"""The memory in bytes that a batch of average rows takes."""

MAX_BATCH_ROWS = 1024

MAX_COLUMN_CHUNK = 1 << 30
"""The largest uncompressed column of one row group in bytes. Reading it takes up to five times this memory."""

MAX_COMPRESSED_CHUNK = 256 << 20
"""The same for a column that takes less than a quarter of it on disk. A file of kilobytes can claim gigabytes."""

VALUE_SIZE = 8
"""The memory in bytes that a value takes at least. Parquet stores millions of equal values in a few bytes."""

MAX_ROW = 64 << 20
"""The largest row in bytes of its strings, binary values and list elements. Parquet stores a value once for many."""

MAX_TABLE = 16 << 30
"""The bytes that all rows of a table may take one after the other, plus `MAX_EXPANSION` times the size of the file."""

MAX_EXPANSION = 100

MAX_PAGES = 1_000_000
"""The most pages of a column of one row group. Writers use pages of about a megabyte."""

MAX_PAGE_HEADER = 64 << 10
"""The largest header of a page in bytes. It holds the least and greatest value, which writers shorten."""

MAX_DICTIONARY = 64 << 20
"""The largest dictionary in bytes that is searched for its largest value. Writers use a megabyte."""

MAX_FOOTER = 64 << 20
"""The largest metadata of a file in bytes."""

MAX_THRIFT_DEPTH = 12

# Fields of FileMetaData and ColumnMetaData, and values of them.
ROW_GROUPS = 4
TYPE, NAME, CODEC, VALUES, UNCOMPRESSED, COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 1, 3, 4, 5, 6, 7, 9, 11
BYTE_ARRAY = 6
_CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}

_DICTIONARY_ENCODINGS = (2, 8)  # PLAIN_DICTIONARY and RLE_DICTIONARY

_BUILT_IN = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)

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


def open_parquet(path: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: the file cannot be read, or claims more memory than `MAX_COLUMN_CHUNK`.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[Any, list[_Column]]:
    """A checked file and its columns, once for each row group. Nothing is decompressed but dictionaries."""
    parquet = pyarrow_parquet(str(path))
    with parquet_errors(path), open_regular_file(path, DataError) as content:
        file = parquet.ParquetFile(path)
        columns = []
        # Not from file.metadata: pyarrow ends the process if a column in it is damaged.
        for group in _footer(content)[ROW_GROUPS]:
            for number, chunk in enumerate(group[1]):
                is_list = file.schema.column(number).max_repetition_level > 0
                columns.append(_read_pages(chunk[3], content, is_list))
                columns[-1].check(path, min(chunk[3][COMPRESSED], path.stat().st_size))
        return file, columns


def _footer(content: BinaryIO) -> dict[int, Any]:
    """The metadata of a parquet file, which precedes its last eight bytes: its length, and "PAR1"."""
    size = content.seek(0, os.SEEK_END)
    content.seek(max(0, size - 8))
    length = int.from_bytes(content.read(4), "little")
    if length > min(MAX_FOOTER, size - 8):
        raise ValueError(f"the footer has {length:,} bytes; at most {MAX_FOOTER:,} are allowed")
    content.seek(size - 8 - length)
    return _Thrift(content.read(length)).struct()


@dataclass(frozen=True)
class _Column:
    """What reading a column of one row group takes. The footer can misstate it, so it is taken from the pages, too.

    Attributes:
        name: its path in the schema.
        is_list: whether a row can have several values.
        size: uncompressed bytes.
        values: the number of values, including nulls.
        repeated: how many of them refer to a dictionary.
        largest: the bytes of the largest string or binary value in the dictionary.
    """

    name: str
    is_list: bool
    size: int
    values: int
    repeated: int
    largest: int

    @property
    def is_nested(self) -> bool:
        """Whether the column is a part of another one. Only other columns can be read without repeating values."""
        return "." in self.name

    def check(self, path: Path, on_disk: int) -> None:
        """Raise DataError if the column takes too much memory."""
        # Rows are read a few at a time, but all values of a list at once.
        size = max(self.size, self.values * VALUE_SIZE + self.repeated * self.largest) if self.is_list else self.size
        limit = min(MAX_COLUMN_CHUNK, max(MAX_COMPRESSED_CHUNK, 4 * on_disk))
        if size > limit:
            raise DataError(
                f"{path}: the column {self.name} takes {size:,} bytes in a row group, and {on_disk:,} on disk; "
                f"at most {limit:,} are allowed. Write the file with smaller row groups."
            )


def _read_pages(chunk: dict[int, Any], content: BinaryIO, is_list: bool) -> _Column:
    """Read the headers of the pages of a column in one row group, and the dictionary."""
    name = ".".join(part.decode() for part in chunk[NAME])
    if min(chunk[VALUES], chunk[UNCOMPRESSED], chunk[COMPRESSED], chunk[DATA_PAGE]) < 0:
        raise ValueError(f"the column {name} has a negative size")
    start = min(chunk[DATA_PAGE], chunk.get(DICTIONARY_PAGE) or chunk[DATA_PAGE])
    position, size, values, repeated, largest = start, 0, 0, 0, 0
    for _ in range(MAX_PAGES):
        if position >= start + chunk[COMPRESSED]:
            size, values = max(size, chunk[UNCOMPRESSED]), max(values, chunk[VALUES])
            return _Column(name, is_list, size, values, repeated, largest)
        content.seek(position)
        header = _Thrift(content.read(MAX_PAGE_HEADER))
        page = header.struct()
        if page[2] < 0 or page[3] < 0:
            raise ValueError(f"a page of the column {name} has a negative size")
        position += header.position
        size += page[2]
        for data, encoding in ((page.get(5), 2), (page.get(8), 4)):  # data pages of version 1 and 2
            values += data[1] if data else 0
            repeated += data[1] if data and data[encoding] in _DICTIONARY_ENCODINGS else 0
        if 7 in page and chunk[TYPE] == BYTE_ARRAY:
            largest = _largest_value(chunk[CODEC], content, position, page)
        position += page[3]
    raise ValueError(f"the column {name} has more than {MAX_PAGES:,} pages in a row group")


def _largest_value(codec: int, content: BinaryIO, position: int, page: dict[int, Any]) -> int:
    """The bytes of the largest value in the page of a dictionary: each has 4 bytes of length before it."""
    import pyarrow as pa

    if page[2] > MAX_DICTIONARY or codec not in _CODECS:
        return int(page[2])
    content.seek(position)
    values = content.read(page[3])
    if _CODECS[codec]:
        values = pa.Codec(_CODECS[codec]).decompress(values, page[2], asbytes=True)
    largest = place = 0
    while place < len(values):
        length = int.from_bytes(values[place : place + 4], "little")
        largest, place = max(largest, length), place + 4 + length
    return largest


class _Thrift:
    """A structure of Thrift's compact protocol, as a dictionary from field number to value: a footer or a page header.

    Fields of PageHeader: 2 is the uncompressed and 3 the compressed size, 7 the header of a dictionary, 5 and 8 those
    of data pages. Their field 1 is the number of values, and field 2 or 4 the encoding. https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                self.position += 8
                return None
            case 8:
                length = self._varint()
                self.position += length
                return self.content[self.position - length : self.position]
            case 9 | 10 if depth < MAX_THRIFT_DEPTH:
                head = self._byte()
                length = head >> 4 if head >> 4 < 15 else self._varint()
                return [self._value(head & 15, depth + 1) for _ in range(min(length, len(self.content)))]
            case 12 if depth < MAX_THRIFT_DEPTH:
                return self.struct(depth + 1)
        raise ValueError(f"the metadata have a field of type {kind}")

    def _byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)  # zigzag


def count_parquet_rows(path: Path) -> int:
    """The number of rows. Raises DataError."""
    return int(open_parquet(path).metadata.num_rows)


def read_parquet(path: Path, check_header: CheckHeader) -> Rows:
    """Iterate over the rows as (number from 1, columns), or (number, what is wrong). Raises DataError."""
    file, columns = _open(path)
    check_header(file.schema_arrow.names)
    with parquet_errors(path):
        # Values of these columns take memory once, although many rows refer to them.
        dictionaries = sorted({column.name for column in columns if column.repeated and not column.is_nested})
        file = pyarrow_parquet(str(path)).ParquetFile(
            path, read_dictionary=dictionaries, page_checksum_verification=True
        )
        batches = file.iter_batches(batch_size=_batch_rows(file.metadata, columns))
        yield from _rows(path, file.schema_arrow.names, batches)


def read_arrow(path: Path, check_header: CheckHeader) -> Rows:
    """The same for a stream of Arrow, which is what `save_to_disk` of Hugging Face `datasets` writes."""
    pyarrow_parquet(str(path))
    import pyarrow as pa

    open_regular_file(path, DataError).close()
    with parquet_errors(path), pa.memory_map(str(path)) as file:
        if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(file)):
            raise DataError(f"{path}: compressed Arrow data can claim any size and are not supported. Save as parquet.")
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        check_header(stream.schema.names)
        yield from _rows(path, stream.schema.names, stream)


def _is_compressed(message: Any) -> bool:
    """Whether the buffers of an Arrow message are compressed. pyarrow does not report it before it decompresses them.

    The metadata is a flatbuffer: Message {version, header type, header, …}, whose header is RecordBatch {length, nodes,
    buffers, compression} or DictionaryBatch {id, RecordBatch, …}.
    """
    metadata = message.metadata.to_pybytes()

    def follow(position: int) -> int:
        return position + int.from_bytes(metadata[position : position + 4], "little")

    def member(table: int, index: int) -> int | None:
        vtable = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
        entry = 4 + 2 * index
        if entry >= int.from_bytes(metadata[vtable : vtable + 2], "little"):
            return None
        offset = int.from_bytes(metadata[vtable + entry : vtable + entry + 2], "little")
        return table + offset if offset else None

    header = member(follow(0), 2)
    if message.type == "dictionary" and header is not None:
        header = member(follow(header), 1)
    return message.type != "schema" and header is not None and member(follow(header), 3) is not None


def _rows(path: Path, names: Sequence[str], batches: Iterable[Any]) -> Rows:
    number = total = 0
    limit = MAX_TABLE + MAX_EXPANSION * path.stat().st_size
    for batch in batches:
        batch.validate(full=True)  # offsets and indices of a damaged file point outside of its buffers: a crash
        columns = [(name, _as_python_can_hold_it(column)) for name, column in zip(names, batch.columns, strict=True)]
        sizes = sum((value_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
        for row, size in enumerate(sizes.tolist()):
            number += 1
            total += size
            if total > limit:
                raise DataError(
                    f"{path}: the first {number:,} rows take {total:,} bytes; at most {limit:,} are allowed for a file "
                    "of this size. Parquet stores equal values once: leave out the column that repeats large ones."
                )
            if size > MAX_ROW:
                yield number, f"the row takes more than {MAX_ROW:,} bytes, which is the most that is allowed"
            else:
                yield number, _row(columns, row)


def _batch_rows(metadata: Any, columns: Sequence[_Column]) -> int:
    """So many rows that a batch of average rows takes `BATCH_MEMORY`, and eight times that if all values are large."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    average = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    repeated = max((column.largest for column in columns if column.is_nested and column.repeated), default=0)
    return int(max(1, min(MAX_BATCH_ROWS, BATCH_MEMORY // max(1, average, repeated // 8))))


def _as_python_can_hold_it(column: Any) -> Any:
    """Nanoseconds, which `datetime` does not have, become values of numpy, and in a time of day a string."""
    import pyarrow as pa

    if (pa.types.is_timestamp(column.type) or pa.types.is_duration(column.type)) and column.type.unit == "ns":
        return column.to_numpy(zero_copy_only=False)
    if pa.types.is_time64(column.type) and column.type.unit == "ns":
        return column.cast(pa.string())
    return column


def _row(columns: Sequence[tuple[str, Any]], row: int) -> dict[str, Any] | str:
    """One row, or what is wrong with it."""
    values = {}
    for name, column in columns:
        try:
            value = column[row]
            values[name] = value.as_py() if hasattr(value, "as_py") else value
        except _BUILT_IN as error:
            return f"the column {name} holds a value that cannot be read ({error})"
    return values


def value_sizes(array: Any) -> NDArray[np.int64]:
    """The bytes that each value of an Arrow array takes at least as a Python object. Nothing is converted.

    Raises:
        DataError: the type can refer to the same bytes many times, as views do.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    types, kind = pa.types, array.type
    sizes: NDArray[np.int64] = np.full(len(array), VALUE_SIZE, np.int64)
    if isinstance(array, pa.ExtensionArray):
        return value_sizes(array.storage)
    if types.is_dictionary(kind):
        indices = pc.fill_null(array.indices, 0).to_numpy(zero_copy_only=False)
        sizes += value_sizes(array.dictionary)[indices] - VALUE_SIZE if len(array.dictionary) else 0
    elif types.is_fixed_size_binary(kind):
        sizes += kind.byte_width
    elif any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    ):
        sizes += pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    elif types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32)[::4]  # 16 bytes each, the first four of them the length
        sizes += views[array.offset : array.offset + len(array)] * array.is_valid().to_numpy(zero_copy_only=False)
    elif types.is_struct(kind):
        for field in array.flatten():
            sizes += value_sizes(field)
    elif types.is_fixed_size_list(kind):
        bounds = np.arange(len(array) + 1, dtype=np.int64) + array.offset
        sizes += _list_sizes(bounds * kind.list_size, array.values)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        sizes += _list_sizes(array.offsets.to_numpy(zero_copy_only=False).astype(np.int64), array.values)
    elif types.is_nested(kind) or types.is_run_end_encoded(kind):
        raise DataError(f"columns of the Arrow type {kind!s:.60} are not supported. Save them as another type.")
    return sizes


def _list_sizes(bounds: NDArray[np.int64], values: Any) -> NDArray[np.int64]:
    """The bytes of lists: list k holds the values from `bounds[k]` to `bounds[k + 1]`."""
    sizes: NDArray[np.int64] = np.diff(bounds) * VALUE_SIZE
    if (bounds[-1] - bounds[0]) * VALUE_SIZE > MAX_ROW:  # one row at a time, so that their sizes take little memory
        for row in np.flatnonzero(sizes <= MAX_ROW):
            sizes[row] = value_sizes(values.slice(bounds[row], bounds[row + 1] - bounds[row])).sum()
        return sizes
    members = value_sizes(values.slice(bounds[0], bounds[-1] - bounds[0]))
    ends = np.concatenate([[0], np.cumsum(members)])
    sizes[:] = ends[bounds[1:] - bounds[0]] - ends[bounds[:-1] - bounds[0]]
    return sizes
