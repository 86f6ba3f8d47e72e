"""Tables that claim or repeat far more than they hold are refused before they take memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.datasets import parquet as limits
from unidiff_sdk.datasets.parquet import value_sizes
from unidiff_sdk.datasets.tables import read_table
from unidiff_sdk.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MANY = 40_000_000


def list_of(values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def table_of(column: Any) -> Any:
    return pa.table({"file_name": ["a.png"] * len(column), "text": ["x"] * len(column), "column": column})


def read(path: Path) -> list[Any]:
    return [row for _, row in read_table(path, lambda header: None, {})]


def views(depth: int) -> Any:
    array = pa.array(np.zeros(1000, np.int32))
    for _ in range(depth):
        array = pa.ListViewArray.from_arrays(
            pa.array([0] * 1000, pa.int32()), pa.array([1000] * 1000, pa.int32()), array
        )
    return array.slice(0, 1)


BOMBS: dict[str, Callable[[], Any]] = {
    "integers": lambda: list_of(pa.array(np.zeros(MANY, np.int32))),
    "booleans": lambda: list_of(pa.array(np.zeros(MANY, bool))),
    "nulls": lambda: list_of(pa.nulls(MANY)),
    "structs": lambda: list_of(pa.StructArray.from_arrays([pa.nulls(MANY)], ["a"])),
    "fixed size": lambda: pa.FixedSizeListArray.from_arrays(pa.nulls(MANY), MANY),
    "strings": lambda: list_of(pa.array(["y" * 1000] * 70_000)),
    "bytes": lambda: pa.array([b"y" * 300_000_000]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_kilobytes_of_parquet_or_arrow_do_not_become_gigabytes(tmp_path: Path, name: str) -> None:
    table = table_of(BOMBS[name]())
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    try:
        rows = read(tmp_path / "bomb.parquet")
    except DataError as error:
        assert "row groups" in str(error)
    else:
        assert rows == ["the row takes more than 67,108,864 bytes, which is the most that is allowed"]
    with pa.ipc.new_stream(tmp_path / "data-0.arrow", table.schema) as stream:
        stream.write_table(table)
    del table
    assert [type(row) for row in read(tmp_path / "data-0.arrow")] == [str]
    assert pa.total_allocated_bytes() <= before


def test_values_that_are_stored_once_for_many_rows_have_a_budget(tmp_path: Path, monkeypatch: Any) -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 100_000])
    pq.write_table(table_of(values), tmp_path / "bomb.parquet", compression="zstd")
    monkeypatch.setattr(limits, "MAX_TABLE", 50_000_000)
    with pytest.raises(DataError, match="repeats large ones"):
        read(tmp_path / "bomb.parquet")
    monkeypatch.setattr(limits, "MAX_TABLE", 101_000_000)
    assert len(read(tmp_path / "bomb.parquet")) == 1000


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_footer_that_understates_its_pages_is_not_believed(tmp_path: Path, version: str) -> None:
    file = tmp_path / "bomb.parquet"
    table = table_of(pa.array(["y" * 300_000_000]))
    pq.write_table(table, file, compression="zstd", data_page_version=version)
    declared = pq.ParquetFile(file).metadata.row_group(0).column(2).total_uncompressed_size
    honest, small = varint(declared), bytearray(varint(1000))
    while len(small) < len(honest):  # the same number in as many bytes, so that no other position changes
        small[-1] |= 128
        small.append(0)
    content = file.read_bytes()
    assert content.count(honest) == 1
    file.write_bytes(content.replace(honest, bytes(small)))
    assert pq.ParquetFile(file).metadata.row_group(0).column(2).total_uncompressed_size == 1000
    with pytest.raises(DataError, match="the column column takes 300,000"):
        read(file)


def varint(number: int) -> bytes:
    """A number that is not negative, as Thrift's compact protocol writes it."""
    number, content = number << 1, b""
    while number > 127:
        content, number = content + bytes([number & 127 | 128]), number >> 7
    return content + bytes([number])


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_data_are_refused(tmp_path: Path, compression: str) -> None:
    encoded = pa.array(["a", "b"] * 500).dictionary_encode()
    for column in (encoded, pa.array(["y" * 9000])):
        table = table_of(column)
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(tmp_path / "data-0.arrow", table.schema, options=options) as stream:
            stream.write_table(table)
        with pytest.raises(DataError, match="compressed Arrow data"):
            read(tmp_path / "data-0.arrow")
        with pa.ipc.new_stream(tmp_path / "data-0.arrow", table.schema) as stream:
            stream.write_table(table)
        assert len(read(tmp_path / "data-0.arrow")) == len(column)


def test_lists_that_refer_to_the_same_values_many_times_are_refused(tmp_path: Path) -> None:
    array = views(2)
    with pa.ipc.new_stream(tmp_path / "data-0.arrow", pa.schema({"c": array.type})) as stream:
        stream.write_table(pa.table({"c": array}))
    with pytest.raises(DataError, match="are not supported"):
        read(tmp_path / "data-0.arrow")


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy", "data_page_version": "2.0"},
        {"compression": "zstd", "write_page_checksum": True, "write_page_index": True},
        {"compression": "gzip", "data_page_size": 100, "max_rows_per_page": 7},
        {"compression": "lz4", "use_byte_stream_split": ["n"], "use_dictionary": ["text"]},
        {"compression": "brotli", "column_encoding": {"n": "DELTA_BINARY_PACKED"}, "use_dictionary": False},
    ],
    ids=lambda options: options["compression"],
)
def test_tables_of_every_encoding_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    n = 3000
    columns = {
        "text": [f"größe {k % 9}" for k in range(n)],
        "n": list(range(n)),
        "tags": [["a"] * (k % 4) for k in range(n)],
        "image": [{"bytes": bytes([k % 256]) * 5000, "path": None} for k in range(n)],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=1000, **options)
    assert read(tmp_path / "t.parquet") == pa.table(columns).to_pylist()


def test_sizes_of_values_count_what_python_will_hold() -> None:
    strings = pa.array(["abc", None, "", "ü"])
    assert value_sizes(strings).tolist() == [11, 8, 8, 10]
    assert value_sizes(strings.dictionary_encode())[[0, 3]].tolist() == [11, 10]
    assert value_sizes(strings.cast(pa.string_view()).slice(1)).tolist() == [8, 8, 10]
    assert value_sizes(strings.slice(2)).tolist() == [8, 10]
    lists = pa.array([["abc", "d"], None, [], [["x"][0]]])
    assert value_sizes(lists).tolist() == [8 + 11 + 9, 8, 8, 8 + 9]
    assert value_sizes(lists.slice(1, 3)).tolist() == [8, 8, 17]
    assert value_sizes(pa.array([{"a": "abc", "b": [1, 2]}, None])).tolist() == [8 + 11 + 8 + 16, 8 + 8 + 8]
    assert value_sizes(pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2)).slice(1)).tolist() == [24, 24]
    assert value_sizes(pa.array([[("k", "abc")]], pa.map_(pa.string(), pa.string()))).tolist() == [8 + 8 + 9 + 11]


FLIP_EVERY_BYTE = """
import sys
from pathlib import Path
from unidiff_sdk.datasets.tables import read_table
from unidiff_sdk.errors import DataError

file = Path(sys.argv[1])
content = file.read_bytes()
footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
refused = 0
for position in range(footer, len(content)):
    damaged = bytearray(content)
    damaged[position] ^= 1 << position % 3
    file.write_bytes(damaged)
    try:
        list(read_table(file, lambda header: None, {}))
    except DataError:
        refused += 1
print(refused)
"""


def test_no_damaged_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    table = pa.table({"tags": [["a", "b"], []], "size": [{"cm": 1, "exact": None}] * 2, "text": ["x", "y"]})
    pq.write_table(table, tmp_path / "t.parquet")
    command = [sys.executable, "-c", FLIP_EVERY_BYTE, str(tmp_path / "t.parquet")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-300:]
    assert int(result.stdout) > 100
