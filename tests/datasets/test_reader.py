"""Reading dataset folders and tables, valid and invalid."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk._internal.json_values import to_json
from unidiff_sdk.datasets.reader import InvalidRow, count_rows, describe_problems, group_by_reason, read_catalog
from unidiff_sdk.errors import DataError, OptionError

ROWS = [
    {"file_name": "a.png", "text": "a red dress", "price": 10, "brand": "Acme", "sale": True},
    {"file_name": "sub/b.png", "text": "blue boots", "price": 12.5, "sale": False},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "products"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8), "red").save(root / name)
    return root


def write_jsonl(folder: Path, rows: list[Any]) -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    keys = dict.fromkeys(key for row in rows for key in row)
    parquet.write_table(
        pyarrow.table({key: [row.get(key) for row in rows] for key in keys}), folder / "metadata.parquet"
    )


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_all_formats_give_the_same_rows(folder: Path, write: Any) -> None:
    write(folder, ROWS)
    first, second = read_catalog(folder, strict=True)
    assert (first.image(), first.text) == (folder / "a.png", "a red dress")
    assert first.payload == {"price": 10, "brand": "Acme", "sale": True}
    assert second.payload == {"price": 12.5, "sale": False}  # a missing brand is left out, not null
    assert count_rows(folder) == 2


@pytest.mark.filterwarnings("ignore:.*holds numbers or booleans")
def test_csv_columns_have_one_type(folder: Path) -> None:
    cells = {
        "size": ["38", "M"],
        "sku": ["00123", "7"],
        "price": ["1", "2.5"],
        "stock": ["3", "4"],
        "eco": ["true", "False"],
    }
    write_csv(folder, [{"file_name": "a.png", "text": "12", **{k: v[i] for k, v in cells.items()}} for i in (0, 1)])
    first, second = read_catalog(folder)
    assert first.text == "12"
    assert first.payload == {"size": "38", "sku": "00123", "price": 1.0, "stock": 3, "eco": True}
    assert second.payload == {"size": "M", "sku": "7", "price": 2.5, "stock": 4, "eco": False}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no file"}, "file_name is missing"),
        ({"file_name": "a.png"}, "caption (text) is missing"),
        ({"file_name": "a.png", "text": "  "}, "caption (text) is missing"),
        ({"file_name": "a.png", "text": 7}, "caption (text) is missing"),
        ({"file_name": "gone.png", "text": "x"}, "no such image"),
        ({"file_name": "sub", "text": "x"}, "no such image"),
        ({"file_name": "../secret.png", "text": "x"}, "leads out"),
        ({"file_name": "/etc/hostname", "text": "x"}, "leads out"),
        ({"file_name": "link.png", "text": "x"}, "leads out"),
        ({"file_name": "a\0.png", "text": "x"}, "not a valid path"),
        ({"file_name": "a" * 5000, "text": "x"}, "not a valid path"),
        ("{not json", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
    ],
)
def test_invalid_rows_are_reported_with_their_line(folder: Path, tmp_path: Path, row: Any, reason: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    write_jsonl(folder, [ROWS[0], row, ROWS[1]])
    invalid: list[InvalidRow] = []
    valid = list(read_catalog(folder, on_error=invalid.append))
    assert [r.line for r in valid] == [1, 3]
    assert [r.line for r in invalid] == [2]
    assert reason in invalid[0].reason
    with pytest.raises(DataError, match=f"line 2.*{re.escape(reason)}"):
        list(read_catalog(folder, strict=True))


def test_invalid_rows_are_logged_by_default(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(folder, [{"file_name": "gone.png", "text": "x"}])
    assert list(read_catalog(folder)) == []
    assert "line 1 (gone.png): there is no such image file: skipped" in caplog.text


def test_null_and_nan_are_left_out(folder: Path) -> None:
    write_jsonl(folder, ['{"file_name": "a.png", "text": "x", "price": NaN, "brand": null, "n": 0}', ""])
    (row,) = read_catalog(folder)
    assert row.payload == {"n": 0}


def test_missing_folder_and_metadata_are_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_catalog(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no metadata\.jsonl.*file_name"):
        read_catalog(folder)


def test_metadata_that_is_not_utf8_is_an_error(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_catalog(folder))


def test_damaged_parquet_is_an_error(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    (folder / "metadata.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable parquet"):
        list(read_catalog(folder))


# ------------------------------------------------------------------------------------------------ values


def csv_payloads(folder: Path, column: str, cells: list[str], **options: Any) -> list[Any]:
    write_csv(folder, [{"file_name": "a.png", "text": "x", column: cell} for cell in cells])
    return [row.payload.get(column) for row in read_catalog(folder, strict=True, **options)]


@pytest.mark.parametrize("word", ["nan", "NaN", "N/A", "NULL", "None", "-", "", "<NA>", " n/a "])
def test_a_missing_value_does_not_change_the_others(folder: Path, word: str, recwarn: Any) -> None:
    assert csv_payloads(folder, "price", ["10", word, "2.5"]) == [10, None, 2.5]
    assert not recwarn.list
    write_jsonl(folder, [{"file_name": "a.png", "text": "x", "price": word}])
    assert [row.payload for row in read_catalog(folder)] == [{}], "the same words in every format"


@pytest.mark.parametrize("cell", ["on request", "inf", "1e5000", "12E4", "1_000", "0799", "+49", "٣", "9" * 30])
def test_one_other_cell_leaves_a_column_of_numbers_and_is_reported(folder: Path, cell: str) -> None:
    with pytest.warns(UserWarning, match=r'column "price" holds numbers .*\(3\).* in line 4') as said:
        assert csv_payloads(folder, "price", ["10", "11.5", cell, "-3"]) == [10, 11.5, cell, -3]
    assert len(said) == 1


def test_an_id_depends_on_its_own_cell_only(folder: Path) -> None:
    for more in ([], ["X-4"], ["X-4", "X-5", "X-6", "X-7"], ["1.50", "007", "NA", "true"]):
        assert csv_payloads(folder, "id", ["1", "2", *more])[:2] == [1, 2]
    assert csv_payloads(folder, "id", ["1.50", "007", "NA", "true", "9" * 19]) == [
        "1.50",
        "007",
        "NA",
        "true",
        "9" * 19,
    ]


def test_declared_kinds_take_precedence(folder: Path) -> None:
    kinds = {"sku": "string"}
    assert csv_payloads(folder, "sku", ["1", "2", "NA", "007"], kinds=kinds) == ["1", "2", "NA", "007"]
    with pytest.raises(DataError, match=r"line 3.*price is 'x' and the column is declared as number"):
        csv_payloads(folder, "price", ["1", "x"], kinds={"price": "number"})
    with pytest.raises(OptionError, match="Kinds: string, number, boolean"):
        read_catalog(folder, kinds={"price": "money"})


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("string", [38, "M", 2.5, True], ["38", "M", "2.5", "true"]),
        ("number", [38, "39", "-2.5", 4.0], [38, 39, -2.5, 4.0]),
        ("boolean", [True, "true", "FALSE"], [True, True, False]),
    ],
)
def test_a_declared_kind_converts_the_values_of_every_format(
    folder: Path, write: Any, kind: str, values: list[Any], expected: list[Any]
) -> None:
    write(folder, [{"file_name": "a.png", "text": "x", "size": value} for value in values])
    found = [row.payload["size"] for row in read_catalog(folder, kinds={"size": kind}, strict=True)]
    if write is write_csv and kind == "string":
        expected = [str(value) for value in values]  # True is written as "True" in csv
    assert [(type(value), value) for value in found] == [(type(value), value) for value in expected]


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_a_value_that_contradicts_a_declared_kind_is_an_invalid_row(folder: Path, write: Any) -> None:
    write(folder, [{"file_name": "a.png", "text": "x", "price": price} for price in ("3", "soon", None)])
    invalid: list[InvalidRow] = []
    rows = list(read_catalog(folder, kinds={"price": "number"}, on_error=invalid.append))
    assert [row.payload for row in rows] == [{"price": 3}, {}]
    assert [row.reason for row in invalid] == ["price is 'soon' and the column is declared as number"]
    if write is not write_jsonl:  # rows of JSON Lines have no common columns
        with pytest.raises(DataError, match=r"no column 'prise'.*The nearest is 'price'"):
            list(read_catalog(folder, kinds={"prise": "number"}))


def test_lists_and_ids_have_declared_kinds_too(folder: Path) -> None:
    write_jsonl(folder, [{"file_name": "a.png", "text": "x", "id": 7, "tags": ["new", 2026, None]}])
    (row,) = read_catalog(folder, kinds={"tags": "string", "id": "string"}, strict=True)
    assert row.payload == {"id": "7", "tags": ["new", "2026", None]}


def test_nan_inside_a_value_is_null(folder: Path) -> None:
    write_jsonl(folder, ['{"file_name": "a.png", "text": "x", "size": {"cm": NaN, "all": [1, NaN]}}'])
    (row,) = read_catalog(folder)
    assert row.payload == {"size": {"cm": None, "all": [1, None]}}


def test_parquet_keeps_nanoseconds_and_reports_what_python_cannot_hold(folder: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "file_name": ["a.png", "a.png"],
        "text": ["x", "y"],
        "added": pa.array([1_772_704_800_123_456_789, None], pa.timestamp("ns", "Europe/Berlin")),
        "took": pa.array([3, None], pa.duration("ns")),
        "at": pa.array([1, None], pa.time64("ns")),
        "price": pa.array([Decimal("79.90"), None], pa.decimal128(10, 2)),
        "far": pa.array([None, 10**9], pa.date32()),
    }
    parquet.write_table(pa.table(columns), folder / "metadata.parquet")
    invalid: list[InvalidRow] = []
    (row,) = read_catalog(folder, on_error=invalid.append)
    assert {name: to_json(value, name) for name, value in row.payload.items()} == {
        "added": "2026-03-05T10:00:00.123456789",
        "took": 3e-9,
        "at": "00:00:00.000000001",
        "price": 79.9,
    }
    assert [bad.line for bad in invalid] == [2] and "the column far" in invalid[0].reason


# ------------------------------------------------------------------------------------------------ limits


def test_parquet_that_claims_too_much_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 500_000])
    table = pa.table({"file_name": ["a.png"] * 1000, "text": value})
    parquet.write_table(table, folder / "metadata.parquet", compression="zstd")
    assert (folder / "metadata.parquet").stat().st_size < 100_000, "500 MB in a few kilobytes"
    before = pa.total_allocated_bytes()
    rows = read_catalog(folder)
    next(rows)
    assert pa.total_allocated_bytes() - before < 50_000_000
    monkeypatch.setattr("unidiff_sdk.datasets.parquet.MAX_ROW", 100_000)
    invalid: list[InvalidRow] = []
    assert not list(read_catalog(folder, on_error=invalid.append)) and len(invalid) == 1000
    monkeypatch.setattr("unidiff_sdk.datasets.parquet.MAX_COLUMN_CHUNK", 100_000)
    with pytest.raises(DataError, match="row groups"):
        next(read_catalog(folder))


def test_long_lines_and_special_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unidiff_sdk.datasets.tables.MAX_LINE", 1000)
    write_jsonl(folder, [ROWS[0], {"file_name": "a.png", "text": "x" * 5000}, ROWS[1]])
    invalid: list[InvalidRow] = []
    assert [row.line for row in read_catalog(folder, on_error=invalid.append)] == [1, 3]
    assert (invalid[0].line, invalid[0].reason) == (2, "the line has more than 1,000 characters")
    assert count_rows(folder) == 3
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.csv")
    with pytest.raises(DataError):  # and does not wait for a writer
        list(read_catalog(folder))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".parquet"]))
@pytest.mark.filterwarnings("ignore:.*holds numbers or booleans")
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"table{suffix}"
    file.write_bytes(b"file_name,text\na.png," + content if suffix == ".csv" else content)
    with contextlib.suppress(DataError):
        assert list(read_catalog(file, on_error=lambda row: None)) == []
    file.write_bytes(content)
    with contextlib.suppress(DataError):
        list(read_catalog(file, on_error=lambda row: None))


# ------------------------------------------------------------------------------------------------ names and layouts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("file_name,caption\na.png,x\n", r"no column of captions.*'file_name', 'caption'.*--columns text=caption"),
        ("photo,text\na.png,x\n", "no column of images.*--columns image=photo"),
        ("File_Name,Text\na.png,x\n", "'File_Name', 'Text'.*--columns image=File_Name"),
        ("file_name,txt\na.png,x\n", "--columns text=txt"),
        ("file_name;text;price\na.png;x;10,5\n", 'separated by ";"'),
        (",file_name,text\n0,a.png,x\n", "column 1 has no name"),
        ("file_name,text,text\na.png,x,y\n", "several columns 'text'"),
    ],
)
def test_a_wrong_header_is_reported_once_with_the_columns(folder: Path, content: str, reason: str) -> None:
    (folder / "metadata.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        list(read_catalog(folder))


@pytest.mark.parametrize(
    "content", ["file_name\ttext\na.png\tx\n", "file_name, text\na.png, x\n", "\ufefffile_name,text\r\na.png,x\r\n"]
)
def test_tabs_blanks_and_byte_order_marks_are_accepted(folder: Path, content: str) -> None:
    (folder / "metadata.csv").write_text(content, encoding="utf-8", newline="")
    assert [row.text for row in read_catalog(folder, strict=True)] == ["x"]


def test_columns_can_have_other_names(folder: Path) -> None:
    row = {"photo": "a.png", "title": "x", "sku": 7, "prix": 10}
    names = {"image": "photo", "text": "title", "id": "sku", "price": "prix"}
    for write in (write_jsonl, write_csv, write_parquet):
        write(folder, [row])
        (found,) = read_catalog(folder, columns=names, strict=True)
        assert (found.name, found.text, found.payload) == ("a.png", "x", {"id": 7, "price": 10})
        for file in folder.glob("metadata.*"):
            file.unlink()
    write_csv(folder, [row])
    (found,) = read_catalog(folder, columns=names | {"text": None}, strict=True)
    assert found.text == "" and found.payload["title"] == "x"
    with pytest.raises(DataError, match=r"no column 'photos'.*'photo'"):
        list(read_catalog(folder, columns={"image": "photos"}))
    with pytest.raises(OptionError, match="'image' is None"):
        read_catalog(folder, columns={"image": None})


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def hub_table() -> Any:
    pa = pytest.importorskip("pyarrow")
    images = pa.array([{"bytes": png(), "path": "0.png"}, {"bytes": png("blue"), "path": None}])
    return pa.table({"image": images, "text": ["a red square", "a blue square"]})


def check_hub_rows(path: Path, expected: int) -> None:
    rows = list(read_catalog(path, strict=True))
    assert len(rows) == expected == count_rows(path)
    assert len({row.line for row in rows}) == expected, "lines identify rows"
    assert rows[0].image() == png() and rows[0].text == "a red square"


def test_parquet_of_the_hub_holds_its_images(tmp_path: Path) -> None:
    table = hub_table()
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for split in ("test", "train"):
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    check_hub_rows(tmp_path / "data" / "train-00000-of-00001.parquet", 2)
    check_hub_rows(tmp_path, 4)


def test_save_to_disk_of_datasets_is_read(tmp_path: Path) -> None:
    table = hub_table()
    import pyarrow as pa

    for split in ("test", "train"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "dataset_info.json").write_text("{}")
        with (
            pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    check_hub_rows(tmp_path / "train", 2)
    check_hub_rows(tmp_path, 4)
    (tmp_path / "test" / "data-00000-of-00001.arrow").write_bytes(b"ARROW nothing")
    with pytest.raises(DataError, match="not a readable"):
        list(read_catalog(tmp_path))


def test_split_folders_have_their_own_tables(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / split / "deep").mkdir(parents=True)
        (tmp_path / split / "0.png").write_bytes(png())
        write_jsonl(tmp_path / split, [{"file_name": "0.png", "text": split}, {"file_name": "gone.png", "text": "x"}])
    invalid: list[InvalidRow] = []
    assert [row.text for row in read_catalog(tmp_path, on_error=invalid.append)] == ["test", "train"]
    assert [row.line for row in invalid] == [2, 4] and "train/metadata.jsonl, line 2" in invalid[1].reason


def test_links_of_the_hub_cache_are_followed_into_its_blobs_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--shop" / "snapshots" / "0123"
    blobs = tmp_path / "datasets--shop" / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (snapshot / "images" / "0.png").symlink_to("../../../blobs/abc")
    (snapshot / "images" / "1.png").symlink_to("../../../../secret.png")
    write_jsonl(snapshot, [{"file_name": f"images/{n}.png", "text": "x"} for n in (0, 1)])
    invalid: list[InvalidRow] = []
    assert [row.name for row in read_catalog(snapshot, on_error=invalid.append)] == ["0.png"]
    assert [row.reason for row in invalid] == ["the path leads out of the folder of the images"]


def test_names_of_windows_and_macos_are_found(folder: Path) -> None:
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    (folder / decomposed).write_bytes(png())
    write_jsonl(folder, [{"file_name": name, "text": "x"} for name in (composed, "sub\\b.png", "..\\secret.png")])
    invalid: list[InvalidRow] = []
    assert [row.name for row in read_catalog(folder, on_error=invalid.append)] == [decomposed, "b.png"]
    assert "leads out" in invalid[0].reason


def test_text_files_next_to_images_are_captions(folder: Path) -> None:
    (folder / "a.txt").write_text("a red square\n")
    invalid: list[InvalidRow] = []
    assert [row.text for row in read_catalog(folder, on_error=invalid.append)] == ["a red square"]
    assert [row.file_name for row in invalid] == ["sub/b.png"] and "caption is missing" in invalid[0].reason


def test_the_extension_of_a_text_file_can_be_in_capitals(folder: Path) -> None:
    (folder / "a.TXT").write_text("a red square\n")
    assert [row.text for row in read_catalog(folder, on_error=lambda row: None)] == ["a red square"]


@pytest.mark.parametrize("name", ["metadata.json", "Metadata.tsv", "sub/metadata.xlsx"])
def test_a_metadata_file_that_cannot_be_read_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("[]")
    with pytest.raises(DataError, match=rf"{name} is not read.*metadata\.jsonl, metadata\.csv"):
        read_catalog(folder, captions=False)


@pytest.mark.parametrize(("name", "fix"), [("shop.csv", "--images"), ("a.caption", r"a\.txt"), ("a.json", r"a\.txt")])
def test_captions_that_are_not_read_are_reported(folder: Path, name: str, fix: str) -> None:
    (folder / name).write_text("file_name,text\na.png,x\n")
    with pytest.warns(UserWarning, match=rf"{name} is not read.*{fix}"):
        assert len(list(read_catalog(folder, captions=False))) == 2


def test_images_alone_are_read_where_captions_are_not_needed(folder: Path) -> None:
    assert [row.text for row in read_catalog(folder, captions=False, strict=True)] == ["", ""]
    assert count_rows(folder, captions=False) == 2


def test_equal_problems_are_grouped() -> None:
    rows = [InvalidRow(n, "", "gone" if n % 10 else "damaged") for n in range(5000)]
    assert [(row.line, count) for row, count in group_by_reason(rows)] == [(0, 500), (1, 4500)]


def test_problems_that_differ_in_values_only_are_grouped() -> None:
    reasons = [
        "price is '{}' and the column is declared as number",
        "the row has {} cells and the header has 7",
        "/data/shop/image-{}.png: damaged or truncated (broken data stream)",
        'the line is not valid JSON (Expecting "," at line 1 column {})',
        "there is no such image file (/data/{}/metadata.jsonl, line {})",
    ]
    rows = [InvalidRow(n, f"{n}.png", reasons[n % 5].format(n, n)) for n in range(5000)]
    assert [(row.line, count) for row, count in group_by_reason(rows)] == [(n, 1000) for n in range(5)]
    lines = describe_problems(rows, 2)
    assert (
        lines[0] == "line 0 (0.png): price is '0' and the column is declared as number (1,000 rows with this problem)"
    )
    assert lines[2:] == ["3,000 more rows with 3 other problems"]
    assert describe_problems(rows[:1], 2) == [str(rows[0])] and describe_problems([], 2) == []


def test_each_problem_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(folder, [{"file_name": f"gone-{n}.png", "text": "x"} for n in range(5000)] + [ROWS[0]])
    assert len(list(read_catalog(folder))) == 1
    assert len(caplog.messages) == 2 and "line 1 (gone-0.png)" in caplog.messages[0]
    assert "4,999 more rows skipped for the same reason: there is no such image file" in caplog.messages[1]


def test_a_table_with_too_many_invalid_rows_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unidiff_sdk.datasets.reader.MAX_INVALID_ROWS", 100)
    write_jsonl(folder, [{"file_name": "gone.png", "text": "x"}] * 100)
    assert not list(read_catalog(folder, on_error=lambda row: None))
    write_jsonl(folder, [{"file_name": "gone.png", "text": "x"}] * 101)
    for on_error in (None, lambda row: None):
        with pytest.raises(DataError, match="more than 100 rows are invalid"):
            list(read_catalog(folder, on_error=on_error))


def test_rows_report_the_size_of_their_image(folder: Path, tmp_path: Path) -> None:
    write_jsonl(folder, ROWS[:1])
    (row,) = read_catalog(folder)
    assert row.nbytes == (folder / "a.png").stat().st_size
    pytest.importorskip("pyarrow.parquet").write_table(hub_table(), tmp_path / "hub.parquet")
    assert [row.nbytes for row in read_catalog(tmp_path / "hub.parquet")] == [len(png()), len(png("blue"))]


def test_a_repeated_key_is_an_invalid_row(folder: Path) -> None:
    write_jsonl(folder, ['{"file_name": "a.png", "text": "x", "text": "y"}', '{"file_name": "a.png", "text": "z"}'])
    invalid: list[InvalidRow] = []
    assert [row.text for row in read_catalog(folder, on_error=invalid.append)] == ["z"]
    assert "the key 'text' occurs several times" in invalid[0].reason


def test_an_open_quote_does_not_hide_rows(folder: Path) -> None:
    lines = ["file_name,text", 'a.png,"x"', 'a.png,"5" pipe"', "a.png,y", 'a.png,"open', "a.png,z", "a.png,z"]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    invalid: list[InvalidRow] = []
    assert [row.text for row in read_catalog(folder, on_error=invalid.append)] == ["x", "y"]
    assert [row.line for row in invalid] == [3, 7]
    assert "lines 5 to 7 are not valid CSV" in invalid[1].reason and count_rows(folder) == 4


def test_a_long_cell_of_csv_is_read(folder: Path) -> None:
    (folder / "metadata.csv").write_text(f'file_name,text\na.png,"{"x" * 200_000}"\n')
    assert [len(row.text) for row in read_catalog(folder, strict=True)] == [200_000]
