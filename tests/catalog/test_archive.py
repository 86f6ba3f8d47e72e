"""A catalog in one parquet file: there and back over the back ends, refusals, and what a kill leaves."""

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
from support.toy_bundle import make_toy_bundle

import unidiff_sdk.catalog.archive
from unidiff_sdk import BundleError, Catalog, DataError, Hit, ImageError, StoreError
from unidiff_sdk.inference.encoder import Encoder

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect", 'ignore:The bundle "toy" was trained')


def shade(n: int) -> Image.Image:
    return Image.new("RGB", (40, 24), (2 * n, 255 - 2 * n, 90))


def fill(catalog: Catalog, tmp_path: Path) -> None:
    """Items of every kind: of a folder, a reference, bytes, an array, twins, both kinds of ids, generated ones."""
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
    catalog.add((tmp_path / "outside.jpg").read_bytes(), "a twin in bytes", "twin", nested)
    catalog.add([np.asarray(shade(91)), shade(92)], ids=["array", -9])
    catalog.add(catalog.generate("red boots", n=2, seed=7, steps=2))


def contents(catalog: Catalog) -> dict[Any, tuple[Any, ...]]:
    return {hit.id: (hit.text, hit.payload, hit.sha256, pixels(hit)) for hit in catalog.browse(limit=1000)}


def pixels(hit: Hit) -> bytes:
    assert hit.thumbnail().size == (min(hit.load_image().width, 128), min(hit.load_image().height, 128))
    return hit.load_image().tobytes()


def vectors(catalog: Catalog) -> dict[str, list[float]]:
    return {r.id: np.round(r.vector, 5).tolist() for batch in catalog._store.scroll() for r in batch}


def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "empty.catalog").mkdir()
    return {"location": tmp_path / "empty.catalog"}


def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"location": ":memory:"}


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The code of the server path, over qdrant-client's local mode."""
    import qdrant_client

    local = qdrant_client.QdrantClient(":memory:")
    monkeypatch.setattr(local, "close", lambda: None)
    monkeypatch.setattr(qdrant_client, "QdrantClient", lambda **_: local)
    return {"location": "http://qdrant:6333", "images": tmp_path / "pictures"}


def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A real server, where QDRANT_URL names one."""
    collection = f"restored-{uuid.uuid4()}"
    return {"location": os.environ["QDRANT_URL"], "images": tmp_path / "pictures", "collection": collection}


BACKENDS = [folder, memory, client] + ([server] if "QDRANT_URL" in os.environ else [])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda make: make.__name__)
def test_there_and_back(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Callable[..., dict[str, Any]]
) -> None:
    fill(catalog, tmp_path)
    monkeypatch.setattr(unidiff_sdk.catalog.archive, "ROW_GROUP", 2000)
    assert catalog.export(tmp_path / "shop.parquet") == catalog.count() == 46
    assert pq.ParquetFile(tmp_path / "shop.parquet").num_row_groups > 3
    place = backend(tmp_path, monkeypatch)
    monkeypatch.setattr(Encoder, "encode_pixels", lambda *_: pytest.fail("a picture was encoded again"))
    with Catalog.restore(tmp_path / "shop.parquet", **place) as restored:
        assert contents(restored) == contents(catalog)
        assert vectors(restored) == vectors(catalog)
        assert restored.bundle.fingerprint == catalog.bundle.fingerprint
        assert restored.count({"generated": True}) == 2
        # The restored one stands alone, and is in step with where its items came from.
        assert all(hit.uri.startswith("images/") for hit in restored.browse(limit=100))
        report = restored.add_folder(tmp_path / "products", prune=True)
        assert (report.added, report.skipped, report.removed) == (0, 40, 0)
        # A second time would mix two catalogs.
        if place["location"] != ":memory:":
            with pytest.raises(StoreError, match=r"already|not empty"):
                Catalog.restore(tmp_path / "shop.parquet", **place)
        assert restored.export(tmp_path / "again.parquet") == 46
    assert not list(tmp_path.glob(".*"))


def test_other_tools_read_it(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    assert catalog.export(tmp_path / "some.parquet", where={"price": {"lt": 1}}) == 4
    rows = pq.read_table(tmp_path / "some.parquet").to_pylist()
    assert {row["id"] for row in rows} == {"0", "1", "2", "3"} and all(row["id_is_int"] for row in rows)
    row = next(row for row in rows if row["id"] == "3")
    assert json.loads(row["payload"]) == {"price": 0.75} and row["text"] == "item 3"
    assert row["image"] == (tmp_path / "products" / "3.png").read_bytes()
    expected = Encoder(catalog.bundle).encode_images([shade(3)])[0]
    np.testing.assert_allclose(row["vector"], expected, atol=1e-6)


def test_another_bundle(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    catalog.export(tmp_path / "shop.parquet")
    other = make_toy_bundle(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"another one.*reencode=True"):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog", other)
    assert not (tmp_path / "new.catalog").exists()
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog", other, reencode=True) as restored:
        assert contents(restored) == contents(catalog)
        hit = restored.search(image=shade(12), limit=1)[0]
        assert hit.score == pytest.approx(1, abs=1e-4) and hit.sha256 == restored.get(12).sha256
        encoded = Encoder(restored.bundle).encode_images([shade(12)])[0]
        assert restored.search(vector=encoded, limit=1)[0].score == pytest.approx(1, abs=1e-4)


def test_a_bundle_that_has_moved(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle")
    with Catalog(bundle=bundle) as catalog:
        catalog.add(shade(1))
        catalog.export(tmp_path / "one.parquet")
    bundle.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"is not at .*bundle: say where"):
        Catalog.restore(tmp_path / "one.parquet")
    with Catalog.restore(tmp_path / "one.parquet", bundle=tmp_path / "moved") as restored:
        assert restored.count() == 1


def test_nothing_is_lost_by_a_bad_export(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, tmp_path)
    file = tmp_path / "shop.parquet"
    catalog.export(file)
    before = file.read_bytes()
    Image.new("RGB", (5, 5)).save(tmp_path / "outside.jpg")
    with pytest.raises(ImageError, match="'7' has changed since it was indexed"):
        catalog.export(file)
    (tmp_path / "outside.jpg").unlink()
    with pytest.raises(ImageError, match="'7' cannot be read"):
        catalog.export(file)
    assert file.read_bytes() == before
    with pytest.raises(DataError, match="not a readable parquet"):
        catalog.export(tmp_path / "products" / "metadata.jsonl")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match=r"not what Catalog\.export writes"):
        catalog.export(tmp_path / "foreign.parquet")
    with pytest.raises(StoreError, match="cannot be written"):
        catalog.export(tmp_path / "products" / "0.png" / "shop.parquet")
    assert not list(tmp_path.rglob("*.part"))


def test_items_that_go_while_they_are_exported(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.add([shade(n) for n in range(9)], ids=list(range(9)))
    original = unidiff_sdk.catalog.archive._original
    changed: list[str] = []

    def interfered(path: Path, *arguments: Any) -> bytes:
        if not changed:
            changed.append("now")
            catalog.delete([1, 2, 3])
            catalog.add([shade(50), shade(51)], ids=[4, 5])
        return original(path, *arguments)

    monkeypatch.setattr(unidiff_sdk.catalog.archive, "_original", interfered)
    catalog.export(tmp_path / "shop.parquet")
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
        ({"image": lambda rows: [b"no picture", *rows[1:]]}, ImageError, "not an image"),
        ({"sha256": lambda rows: ["../../../etc/passwd", *rows[1:]]}, ImageError, "its hash differs"),
        ({"payload": lambda rows: ["[1]", *rows[1:]]}, DataError, "is no object of other columns"),
        ({"payload": lambda rows: ["{", *rows[1:]]}, DataError, "a row is damaged"),
        ({"payload": lambda rows: ['{"_unidiff": {}}', *rows[1:]]}, DataError, "of other columns"),
        ({"id": lambda rows: ["seven", *rows[1:]]}, DataError, "a row is damaged"),
    ],
)
def test_a_damaged_file_leaves_nothing(
    catalog: Catalog, tmp_path: Path, columns: dict[str, Any], error: type[Exception], says: str
) -> None:
    catalog.add([shade(n) for n in range(3)], ids=[0, 1, 2])
    catalog.export(tmp_path / "shop.parquet")
    change(tmp_path / "shop.parquet", **columns)
    with pytest.raises(error, match=says):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog")
    assert {path.name for path in tmp_path.iterdir()} == {"shop.catalog", "shop.parquet"}


def test_files_that_are_none(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(shade(1))
    file = tmp_path / "shop.parquet"
    catalog.export(file)
    with pytest.raises(DataError, match="not a readable parquet"):
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
    pq.write_table(table.drop_columns(["image"]), tmp_path / "less.parquet")
    with pytest.raises(DataError, match="does not have the columns"):
        Catalog.restore(tmp_path / "less.parquet")


def test_a_kill_while_restoring_leaves_no_catalog(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add([shade(n) for n in range(100)])
    catalog.export(tmp_path / "shop.parquet")
    script = (
        "import os, sys; from unidiff_sdk import Catalog; from unidiff_sdk.catalog.writer import Writer\n"
        "commit, calls = Writer._commit, []\n"
        "def dying(self, *rest):\n"
        "    commit(self, *rest); calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), 9)\n"
        "Writer._commit = dying\n"
        "Catalog.restore(*sys.argv[1:])"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "shop.parquet"), str(tmp_path / "new.catalog")]
    run = subprocess.run(argv, capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not (tmp_path / "new.catalog").exists()
    with pytest.raises(StoreError, match=r"\.new\.catalog\.restoring is there.*delete it"):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new.catalog")


def test_without_pyarrow_the_extra_is_named(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'unidiff-sdk\[parquet\]'"):
        catalog.export(tmp_path / "shop.parquet")
    with pytest.raises(DataError, match=r"pip install 'unidiff-sdk\[parquet\]'"):
        Catalog.restore(tmp_path / "shop.parquet")
