"""The valid files that mutations start from: small images, tables, shards, bundles, a catalog and its archive."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff_sdk import Catalog

__all__ = [
    "COLORS",
    "copy_sparse",
    "images",
    "items",
    "jsonl",
    "products",
    "table_csv",
    "tar_shard",
    "write_checkpoint",
    "write_corpus",
]

COLORS = ("red", "green", "blue", "yellow")
ITEMS = 6


def items(n: int = ITEMS) -> list[dict[str, Any]]:
    """Rows with columns of every kind."""
    return [
        {
            "file_name": f"{k}.png",
            "text": f"a {COLORS[k % 4]} item {k}",
            "id": k if k % 2 else f"S-{k}",
            "price": 10.5 + k,
            "stock": bool(k % 2),
            "tags": ["new", "sale"][: k % 3],
            "date": f"2024-0{k % 9 + 1}-11T10:00:00Z",
            "brand": {"name": "Nord", "year": 1990 + k},
        }
        for k in range(n)
    ]


def pixels(k: int, side: int = 24) -> Image.Image:
    """An image that differs for each k: a color with a gradient."""
    rng = np.random.default_rng(k)
    plane = np.linspace(0, 60, side)[:, None, None] + rng.integers(0, 190, 3)[None, None, :]
    return Image.fromarray(np.broadcast_to(plane, (side, side, 3)).astype(np.uint8))


def images(kind: str) -> list[bytes]:
    """Image files of one format, in several of its modes."""
    image = pixels(1, 20)
    variants: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "PNG": [
            (image, {}),
            (image.convert("RGBA"), {}),
            (image.convert("P"), {"transparency": 3}),
            (image.convert("I;16"), {}),
            (image.convert("1"), {}),
        ],
        "JPEG": [
            (image, {}),
            (image, {"progressive": True}),
            (image.convert("CMYK"), {}),
            (image.convert("L"), {"exif": _exif()}),
        ],
        "WEBP": [(image, {}), (image.convert("RGBA"), {"lossless": True}), (image, {"exif": _exif()})],
        "GIF": [(image, {}), (image, {"save_all": True, "append_images": [pixels(2, 20)]})],
        "TIFF": [
            (image, {}),
            (image, {"compression": "tiff_lzw"}),
            (image, {"compression": "tiff_adobe_deflate"}),
            (image.convert("1"), {"compression": "group4"}),
            (image.convert("I;16"), {}),
            (image.convert("F"), {}),
        ],
        "BMP": [(image, {}), (image.convert("P"), {})],
        "AVIF": [(image, {}), (image.convert("RGBA"), {})],
        "PPM": [(image, {}), (image.convert("L"), {})],
    }
    found = []
    for variant, options in variants[kind]:
        buffer = io.BytesIO()
        variant.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """A metadata.jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table_csv(rows: list[dict[str, Any]]) -> bytes:
    """A metadata.csv of the columns that are no lists or objects."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def tar_shard(rows: list[dict[str, Any]], columns: bytes | None = None) -> bytes:
    """A webdataset shard; `columns` replaces the JSON of the first sample."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for k, row in enumerate(rows):
            described = columns if k == 0 and columns is not None else json.dumps(row).encode()
            members = {"png": png(k), "json": described, "txt": row["text"].encode()}
            for suffix, content in members.items():
                header = tarfile.TarInfo(f"{k}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def png(k: int) -> bytes:
    """A small PNG file."""
    buffer = io.BytesIO()
    pixels(k).save(buffer, "PNG")
    return buffer.getvalue()


def products(folder: Path, n: int) -> Path:
    """Write a folder of n images with a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        (folder / f"{k}.png").write_bytes(png(k))
    (folder / "metadata.jsonl").write_bytes(jsonl(items(n)))
    return folder


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint `checkpoint` with random weights."""
    from support.random_checkpoint import make_random_checkpoint

    make_random_checkpoint(folder / "checkpoint")


def write_corpus(folder: Path) -> None:
    """Write the bundles `colors`, `colors2` and `toy`, the folder `products`, a catalog, and its archive."""
    from support.color_bundle import make_color_bundle
    from support.toy_bundle import make_toy_bundle

    make_color_bundle(folder / "colors")
    make_color_bundle(folder / "colors2", variant=1)
    make_toy_bundle(folder / "toy")
    products(folder / "products", ITEMS)
    with Catalog(folder / "shop.catalog", folder / "colors") as catalog:
        catalog.add_folder(folder / "products")
        catalog.export(folder / "shop.parquet")


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a folder, with the holes of its files: an empty store claims over 100 MB."""
    target.mkdir(parents=True)
    for entry in sorted(source.rglob("*")):
        copy = target / entry.relative_to(source)
        if entry.is_dir():
            copy.mkdir()
            continue
        size = entry.stat().st_size
        with entry.open("rb") as reader, copy.open("wb") as writer:
            position = 0
            while position < size:
                try:
                    position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    break
                end = os.lseek(reader.fileno(), position, os.SEEK_HOLE)
                reader.seek(position)
                writer.seek(position)
                writer.write(reader.read(end - position))
                position = end
            writer.truncate(size)
