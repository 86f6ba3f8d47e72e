"""Unusual and invalid input: image formats, captions, columns, arguments and paths."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.recorded import open_recorded, recorded

from unidiff_sdk import Bundle, BundleError, Catalog, FilterError, ImageError, OptionError, UniDiffError
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ImageStore

pytestmark = pytest.mark.filterwarnings('ignore:The bundle "toy" was trained')
RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (32, 64), RED)
    image.paste(BLUE, (0, 32, 32, 64))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """Stored rotated, with an EXIF orientation of a quarter turn clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(halves().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def deep() -> bytes:
    """16 bits per pixel: white above, black below."""
    grey = np.zeros((64, 32), np.uint16)
    grey[:32] = 65535
    return encoded(Image.fromarray(grey), "PNG")


def bomb() -> bytes:
    """A PNG of 120 bytes whose header declares 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


GOOD: dict[str, tuple[Callable[[], bytes], tuple[Any, Any]]] = {  # file -> its bytes, the colors above and below
    "plain.png": (lambda: encoded(halves(), "PNG"), (RED, BLUE)),
    "print.jpg": (lambda: encoded(halves("CMYK"), "JPEG", quality=95), (RED, BLUE)),
    "deep.png": (deep, ((255, 255, 255), (0, 0, 0))),
    "moving.gif": (
        lambda: encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 64))]),
        (RED, BLUE),
    ),
    "turned.jpg": (rotated, (RED, BLUE)),
    "a jpeg.png": (lambda: encoded(halves(), "JPEG", quality=95), (RED, BLUE)),
    "größe 💡.webp": (lambda: encoded(halves(), "WEBP", lossless=True), (RED, BLUE)),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {  # file -> its bytes, the error message
    "bomb.png": (bomb, "too large to decode safely"),
    "cut.png": (lambda: encoded(halves(), "PNG")[:-40], "damaged or truncated"),
    "cut.jpg": (lambda: encoded(halves(), "JPEG")[:500], "damaged or truncated"),
    "empty.png": (bytes, "not an image"),
    "text.png": (lambda: b"file_name,text\n", "not an image"),
    "page.jpg": (lambda: b"<html><body>404</body></html>", "not an image"),
}


def write(folder: Path, files: dict[str, bytes], **columns: Any) -> Path:
    folder.mkdir()
    rows = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        rows.append({"file_name": name, "text": f"image {name}", "id": name, **columns})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("copy", [True, False])
def test_every_image_is_decoded_or_refused(catalog: Catalog, tmp_path: Path, copy: bool) -> None:
    files = {name: make() for name, (make, _) in (GOOD | BAD).items()}
    report = catalog.add_folder(write(tmp_path / "products", files), copy=copy)
    assert {row.file_name for row in report.failed} == BAD.keys()
    for row in report.failed:
        assert BAD[row.file_name][1] in row.reason and row.file_name in row.reason
    assert report.added == catalog.count() == len(GOOD)
    for name, (_, (above, below)) in GOOD.items():
        hit = catalog.get(name)
        assert hit
        for image in (hit.load_image(), hit.thumbnail()):
            assert image.size == (32, 64)
            np.testing.assert_allclose(image.getpixel((16, 8)), above, atol=12)
            np.testing.assert_allclose(image.getpixel((16, 56)), below, atol=12)
    # Search by image does not depend on the file format.
    found = {hit.id for hit in catalog.search(image=halves(), limit=len(GOOD) - 1)}
    assert found == GOOD.keys() - {"deep.png"}


@pytest.mark.parametrize("name", BAD)
def test_unusable_image_is_refused_by_add_and_search(catalog: Catalog, name: str) -> None:
    make, says = BAD[name]
    for call in (lambda: catalog.add(make()), lambda: catalog.search(image=make())):
        with pytest.raises(ImageError, match=says):
            call()
    assert catalog.count() == 0 and not list((catalog.folder).rglob("*.part"))


def test_long_and_unusual_captions(catalog: Catalog, tmp_path: Path) -> None:
    captions = {
        "long": "größe 💡 " + "red linen dress " * 6500,
        "zero": "a\0b",
        "right-to-left": "فستان أحمر \u202e",
        "combining": "Z͑ͫ̓ͪ̂ͫ̽" * 50,
        "markup": "[bold]<b>&amp;\x1b[31m",
        "injection": "'; drop table --",
    }
    assert len(captions["long"]) > 100_000
    folder = write(tmp_path / "products", {f"{name}.png": encoded(halves(), "PNG") for name in captions})
    rows = [{"file_name": f"{name}.png", "text": text, "id": name} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert catalog.add_folder(folder).failed == ()
    for name, text in captions.items():
        assert catalog.get(name).text == text.strip()
    for name, words in {"long": "linen größe", "right-to-left": "أحمر", "injection": "drop table"}.items():
        assert [hit.id for hit in catalog.search("x", where={"text": {"contains": words}})] == [name]
        assert catalog.search(words, hybrid=0.9, limit=1)[0].id == name
    assert len(catalog.search(captions["long"], limit=3)) == 3
    page = catalog.search("x")
    assert len(repr(page)) < 2_000 and "\x1b" not in repr(page)
    assert len(page._repr_html_()) < 10_000 and "<b>&amp;" not in page._repr_html_()


def test_columns_may_be_nested_32_levels_deep(tmp_path: Path, toy: Path) -> None:
    def nested(depth: int) -> Any:
        value: Any = "bottom"
        for level in range(depth):
            value = {"a": value} if level % 2 else [value]
        return value

    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        catalog.add(halves(), ids="deep", payloads={"column": nested(31)})
        for depth in (32, 3000):
            with pytest.raises(OptionError, match="nested more than 32 levels deep"):
                catalog.add(halves(), payloads={"column": nested(depth)})
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(OptionError, match="nested more than 32 levels deep"):
            catalog.add(halves(), payloads={"column": endless})
    with Catalog(tmp_path / "shop.catalog") as catalog:
        hit = catalog.get("deep")
        assert hit and hit.payload == {"column": nested(31)} and catalog.count() == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.search("x", limit="3"), "limit='3': give an integer"),
        (lambda c: c.search("x", limit=2.5), "limit=2.5"),
        (lambda c: c.search("x", limit=True), "limit=True"),
        (lambda c: c.search("x", offset=None), "offset=None"),
        (lambda c: c.browse(limit="3"), "limit='3'"),
        (lambda c: c.browse(order_by=3), "3 is not a column"),
        (lambda c: c.browse(order_by="-"), "is not a column"),
        (lambda c: c.facets(3), "3 is not a column"),
        (lambda c: c.facets("x", limit=None), "limit=None"),
        (lambda c: c.search_batch(None), "a list of queries"),
        (lambda c: c.get(None), "None is not an id"),
        (lambda c: c.delete(1.5), "1.5 is not an id"),
        (lambda c: c.generate(None), "prompt is None"),
        (lambda c: c.generate("x", seed="a"), "seed is 'a'"),
        (lambda c: c.reindex(None), "needs a bundle: give a folder"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(catalog: Catalog, call: Callable[[Catalog], Any], says: str) -> None:
    catalog.add(halves(), ids="kept", payloads={"x": "y"})
    with pytest.raises((OptionError, FilterError), match=says):
        call(catalog)
    assert catalog.count() == 1


def test_unpaired_surrogates_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    """JSON can represent them; UTF-8 and the engine cannot."""
    half: Any = "half of a pair: \ud83d"
    for arguments in ({"texts": half}, {"ids": half}, {"payloads": {"a": [half]}}, {"payloads": {half: 1}}):
        with pytest.raises(OptionError, match="not valid Unicode"):
            catalog.add(halves(), **arguments)
    folder = write(tmp_path / "products", {"a.png": encoded(halves(), "PNG"), "b.png": encoded(halves(), "PNG")})
    rows = [{"file_name": "a.png", "text": half}, {"file_name": "b.png", "text": "b", "note": half}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = catalog.add_folder(folder)
    assert [row.line for row in report.failed] == [1, 2] and catalog.count() == 0
    for call in (lambda: catalog.search(half), lambda: catalog.get(half), lambda: catalog.delete(half)):
        with pytest.raises(OptionError, match="not valid Unicode"):
            call()


def test_embeddings_that_are_not_finite_are_refused(toy: Path, tmp_path: Path) -> None:
    bundle, images = Bundle.open(toy), ImageStore(tmp_path / "images")

    def parts(bundle: Bundle) -> Catalog:
        return Catalog.from_parts(EdgeStore(tmp_path / "vectors", bundle.dim), images, bundle)

    with parts(bundle) as catalog:
        catalog.add(halves(), ids="kept")
    for value in (np.nan, np.inf):
        overflowing = open_recorded(toy)
        recorded(overflowing, "image_encoder").alter_outputs = lambda outputs, value=value: {
            name: np.full_like(array, value) for name, array in outputs.items()
        }
        with parts(overflowing) as catalog:
            for call in (lambda: catalog.add(halves(), ids="lost"), lambda: catalog.search(image=halves())):
                with pytest.raises(BundleError, match="zero or not finite"):
                    call()
            with pytest.raises(OptionError, match="finite numbers"):
                catalog.search(vector=[value] * 8)
            assert catalog.count() == 1
    with parts(bundle) as catalog:
        assert catalog.count() == 1 and len(catalog.search("x")) == 1


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "sub/../../secret.png", "link.png", "a\0b.png", "x" * 5000]
)
def test_metadata_paths_must_not_leave_the_folder(catalog: Catalog, tmp_path: Path, name: str) -> None:
    halves().save(tmp_path / "secret.png")
    folder = write(tmp_path / "products", {"in.png": encoded(halves(), "PNG")})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [{"file_name": name, "text": "out"}, {"file_name": "in.png", "text": "in", "id": "../../in"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = catalog.add_folder(folder)
    assert [row.line for row in report.failed] == [1] and report.added == 1
    hit = catalog.get("../../in")
    assert hit and (catalog.folder / hit.uri).resolve().is_relative_to(catalog.folder.resolve())
    catalog.delete("../../in")
    assert (tmp_path / "secret.png").is_file() and (folder / "in.png").is_file()


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", f"folder/{'b' * 300}/c"], ids=["long", "nul", "long folder"])
def test_paths_that_no_file_system_accepts_are_refused(toy: Path, tmp_path: Path, path: str) -> None:
    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        catalog.add(Image.new("RGB", (8, 8)), ids=1)
        calls: list[Callable[[], Any]] = [
            lambda: Bundle.open(path),
            lambda: Catalog(path, toy),
            lambda: Catalog(":memory:", path),
            lambda: catalog.add_folder(path),
            lambda: catalog.add_table(path),
            lambda: catalog.add(path),
            lambda: catalog.search(image=path),
            lambda: catalog.export(path),
            lambda: catalog.reindex(path),
            lambda: Catalog.restore(path),
        ]
        for call in calls:
            with pytest.raises(UniDiffError):
                call()
        assert catalog.count() == 1
