"""The formats that are mutated, and what a user does with each: images, tables, shards, filters and cursors.

Success and a UniDiffError are right. Everything else is a failure: another error, a crash, or more time or memory than
the limits allow.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from pyarrow import ArrowInvalid

from unidiff_sdk import Bundle, Catalog, UniDiffError
from unidiff_sdk.cli.parameters import parse_where
from unidiff_sdk.store.images import ImageStore, ItemImage

from .corpus import ITEMS, images, items, jsonl, png, table_csv, tar_shard
from .mutators import (
    mutate_bytes,
    mutate_gif,
    mutate_jpeg,
    mutate_json,
    mutate_png,
    mutate_tar,
    mutate_tiff,
    mutate_value,
    mutate_webp,
    odd_value,
    to_text,
)

__all__ = ["FORMATS", "Format", "OpenedCatalog"]


class Format(ABC):
    """One format.

    Args:
        corpus: the folder that `write_corpus` filled.
        folder: an empty folder for this process.

    Attributes:
        name: for `--only` and the report.
        suffix: of a saved input.
    """

    name = ""
    suffix = ".bin"

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder

    @abstractmethod
    def make(self, rng: Random) -> Any:
        """A mutated input: bytes, or a Python value."""

    @abstractmethod
    def use(self, content: Any) -> None:
        """What a user does with it."""

    def save(self, content: Any) -> bytes:
        """An input as the content of a file."""
        return content if isinstance(content, bytes) else repr(content).encode("utf-8", "backslashreplace")


class OpenedCatalog:
    """A catalog of this process that is emptied before it grows large."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = Bundle.open(bundle), folder
        self.catalog = Catalog(folder, self.bundle)
        self._adds = 0

    def add_folder(self, path: Path) -> None:
        """Add a folder, search, and list every added item."""
        self._adds += 1
        if self._adds % 200 == 0:
            self.catalog.close()
            shutil.rmtree(self.folder)
            self.catalog = Catalog(self.folder, self.bundle)
        report = self.catalog.add_folder(path)
        str(report), [str(row) for row in report.failed]
        if report.added:
            self.catalog.search("red", limit=3)
            self.catalog.delete([hit.id for hit in self.catalog.browse(limit=100)])


# ------------------------------------------------------------------------------------------------ images

_MUTATORS: dict[str, Callable[[Random, bytes, Sequence[bytes]], bytes]] = {
    "png": mutate_png,
    "jpeg": mutate_jpeg,
    "webp": mutate_webp,
    "gif": mutate_gif,
    "tiff": mutate_tiff,
    "bmp": mutate_bytes,
    "ppm": mutate_bytes,
    "avif": mutate_bytes,
}


class Images(Format):
    """Image files: decoded, stored with a thumbnail, and read again."""

    def __init__(self, kind: str, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self.name, self.suffix = kind, f".{kind}"
        self._files, self._mutate = images(kind.upper()), _MUTATORS[kind]
        self._store = ImageStore(folder)

    def make(self, rng: Random) -> bytes:
        return self._mutate(rng, rng.choice(self._files), self._files)

    def use(self, content: bytes) -> None:
        image = ItemImage(content)
        uri = self._store.add(image)
        self._store.load(uri)
        self._store.thumbnail(image.sha256, uri)
        self._store.remove(image.sha256, uri)


# ------------------------------------------------------------------------------------------------ tables and shards


class Table(Format):
    """Tables next to valid images: indexed as a folder."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._source = folder / "source"
        self._source.mkdir()
        for k in range(ITEMS):
            (self._source / f"{k}.png").write_bytes(png(k))
        self._opened = OpenedCatalog(corpus / "colors", folder / "catalog")
        self._target = self._source / f"metadata{self.suffix}"

    def use(self, content: bytes) -> None:
        self._target.write_bytes(content)
        self._opened.add_folder(self._source)


class Jsonl(Table):
    name, suffix = "jsonl", ".jsonl"

    def make(self, rng: Random) -> bytes:
        rows = items()
        if rng.random() < 0.3:
            return mutate_bytes(rng, jsonl(rows))
        k = rng.randrange(len(rows))
        lines = [to_text(row) for row in rows]
        lines[k] = to_text(mutate_value(rng, rows[k]))
        text = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)
        return mutate_bytes(rng, text) if rng.random() < 0.1 else rng.choice((b"", b"", b"\xef\xbb\xbf")) + text


class Csv(Table):
    name, suffix = "csv", ".csv"

    def make(self, rng: Random) -> bytes:
        lines = table_csv(items()).decode().splitlines()
        if rng.random() < 0.3:
            return mutate_bytes(rng, "\n".join(lines).encode())
        for _ in range(rng.choice((1, 2, 3))):
            k = rng.choice((0, *range(len(lines))))
            cells = lines[k].split(",")
            cell = rng.randrange(len(cells))
            odd = odd_value(rng)
            cells[cell] = rng.choice(("", '"', '""', '"a,b"', '"a\nb"', "N/A", "-", "1,5", "'7", str(odd), f'"{odd}"'))
            if rng.random() < 0.2:
                cells.insert(cell, cells[cell])
            if rng.random() < 0.1:
                del cells[cell]
            lines[k] = ",".join(cells)
        text = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n")).join(lines)
        encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
        return text.encode(encoding, "replace" if encoding != "utf-8" else "surrogatepass")


class Parquet(Table):
    name, suffix = "parquet", ".parquet"

    def make(self, rng: Random) -> bytes:
        columns = _arrow_columns(rng)
        if rng.random() < 0.3:
            return mutate_bytes(rng, _parquet(columns))
        valid = _parquet(columns)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice((*columns, "size", 'size 12"', "", "image", "_unidiff", "a.b", "text"))
            columns[name] = rng.choice(_odd_arrays(rng))
        try:
            odd = _parquet(columns)
        except ArrowInvalid:  # Parquet has no column for these values
            return mutate_bytes(rng, valid)
        return odd if rng.random() < 0.9 else mutate_bytes(rng, odd)


def _arrow_columns(rng: Random) -> dict[str, Any]:
    import pyarrow as pa

    rows = items()
    if rng.random() < 0.2:  # images inside the table, as on the hub
        embedded = [{"bytes": png(k), "path": f"{k}.png"} for k in range(len(rows))]
        return {"image": pa.array(embedded), "text": pa.array([row["text"] for row in rows])}
    return {name: pa.array([row[name] for row in rows]) for name in rows[0] if name not in ("id", "brand")}


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
    pq.write_table(table, buffer, compression="zstd" if len(columns) % 2 else "none")
    return buffer.getvalue()


def _odd_arrays(rng: Random) -> list[Any]:
    """Columns of the types that Arrow has and JSON does not, at their boundaries."""
    import pyarrow as pa

    n = ITEMS
    number = rng.choice((0, -1, 1, 2**31, -(2**63), 2**63 - 1, 253402300800, 10**15))
    small = rng.choice((0, -1, 2**31 - 1, -(2**31), 20_000))
    unit = rng.choice(("s", "ms", "us", "ns"))
    zone = rng.choice((None, "UTC", "Europe/Berlin", "+05:30", "Nowhere/Land"))
    integers = pa.array([number, *range(n - 1)], pa.int64())
    return [
        integers,
        integers.view(pa.timestamp(unit, zone)),
        integers.view(pa.duration(unit)),
        integers.view(pa.time64("us")),
        pa.array([small] * n, pa.int32()).view(pa.date32()),
        integers.view(pa.date64()),
        pa.array([2**64 - 1, *range(n - 1)], pa.uint64()),
        pa.array([float("nan"), float("inf"), 1e308, -0.0, None, 1.5], pa.float64()),
        pa.array([Decimal("1e20"), None, *[Decimal(k) / 8 for k in range(n - 2)]], pa.decimal128(38, 10)),
        pa.array([b"\xff\xfe", b"", None, *[b"x" * 300] * (n - 3)], pa.binary()),
        pa.array(["a\0b", "\x1b[31m", "", None, "a" * 70_000, "\u202e"], pa.large_string()),
        pa.array([[[1], []], None, *[[[k]] for k in range(n - 2)]]),
        pa.array([{"bytes": b"x", "path": None}, None, *[{"bytes": None, "path": "../0.png"}] * (n - 2)]),
        pa.array([{"a": {"b": [float("nan")]}}] * n),
        pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        pa.array(["x", "y", "x", None, "y", "x"]).dictionary_encode(),
        pa.nulls(n),
        pa.array([None] * n, pa.string()),
        pa.array(np.zeros(n, np.float16)),
        pa.array([bytes(16)] * n, pa.binary(16)),
    ]


class Tar(Format):
    """Webdataset shards: indexed as a file."""

    name, suffix = "tar", ".tar"

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._shard = tar_shard(items(3))
        self._opened = OpenedCatalog(corpus / "colors", folder / "catalog")

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.1:
            return tar_shard(items(2), to_text(mutate_value(rng, items(1)[0])))
        return mutate_tar(rng, self._shard, [self._shard])

    def use(self, content: bytes) -> None:
        shard = self.folder / "shard.tar"
        shard.write_bytes(content)
        self._opened.add_folder(shard)


# ------------------------------------------------------------------------------------------------ filters, cursors


class CatalogQuery(Format):
    """Queries of a catalog with six items."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self.catalog = Catalog(shutil.copytree(corpus / "shop.catalog", folder / "shop.catalog"), corpus / "colors")

    def use(self, content: Any) -> None:
        self.catalog.count(content)
        self.catalog.search("red", where=content, limit=3)
        self.catalog.browse(where=content, order_by="price", limit=3)


_COLUMNS = ("price", "stock", "tags", "date", "brand", "brand.name", "brand.year", "text", "id", "unknown", "tags[]")
_VALUES = (12, 12.5, -1, True, "new", "Nord", "2024-03-11T10:00:00Z", "2024-03-11", None, "S-2", 3)


def _filter(rng: Random, depth: int = 0) -> dict[str, Any]:
    """A filter that is valid, or nearly so."""
    if depth < 3 and rng.random() < 0.35:
        parts = [_filter(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
        return rng.choice(({"and": parts}, {"or": parts}, {"not": parts[0]}))
    columns = rng.sample(_COLUMNS, rng.choice((1, 1, 2)))
    return {column: _condition(rng) for column in columns}


def _condition(rng: Random) -> Any:
    value = rng.choice(_VALUES)
    if rng.random() < 0.3:
        return rng.choice((value, [value, rng.choice(_VALUES)]))
    operands = {
        **dict.fromkeys(("eq", "ne", "lt", "lte", "gt", "gte"), value),
        "in": [value, rng.choice(_VALUES)],
        "contains": rng.choice(("red item", "new", "")),
        "exists": rng.random() < 0.5,
        "null": rng.random() < 0.5,
        "near": {"lat": rng.choice((0, 91, -90)), "lon": rng.choice((0, 180.1)), "radius": rng.choice((1, 0, 1e9))},
        "box": {"west": rng.choice((0, 179)), "east": rng.choice((1, -179)), "south": -1, "north": rng.choice((1, -2))},
    }
    return {name: operands[name] for name in rng.sample(list(operands), rng.choice((1, 1, 2)))}


class WhereText(CatalogQuery):
    """The text of `--where`."""

    name, suffix = "where", ".json"

    def make(self, rng: Random) -> bytes:
        return mutate_json(rng, json.dumps(_filter(rng)).encode())

    def use(self, content: bytes) -> None:
        super().use(parse_where(content.decode("utf-8", "surrogateescape")))


def _python_value(rng: Random) -> Any:
    """A value that a Python caller may pass, of a type that JSON does not have."""
    number = rng.choice((0, -1, 2**63 - 1, 12))
    return rng.choice(
        (
            odd_value(rng),
            np.int64(number),
            np.float32(number),
            np.bool_(True),
            np.datetime64("2024-03-11"),
            np.datetime64("NaT"),
            np.timedelta64(number % 1000, "s"),
            np.array([number, 1]),
            np.array(number),
            np.str_("new"),
            Decimal("10.5"),
            Decimal("NaN"),
            datetime(2024, 3, 11, tzinfo=UTC),
            timedelta(days=3),
            b"new",
            {"new", "sale"},
            ("new", 1),
            frozenset((1,)),
            range(3),
            object(),
            1j,
            Path("x"),
            lambda: 0,
            type,
            iter([1]),
        )
    )


class WhereDict(CatalogQuery):
    """The argument `where=`."""

    name, suffix = "filter", ".txt"

    def make(self, rng: Random) -> Any:
        mutated = mutate_value(rng, {"": _filter(rng)}, _python_value)
        return mutated.get("") if isinstance(mutated, dict) and rng.random() < 0.9 else mutated


class Cursors(CatalogQuery):
    """The argument `cursor=`."""

    name, suffix = "cursor", ".txt"

    def __init__(self, corpus: Path, folder: Path) -> None:
        super().__init__(corpus, folder)
        self._cursors = [
            str(self.catalog.search("red", limit=2, **query).cursor)
            for query in ({}, {"diversity": 0.3}, {"hybrid": True})
        ]
        self._cursors.append(str(self.catalog.search("red", like="S-0", limit=2).cursor))

    def make(self, rng: Random) -> Any:
        cursor = rng.choice(self._cursors)
        match rng.randrange(6):
            case 0:
                return mutate_bytes(rng, cursor.encode()).decode("utf-8", "surrogateescape")
            case 1:
                return rng.choice(
                    (cursor + "=", cursor[:-1], cursor * 50, f" {cursor}", cursor.encode(), np.str_(cursor))
                )
            case 2:
                return _python_value(rng)
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        head = 9 if rng.random() < 0.7 else 0  # after the version and the digest of the query
        mutated = raw[:head] + mutate_bytes(rng, raw[head:])
        return base64.urlsafe_b64encode(mutated).decode().rstrip("=")

    def use(self, content: Any) -> None:
        for query in ({}, {"diversity": 0.3}, {"hybrid": True}, {"like": "S-0"}):
            try:
                page = self.catalog.search("red", limit=2, cursor=content, **query)
            except UniDiffError as error:
                refused = error
            else:
                if page.cursor is not None:
                    self.catalog.search("red", limit=2, cursor=page.cursor, **query)
                return
        raise refused


# By name: (corpus, folder) -> the format. `bundle_formats` has the others.
FORMATS: dict[str, Callable[[Path, Path], Format]] = {
    **{kind: partial(Images, kind) for kind in _MUTATORS},
    **{kind.name: kind for kind in (Jsonl, Csv, Parquet, Tar, WhereText, WhereDict, Cursors)},
}
