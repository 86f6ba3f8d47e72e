"""Damaged tables, shards and images give rows, reports, or an error of this package, at every door.

A short form of a longer search: bytes are flipped, cut, inserted, repeated and set to extreme values.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk import Catalog
from unidiff_sdk._internal.images import load_image
from unidiff_sdk.datasets.reader import count_rows, read_catalog
from unidiff_sdk.errors import UniDiffError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROWS = 4
EXTREMES = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")


def encoded(number: int, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def arrow_table(embedded: bool) -> Any:
    pa = pytest.importorskip("pyarrow")
    columns: dict[str, Any] = {
        "text": [f"caption {k} é" for k in range(ROWS)],
        "id": list(range(ROWS)),
        "price": [Decimal("1.50")] * ROWS,
        "tags": [["a", "b"]] * ROWS,
        "added": [datetime(2026, 1, 1 + k, tzinfo=UTC) for k in range(ROWS)],
        "size": [{"cm": k, "exact": None} for k in range(ROWS)],
    }
    if embedded:
        return pa.table(columns | {"image": [{"bytes": encoded(k), "path": f"{k}.png"} for k in range(ROWS)]})
    return pa.table(columns | {"file_name": [f"{k}.png" for k in range(ROWS)]})


def parquet(variant: int) -> tuple[str, bytes]:
    pq = pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    compression = ("none", "snappy", "zstd")[variant % 3]
    pq.write_table(arrow_table(variant % 2 == 0), content, compression=compression, use_dictionary=variant % 4 < 2)
    return "metadata.parquet", content.getvalue()


def arrow(variant: int) -> tuple[str, bytes]:
    pa = pytest.importorskip("pyarrow")
    table, content = arrow_table(True), io.BytesIO()
    with pa.ipc.new_stream(content, table.schema) as stream:
        stream.write_table(table)
    return "data-00000-of-00001.arrow", content.getvalue()


def shard(variant: int) -> tuple[str, bytes]:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[variant % 2]) as tar:
        for k in range(ROWS):
            files = {"png": encoded(k), "txt": b"caption", "json": b'{"price": 3, "x": [1, {"a": 2}]}'}
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{'d' * (variant % 2 * 110)}/é{k:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return "shop.tar", content.getvalue()


def json_lines(variant: int) -> tuple[str, bytes]:
    rows = [{"file_name": f"{k}.png", "text": "é", "id": k, "added": "2026-01-01", "x": [1, None]} for k in range(ROWS)]
    return "metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=variant % 2 == 0) for row in rows).encode()


def csv(variant: int) -> tuple[str, bytes]:
    rows = "".join(f'{k}.png,"c, {k} é",{k},{k}.5,true\n' for k in range(ROWS))
    return "metadata.csv", f"file_name,text,id,price,ok\n{rows}".encode()


def image(variant: int) -> tuple[str, bytes]:
    format = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM")[variant % 8]
    return "0.png", encoded(variant, format)


FORMATS: list[Callable[[int], tuple[str, bytes]]] = [parquet, arrow, shard, json_lines, csv, image]


def mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        # The end of a file is mutated more often: parquet has its footer there.
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(max(0, len(data) - 600), len(data))
        other = rng.randrange(len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice(b'\x00\xff\x7f\x80\n"\\{[')
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                data[at:at] = data[other : other + rng.randrange(1, 64)]
            case 5:
                del data[max(1, at) :]
            case 6:
                data[at : at + 4] = rng.choice(EXTREMES)
        data = data or bytearray(b" ")
    return bytes(data)


def folders(tmp_path: Path, make: Callable[[int], tuple[str, bytes]], trials: int) -> Any:
    """One folder after the other with a mutated file."""
    rng = random.Random(make.__name__)
    for variant in range(trials):
        folder = tmp_path / str(variant)
        folder.mkdir()
        for k in range(ROWS):
            (folder / f"{k}.png").write_bytes(encoded(k))
        name, content = make(variant)
        (folder / name).write_bytes(mutated(content, rng))
        if make is image:
            (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
        if make is arrow:
            (folder / "state.json").write_text("{}")
        yield folder


def refused(act: Callable[[], Any]) -> bool:
    """Whether an error of this package is raised. Any other error fails the test."""
    try:
        act()
    except UniDiffError as error:
        assert str(error)
        return True
    return False


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_the_reader_raises_only_errors_of_this_package(tmp_path: Path, make: Any) -> None:
    reports: list[str] = []

    def read(folder: Path) -> None:
        for row in read_catalog(folder, on_error=lambda row: reports.append(str(row))):
            refused(lambda source=row: load_image(source.image()))  # type: ignore[misc]

    outcomes = []
    for folder in folders(tmp_path, make, 60):
        refused(lambda folder=folder: count_rows(folder))  # type: ignore[misc]
        outcomes.append(refused(lambda folder=folder: read(folder)))  # type: ignore[misc]
    assert not all(outcomes), "some mutations leave a file that can be read"
    assert any(outcomes) or reports or make is image


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_indexing_raises_only_errors_of_this_package(tmp_path: Path, catalog: Catalog, make: Any) -> None:
    for folder in folders(tmp_path, make, 15):
        refused(lambda folder=folder: catalog.add_folder(folder))  # type: ignore[misc]
    assert catalog.count() == len(list(catalog.browse(limit=1000)))


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_training_raises_only_errors_of_this_package(tmp_path: Path, random_checkpoint: Path, make: Any) -> None:
    pytest.importorskip("torch")
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.data.pairs import load_pairs

    checkpoint = load_checkpoint(random_checkpoint)
    for folder in folders(tmp_path, make, 12):
        refused(lambda folder=folder: load_pairs(folder, checkpoint))  # type: ignore[misc]


def test_restoring_raises_only_errors_of_this_package(tmp_path: Path, catalog: Catalog) -> None:
    catalog.add(
        [Image.open(io.BytesIO(encoded(k))) for k in range(ROWS)], ids=[7, "7", "x", -1], texts=["a caption"] * ROWS
    )
    catalog.export(tmp_path / "shop.parquet")
    content, rng = (tmp_path / "shop.parquet").read_bytes(), random.Random(0)
    outcomes = []
    for trial in range(40):
        file, target = tmp_path / f"{trial}.parquet", tmp_path / f"{trial}.catalog"
        file.write_bytes(mutated(content, rng))
        outcomes.append(refused(lambda: Catalog.restore(file, target, catalog.bundle).close()))  # noqa: B023
        assert target.exists() != outcomes[-1], "a catalog that could not be restored is not left behind"
    assert any(outcomes)
