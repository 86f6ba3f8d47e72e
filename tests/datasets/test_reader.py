"""Reading dataset folders and tables, valid and invalid."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unidiff_sdk.datasets.reader import InvalidRow, count_rows, read_catalog
from unidiff_sdk.errors import DataError

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
