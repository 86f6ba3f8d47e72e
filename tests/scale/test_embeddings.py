"""The embedding files of bulk indexing: what is encoded, what is taken from them, and what is written."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support import local_ray, object_stores
from support.local_qdrant import URL, use_local_qdrant
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Bundle, Catalog, DataError, ImageError, OptionError, StoreError
from unidiff_sdk.cli.main import main
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.scale import index
from unidiff_sdk.scale.embeddings import Embeddings
from unidiff_sdk.scale.stages import Store
from unidiff_sdk.store.images.object_storage import ObjectFolder

object_stores.register()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    local_ray.use(monkeypatch)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each call of the encoder."""
    counts: list[int] = []
    plain = Encoder.encode_pixels

    def counted(encoder: Encoder, pixels: NDArray[np.float32]) -> Any:
        counts.append(len(pixels))
        return plain(encoder, pixels)

    monkeypatch.setattr(Encoder, "encode_pixels", counted)
    return counts


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards, with two chunks and one."""
    (tmp_path / "source").mkdir()
    write_shard(tmp_path / "source" / "0.tar", [(f"0-{row}", row) for row in range(70)])
    write_shard(tmp_path / "source" / "1.tar", [(f"1-{row}", 100 + row) for row in range(5)])
    return tmp_path / "source"


def write_shard(path: Path, rows: Sequence[tuple[str, int]], text: str = "item") -> None:
    """One image of one shade for each (id, shade)."""
    with tarfile.open(path, "w") as tar:
        for number, (id, shade) in enumerate(rows):
            image = io.BytesIO()
            Image.new("RGB", (4, 4), (shade, 255 - shade, 9)).save(image, "PNG")
            columns = json.dumps({"text": f"{text} {number}", "id": id, "price": number / 4}).encode()
            for suffix, content in ((".png", image.getvalue()), (".json", columns)):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def items(place: str | Path, **opening: Any) -> dict[Any, Any]:
    """Everything that a catalog stores, by id."""
    with Catalog(place, create=False, **opening) as catalog:
        records = [record for batch in catalog.parts().store.scroll() for record in batch]
        return {record.payload["id"]: (record.payload, record.vector.tobytes()) for record in records}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_run_killed_between_file_and_catalog_encodes_nothing_twice(
    source: Path, toy: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Store._store, [0]

    def killed(self: Store, chunk: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return plain(self, chunk)

    arguments: dict[str, Any] = {"record": tmp_path / "run.jsonl", "embeddings": tmp_path / "embeddings"}
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_store", killed)
        with pytest.raises(KeyboardInterrupt):
            index(source, tmp_path / "shop", toy, **arguments)
    assert sum(encoded) == 70 and len(items(tmp_path / "shop")) == 64
    report = index(source, tmp_path / "shop", toy, resume=True, **arguments)
    assert (report.added, sum(encoded)) == (75, 75)
    index(source, tmp_path / "without", toy, record=tmp_path / "other.jsonl")
    stored, expected = items(tmp_path / "shop"), items(tmp_path / "without")
    assert {id: payload for id, (payload, _) in stored.items()} == {
        id: payload for id, (payload, _) in expected.items()
    }
    for id, (_, vector) in stored.items():  # in batches of another size
        ours, theirs = np.frombuffer(vector, np.float32), np.frombuffer(expected[id][1], np.float32)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_lost_catalog_is_stored_again_without_encoding(
    source: Path, toy: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    arguments: dict[str, Any] = {"record": tmp_path / "run.jsonl", "embeddings": place}
    index(source, tmp_path / "shop", toy, **arguments)
    before = items(tmp_path / "shop")
    shutil.rmtree(tmp_path / "shop")
    encoded.clear()
    written: list[str] = []
    monkeypatch.setattr(ObjectFolder, "write", lambda folder, name, data: written.append(name))
    report = index(source, tmp_path / "shop", toy, **arguments)
    assert (report.added, encoded, written) == (75, [], [])
    assert items(tmp_path / "shop") == before
    with pytest.raises(DataError, match="another job"):
        index(source, tmp_path / "shop", toy, record=tmp_path / "run.jsonl", resume=True)


def test_embeddings_of_another_bundle_are_refused(source: Path, toy: Path, tmp_path: Path) -> None:
    place = tmp_path / "embeddings"
    index(source, tmp_path / "shop", toy, embeddings=place, record=tmp_path / "run.jsonl")
    before = files_below(place)
    other = make_toy_bundle(tmp_path / "other", seed=9)
    assert Bundle.open(other).fingerprint != Bundle.open(toy).fingerprint
    for resume in (False, True):
        with pytest.raises(StoreError, match=r'holds embeddings of the bundle "toy".*Choose another place'):
            index(source, tmp_path / "new", other, embeddings=place, record=tmp_path / "run.jsonl", resume=resume)
    assert files_below(place) == before
    (place / "embeddings.json").write_text("{")
    with pytest.raises(DataError, match=r"embeddings\.json is damaged"):
        index(source, tmp_path / "shop", toy, embeddings=place, record=tmp_path / "run.jsonl")
    with pytest.raises(OptionError, match="embeddings is 5"):
        index(source, tmp_path / "shop", toy, embeddings=5, record=tmp_path / "run.jsonl")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut off", "empty", "one bit", "of another bundle"])
def test_damaged_file_is_encoded_and_written_again(
    source: Path, toy: Path, tmp_path: Path, encoded: list[int], damage: str
) -> None:
    place = tmp_path / "embeddings"
    index(source, tmp_path / "shop", toy, embeddings=place, record=tmp_path / "run.jsonl")
    before = files_below(place)
    assert len(before) == 4
    (file,) = (file for file in place.rglob("*.parquet") if pq.ParquetFile(file).metadata.num_rows == 64)
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(4)
        assert chunk.path_in_schema.startswith("vector")
        content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    elif damage == "of another bundle":
        table = pq.read_table(file)
        metadata = table.schema.metadata[b"unidiff"].replace(Bundle.open(toy).fingerprint.encode(), b"0" * 64)
        pq.write_table(table.replace_schema_metadata({b"unidiff": metadata}), file)
        content = bytearray(file.read_bytes())
    file.write_bytes(bytes({"cut off": content[:1000], "empty": b""}.get(damage, content)))
    assert files_below(place) != before
    with pytest.raises(DataError, match="of several bundles" if damage == "of another bundle" else "not a readable"):
        Catalog.restore(place, tmp_path / "restored")
    encoded.clear()
    index(source, tmp_path / "again", toy, embeddings=place, record=tmp_path / "run.jsonl")
    assert sum(encoded) == 64 and len(items(tmp_path / "again")) == 75
    names = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert names == before.keys() and len(Embeddings.open(place, bundle_of(file), "").vectors(file.read_bytes())) == 64


def bundle_of(file: Path) -> dict[str, Any]:
    bundle: dict[str, Any] = json.loads(pq.read_schema(file).metadata[b"unidiff"])["bundle"]
    return bundle


@pytest.fixture(scope="module")
def written(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embeddings, bytes]:
    folder = tmp_path_factory.mktemp("written")
    write_shard(folder / "0.tar", [(f"{row}", row) for row in range(6)])
    with pytest.MonkeyPatch.context() as patched:
        local_ray.use(patched)
        index(folder / "0.tar", folder / "shop", toy, embeddings=folder / "out", record=folder / "run.jsonl")
    (file,) = (folder / "out").rglob("*.parquet")
    return Embeddings.open(folder / "out", bundle_of(file), ""), file.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bit_never_changes_an_embedding(written: tuple[Embeddings, bytes], data: st.DataObject) -> None:
    embeddings, content = written
    expected = embeddings.vectors(content)
    assert len(expected) == 6
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for sha256, vector in embeddings.vectors(bytes(damaged)).items():
        assert vector.tobytes() == expected[sha256].tobytes()


def test_changed_part_encodes_only_new_images(source: Path, toy: Path, tmp_path: Path, encoded: list[int]) -> None:
    place = tmp_path / "embeddings"
    index(source, tmp_path / "shop", toy, embeddings=place, record=tmp_path / "run.jsonl")
    encoded.clear()
    write_shard(source / "0.tar", [("0-3", 3), ("0-1", 250), ("0-2", 2)], text="new text")
    write_shard(source / "2.tar", [("2-0", 251)])
    index(source, tmp_path / "again", toy, embeddings=place, record=tmp_path / "run.jsonl")
    assert sum(encoded) == 2
    stored = items(tmp_path / "again")
    assert stored.keys() == {"0-3", "0-1", "0-2", "2-0", *(f"1-{row}" for row in range(5))}
    assert stored["0-3"][0]["text"] == "new text 0"
    rows = [row for file in place.rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["id"]: (row["text"], np.array(row["vector"], np.float32).tobytes()) for row in rows} == {
        id: (payload["text"], vector) for id, (payload, vector) in stored.items()
    }, "the second chunk of the earlier version is deleted"
    # A shard that is cut off may be whole again later.
    before = files_below(place)
    shutil.copy(source / "0.tar", tmp_path / "whole.tar")
    (source / "0.tar").write_bytes(b"no archive")
    index(source, tmp_path / "again", toy, embeddings=place, record=tmp_path / "run.jsonl")
    shutil.copy(tmp_path / "whole.tar", source / "0.tar")
    encoded.clear()
    index(source, tmp_path / "again", toy, embeddings=place, record=tmp_path / "run.jsonl")
    assert files_below(place) == before


def test_folder_is_restored_with_the_images_of_the_catalog(source: Path, toy: Path, tmp_path: Path) -> None:
    images, place = f"memory://{uuid.uuid4().hex}", tmp_path / "embeddings"
    Embeddings.open(place, {"name": "toy", "fingerprint": Bundle.open(toy).fingerprint}, "")
    with pytest.raises(DataError, match="no embeddings yet"):
        Catalog.restore(place, tmp_path / "none")
    index(source, tmp_path / "shop", toy, images=images, embeddings=place, record=tmp_path / "run.jsonl")
    rows = []
    for file in place.rglob("*.parquet"):
        assert pq.read_schema(file).names == ["id", "id_is_int", "text", "payload", "vector", "uri", "sha256", "source"]
        rows += pq.read_table(file).to_pylist()
    assert len(rows) == 75 and {row["source"] for row in rows} == {str(source)}
    files = fsspec.filesystem("memory")
    assert all(files.exists(f"{images}/{row['uri']}") for row in rows)
    expected = items(tmp_path / "shop", images=images)
    shutil.rmtree(tmp_path / "shop")
    with pytest.raises(ImageError, match=r"The image of '.*' cannot be read"):
        Catalog.restore(place, tmp_path / "none")
    with pytest.raises(StoreError, match="images of another catalog"):
        Catalog.restore(place, tmp_path / "again", images=images)
    files.rm(f"{images}/catalog.json")  # as the message says
    Catalog.restore(place, tmp_path / "again", images=images).close()
    with Catalog(tmp_path / "again", images=images) as catalog, pytest.raises(DataError, match="is a folder"):
        catalog.export(place, overwrite=True)
    restored = items(tmp_path / "again", images=images)
    assert {id: (payload["text"], vector) for id, (payload, vector) in restored.items()} == {
        id: (payload["text"], vector) for id, (payload, vector) in expected.items()
    }


def test_lost_collection_is_filled_again(
    source: Path, toy: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/guides/bulk.md says: by the job, or from the folder alone."""
    client = use_local_qdrant(monkeypatch)
    images, place = f"memory://{uuid.uuid4().hex}", tmp_path / "embeddings"
    arguments: dict[str, Any] = {"images": images, "embeddings": place, "record": tmp_path / "run.jsonl"}
    index(source, URL, toy, **arguments)
    expected = items(URL, images=images)
    encoded.clear()
    again: list[Callable[[], Any]] = [
        lambda: index(source, URL, toy, **arguments),
        lambda: Catalog.restore(place, URL, toy, images=images).close(),
    ]
    for fill in again:
        client.delete_collection("catalog")
        with pytest.raises(StoreError, match="no collection"):
            fill()
        fsspec.filesystem("memory").rm(f"{images}/catalog.json")
        fill()
        assert items(URL, images=images) == expected and not encoded


def test_files_are_tables_of_the_images_of_the_catalog(source: Path, toy: Path, tmp_path: Path) -> None:
    place = tmp_path / "embeddings"
    index(source / "1.tar", tmp_path / "shop", toy, embeddings=place, record=tmp_path / "run.jsonl")
    (file,) = place.rglob("*.parquet")
    with Catalog(tmp_path / "again", toy) as catalog:
        report = catalog.add_table(file, images=tmp_path / "shop", columns={"image": "uri"})
        assert (report.added, report.failed) == (5, ())
        with pytest.raises(DataError, match="no column of images"):
            catalog.add_table(file)
    columns = {
        id: {name: payload[name] for name in ("text", "price")} for id, (payload, _) in items(tmp_path / "shop").items()
    }
    assert {
        id: {name: value for name, value in payload.items() if name not in ("id", "_unidiff")}
        for id, (payload, _) in items(tmp_path / "again").items()
    } == columns


def test_command_writes_embeddings(source: Path, toy: Path, tmp_path: Path, encoded: list[int]) -> None:
    arguments = ["bulk", "index", source, "--bundle", toy, "--embeddings", tmp_path / "embeddings", "--json"]
    for number in range(2):
        more = ["--to", tmp_path / f"{number}.catalog", "--record", tmp_path / "run.jsonl"]
        result = CliRunner().invoke(main, list(map(str, [*arguments, *more])))
        assert result.exit_code == 0 and json.loads(result.stdout)["added"] == 75, result.output
    assert sum(encoded) == 75
