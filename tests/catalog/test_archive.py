"""Archives: export and restore over all back ends, damaged files, and killed processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.color_bundle import make_color_bundle
from support.local_qdrant import URL, use_local_qdrant
from support.recorded import open_watched
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Bundle, BundleError, Catalog, DataError, Hit, ImageError, StoreError
from unidiff_sdk.catalog.archive import ROW_GROUP_BYTES
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ImageStore

pytestmark = pytest.mark.filterwarnings(
    "ignore:Payload indexes have no effect",
    "ignore:Local mode performs exact",
    'ignore:The bundle "toy" was trained',
)


def shade(n: int) -> Image.Image:
    return Image.new("RGB", (40, 24), (2 * n, 255 - 2 * n, 90))


def fill(catalog: Catalog, tmp_path: Path) -> None:
    """Items of every kind: from a folder, a reference, bytes, arrays, the same image twice, generated images."""
    folder = tmp_path / "products"
    folder.mkdir()
    for n in range(40):
        shade(n).save(folder / f"{n}.png")
    rows = [{"file_name": f"{n}.png", "text": f"item {n}", "id": n, "price": n / 4} for n in range(40)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    catalog.add_folder(folder)
    shade(90).save(tmp_path / "outside.jpg", quality=90)
    nested: dict[str, Any] = {"size": {"cm": 3, "exact": 3.0}, "tags": ["größe", "💡"], "none": None, "sale": True}
    catalog.add(tmp_path / "outside.jpg", "referenced", "7", {"price": 1}, copy=False)
    catalog.add((tmp_path / "outside.jpg").read_bytes(), "the same image as bytes", "copy", nested)
    catalog.add([np.asarray(shade(91)), shade(92)], ids=["array", -9])
    catalog.add(catalog.generate("red boots", n=2, seed=7, steps=2))


def contents(catalog: Catalog) -> dict[Any, tuple[Any, ...]]:
    return {hit.id: (hit.text, hit.payload, hit.sha256, pixels(hit)) for hit in catalog.browse(limit=1000)}


def pixels(hit: Hit) -> bytes:
    assert hit.thumbnail().size == (min(hit.load_image().width, 128), min(hit.load_image().height, 128))
    return hit.load_image().tobytes()


def vectors(catalog: Catalog) -> dict[str, list[float]]:
    file = catalog.folder / "vectors.parquet"
    catalog.export(file)
    table = pq.read_table(file)
    file.unlink()
    return {row["id"]: np.round(row["vector"], 5).tolist() for row in table.select(["id", "vector"]).to_pylist()}


def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "empty.catalog").mkdir()
    return {"location": tmp_path / "empty.catalog"}


def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"location": ":memory:"}


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The code for servers, over qdrant-client's local mode."""
    use_local_qdrant(monkeypatch)
    return {"location": URL, "images": tmp_path / "images"}


def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The server at QDRANT_URL, if set."""
    collection = f"restored-{uuid.uuid4()}"
    return {"location": os.environ["QDRANT_URL"], "images": tmp_path / "images", "collection": collection}


BACKENDS = [folder, memory, client] + ([server] if "QDRANT_URL" in os.environ else [])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda make: make.__name__)
def test_restored_catalog_equals_the_exported_one(
    catalog: Catalog, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Callable[..., dict[str, Any]]
) -> None:
    fill(catalog, tmp_path)
    assert catalog.export(tmp_path / "shop.parquet") == catalog.count() == 46
    place = backend(tmp_path, monkeypatch)
    runs: list[str] = []
    bundle = open_watched(toy, lambda graph, feeds: runs.append(graph))
    with Catalog.restore(tmp_path / "shop.parquet", bundle=bundle, **place) as restored:
        assert contents(restored) == contents(catalog)
        assert vectors(restored) == vectors(catalog)
        assert restored.bundle.fingerprint == catalog.bundle.fingerprint
        assert restored.count({"generated": True}) == 2
        # It references no file, and is up to date with the folder that its items came from.
        assert all(hit.uri.startswith("images/") for hit in restored.browse(limit=100))
        report = restored.add_folder(tmp_path / "products", prune=True)
        assert (report.added, report.skipped, report.removed) == (0, 40, 0)
        # Restoring twice would mix two catalogs.
        if place["location"] != ":memory:":
            with pytest.raises(StoreError, match=r"already|not empty"):
                Catalog.restore(tmp_path / "shop.parquet", bundle=bundle, **place)
        assert restored.export(tmp_path / "again.parquet") == 46
    assert runs == []  # no image was encoded again
    assert not list(tmp_path.glob(".*"))


def test_export_limits_the_size_of_row_groups(catalog: Catalog, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.bmp" for n in range(3)]
    for n, file in enumerate(files):
        shade(n).resize((2400, 2400)).save(file)
    size = files[0].stat().st_size
    assert size < ROW_GROUP_BYTES < 2 * size
    catalog.add(files, copy=False)
    assert catalog.export(tmp_path / "shop.parquet") == 3
    metadata = pq.ParquetFile(tmp_path / "shop.parquet").metadata
    assert [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)] == [2, 1]
    with Catalog.restore(tmp_path / "shop.parquet") as restored:
        assert contents(restored) == contents(catalog)


def test_export_is_readable_by_other_tools(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    assert catalog.export(tmp_path / "some.parquet", where={"price": {"lt": 1}}) == 4
    rows = pq.read_table(tmp_path / "some.parquet").to_pylist()
    assert {row["id"] for row in rows} == {"0", "1", "2", "3"} and all(row["id_is_int"] for row in rows)
    row = next(row for row in rows if row["id"] == "3")
    assert json.loads(row["payload"]) == {"price": 0.75} and row["text"] == "item 3"
    assert row["image"] == (tmp_path / "products" / "3.png").read_bytes()
    expected = Encoder(catalog.bundle).encode_images([shade(3)])[0]
    np.testing.assert_allclose(row["vector"], expected, atol=1e-6)


def test_restore_follows_the_path_of_the_archive_only_to_the_bundle_of_the_export(tmp_path: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", make_toy_bundle(tmp_path / "bundle")) as catalog:
        catalog.add(shade(1), ids=1)
        catalog.export(tmp_path / "shop.parquet")
    (tmp_path / "bundle").rename(tmp_path / "moved")
    make_color_bundle(tmp_path / "bundle")
    with pytest.raises(StoreError, match="is another bundle"):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog", reencode=True)


def test_restore_with_another_bundle_needs_reencode(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    catalog.export(tmp_path / "shop.parquet")
    other = make_toy_bundle(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"is another bundle.*reencode=True"):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog", other)
    assert not (tmp_path / "new.catalog").exists()
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog", other, reencode=True) as restored:
        assert contents(restored) == contents(catalog)
        hit = restored.search(image=shade(12), limit=1)[0]
        assert hit.score == pytest.approx(1, abs=1e-4) and hit.sha256 == restored.get(12).sha256
        encoded = Encoder(restored.bundle).encode_images([shade(12)])[0]
        assert restored.search(vector=encoded, limit=1)[0].score == pytest.approx(1, abs=1e-4)


def test_restore_with_a_moved_bundle(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle")
    with Catalog(bundle=bundle) as catalog:
        catalog.add(shade(1))
        catalog.export(tmp_path / "one.parquet")
    bundle.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"is not at .*bundle\. Give its new place"):
        Catalog.restore(tmp_path / "one.parquet")
    with Catalog.restore(tmp_path / "one.parquet", bundle=tmp_path / "moved") as restored:
        assert restored.count() == 1


def test_failed_export_keeps_the_previous_file(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    file = tmp_path / "shop.parquet"
    catalog.export(file)
    before = file.read_bytes()
    Image.new("RGB", (5, 5)).save(tmp_path / "outside.jpg")
    with pytest.raises(ImageError, match="'7' has changed since it was indexed"):
        catalog.export(file, overwrite=True)
    (tmp_path / "outside.jpg").unlink()
    with pytest.raises(ImageError, match="'7' cannot be read"):
        catalog.export(file, overwrite=True)
    with pytest.raises(DataError, match=r"is an earlier export.*--overwrite"):
        catalog.export(file)
    assert file.read_bytes() == before
    with pytest.raises(DataError, match="not a readable parquet"):
        catalog.export(tmp_path / "products" / "metadata.jsonl")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match=r"was not written by Catalog\.export"):
        catalog.export(tmp_path / "foreign.parquet")
    with pytest.raises(StoreError, match="cannot be written"):
        catalog.export(tmp_path / "products" / "0.png" / "shop.parquet")
    assert not list(tmp_path.rglob("*.part"))


class InterferingImages(ImageStore):
    """Calls a function before the path of an image is first requested."""

    interfere: Callable[[], Any] | None = None

    def path(self, uri: str) -> Path:
        if self.interfere is not None:
            interfere, self.interfere = self.interfere, None
            interfere()
        return super().path(uri)


def test_export_while_items_are_deleted_and_replaced(toy: Path, tmp_path: Path) -> None:
    bundle, images = Bundle.open(toy), InterferingImages(tmp_path / "images")
    with Catalog.from_parts(EdgeStore(tmp_path / "vectors", bundle.dim), images, bundle) as catalog:
        catalog.add([shade(n) for n in range(9)], ids=list(range(9)))

        def interfere() -> None:
            catalog.delete([1, 2, 3])
            catalog.add([shade(50), shade(51)], ids=[4, 5])

        images.interfere = interfere
        catalog.export(tmp_path / "shop.parquet")
        assert images.interfere is None
    with Catalog.restore(tmp_path / "shop.parquet") as restored:
        assert {hit.id for hit in restored.browse()} >= {0, 4, 5, 6, 7, 8}
        assert restored.get(4).load_image().getpixel((0, 0)) == (100, 155, 90)


def change(file: Path, **columns: Callable[[list[Any]], list[Any]]) -> Path:
    table = pq.read_table(file)
    for name, of in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(place, field, pa.array(of(table[name].to_pylist()), field.type))
    pq.write_table(table, file)
    return file


@pytest.mark.parametrize(
    ("columns", "error", "says"),
    [
        ({"vector": lambda rows: [[float("nan")] * 8, *rows[1:]]}, StoreError, "NaN or infinity"),
        ({"image": lambda rows: [rows[1], *rows[1:]]}, ImageError, "its hash differs"),
        ({"image": lambda rows: [b"no image", *rows[1:]]}, ImageError, "not an image"),
        ({"sha256": lambda rows: ["../../../etc/passwd", *rows[1:]]}, ImageError, "its hash differs"),
        ({"payload": lambda rows: ["[1]", *rows[1:]]}, DataError, "is not an object of other columns"),
        ({"payload": lambda rows: ["{", *rows[1:]]}, DataError, "a row is damaged"),
        ({"payload": lambda rows: ['{"_unidiff": {}}', *rows[1:]]}, DataError, "is not an object of other columns"),
        ({"id": lambda rows: ["seven", *rows[1:]]}, DataError, "a row is damaged"),
    ],
)
def test_restore_of_a_damaged_file_leaves_nothing(
    catalog: Catalog, tmp_path: Path, columns: dict[str, Any], error: type[Exception], says: str
) -> None:
    catalog.add([shade(n) for n in range(3)], ids=[0, 1, 2])
    catalog.export(tmp_path / "shop.parquet")
    change(tmp_path / "shop.parquet", **columns)
    with pytest.raises(error, match=says):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog")
    assert {path.name for path in tmp_path.iterdir()} == {"shop.catalog", "shop.parquet"}


def test_restore_refuses_other_files(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(shade(1))
    file = tmp_path / "shop.parquet"
    catalog.export(file)
    with pytest.raises(DataError, match="there is no such file"):
        Catalog.restore(tmp_path / "nowhere.parquet")
    (tmp_path / "cut.parquet").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable parquet"):
        Catalog.restore(tmp_path / "cut.parquet")
    table = pq.read_table(file)
    head = json.loads(table.schema.metadata[b"unidiff"])
    later = {b"unidiff": json.dumps(head | {"schema_version": 2}).encode()}
    pq.write_table(table.replace_schema_metadata(later), tmp_path / "later.parquet")
    with pytest.raises(DataError, match="Upgrade"):
        Catalog.restore(tmp_path / "later.parquet")
    for dim in (-2, 0, 10**30, True, "12", None):
        odd = {b"unidiff": json.dumps(head | {"bundle": head["bundle"] | {"dim": dim}}).encode()}
        pq.write_table(table.replace_schema_metadata(odd), tmp_path / "odd.parquet")
        with pytest.raises(DataError, match="dim is"):
            Catalog.restore(tmp_path / "odd.parquet")
    pq.write_table(table.drop_columns(["image"]), tmp_path / "less.parquet")
    with pytest.raises(DataError, match="does not have the columns"):
        Catalog.restore(tmp_path / "less.parquet")


def test_exporting_and_opening_remove_unfinished_files(toy: Path, tmp_path: Path) -> None:
    left = [tmp_path / "archives" / ".0123456789abcdef.part", tmp_path / "new.catalog" / ".fedcba9876543210.part"]
    with Catalog(tmp_path / "new.catalog", toy) as catalog:
        for file in left:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"half")
        catalog.export(left[0].parent / "shop.parquet")
    assert [file.exists() for file in left] == [False, True]
    Catalog(tmp_path / "new.catalog").close()
    assert not left[1].exists()


def test_killed_restore_leaves_no_catalog(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add([shade(n) for n in range(100)])
    catalog.export(tmp_path / "shop.parquet")
    script = (
        "import os, sys; from unidiff_sdk import Catalog; from unidiff_sdk.store.edge.store import EdgeStore\n"
        "upsert, calls = EdgeStore.upsert, []\n"
        "def upsert_and_die(self, records):\n"
        "    upsert(self, records); calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "EdgeStore.upsert = upsert_and_die\n"
        "Catalog.restore(*sys.argv[1:])"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "shop.parquet"), str(tmp_path / "new.catalog")]
    run = subprocess.run(argv, capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not (tmp_path / "new.catalog").exists()
    before = {path.name for path in tmp_path.iterdir()}
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog") as again:
        assert len(again) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"new.catalog"} | {
        name for name in before if not name.startswith(".new.catalog.")
    }, "nothing of the killed restore is left"


def test_missing_pyarrow_names_the_extra(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'unidiff-sdk\[parquet\]'"):
        catalog.export(tmp_path / "shop.parquet")
    with pytest.raises(DataError, match=r"pip install 'unidiff-sdk\[parquet\]'"):
        Catalog.restore(tmp_path / "shop.parquet")


def test_an_archive_is_indexed_with_the_same_ids_and_columns(catalog: Catalog, tmp_path: Path) -> None:
    columns: list[dict[str, Any]] = [{"price": 1.5, "tags": ["a", None]}, {"size": {"cm": 3}}, {}]
    catalog.add([shade(n) for n in range(3)], ["red", "green", "blue"], [7, "7", "x"], columns)
    catalog.add(shade(3), ids="without a caption")
    catalog.export(tmp_path / "shop.parquet")
    with Catalog(tmp_path / "again.catalog", catalog.bundle) as again:
        report = again.add_table(tmp_path / "shop.parquet")
        assert report.added == 3 and "the caption (text) is missing" in report.failed[0].reason
        catalog.delete("without a caption")
        kept = {(type(hit.id), hit.id): (hit.text, hit.payload) for hit in catalog.browse()}
        assert {(type(hit.id), hit.id): (hit.text, hit.payload) for hit in again.browse()} == kept
