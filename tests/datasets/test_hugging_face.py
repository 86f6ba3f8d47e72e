"""What this library writes is read by Hugging Face `datasets`, and what `datasets` writes is read by this library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.convert import Pair, convert
from unidiff_sdk.datasets.reader import count_rows, read_catalog
from unidiff_sdk.datasets.synthetic import products, write_catalog

pytestmark = pytest.mark.filterwarnings('ignore:The bundle "toy" was trained')

CAPTIONS = ["a red dress", "blue boots", "a green mug"]


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs the dev extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (70 * number, 20, 200)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("split", ["train", "val", "test", "test-unseen"])
@pytest.mark.parametrize("name", ["products", "shop-val"])
def test_datasets_reads_the_captions_of_a_synthetic_catalog(
    hugging_face: Any, tmp_path: Path, split: str, name: str
) -> None:
    folder = write_catalog("fashion-man", tmp_path / name, n=3, split=split)
    (loaded,) = hugging_face.load_dataset("imagefolder", data_dir=str(folder)).values()
    assert loaded["text"] == [product.caption for product in products("fashion-man", 3, split=split)]
    assert [image.size for image in loaded["image"]] == [(64, 64)] * 3


@pytest.mark.parametrize("n", [0, 1])
def test_datasets_reads_the_captions_and_splits_of_a_converted_dataset(
    hugging_face: Any, tmp_path: Path, n: int
) -> None:
    words = ("train", "Test", "x-val-y", "dev.1", "eval", "plain", "retrain", "x" * 99 + "-test" + "z" * 9)
    ids = [f"{word}{suffix}" for word in words for suffix in ("", "-7", " 8", "_9")]
    (tmp_path / "source.png").write_bytes(png(1))
    pairs = [Pair(id, id, tmp_path / "source.png", f"item {id}", {}, line) for line, id in enumerate(ids, 1)]
    counts = convert(pairs, tmp_path / "out", source="ids").counts
    folder = tmp_path / "out" if n == 0 else tmp_path / "out" / "train"
    loaded = hugging_face.load_dataset("imagefolder", data_dir=str(folder))
    names = {"validation": "val"}
    found = {names.get(split, split): sorted(rows["text"]) for split, rows in loaded.items()}
    assert {split: len(texts) for split, texts in found.items()} == (counts if n == 0 else {"train": counts["train"]})
    assert set().union(*found.values()) <= {f"item {id}" for id in ids}


def test_datasets_reads_an_exported_catalog(hugging_face: Any, tmp_path: Path, catalog: Catalog) -> None:
    catalog.add([Image.open(io.BytesIO(png(n))) for n in range(3)], texts=CAPTIONS, ids=[1, "1", "b"])
    catalog.export(tmp_path / "shop.parquet")
    (loaded,) = hugging_face.load_dataset("parquet", data_files=str(tmp_path / "shop.parquet")).values()
    loaded = loaded.cast_column("image", hugging_face.Image())
    assert sorted(loaded["text"]) == sorted(CAPTIONS)
    assert [image.size for image in loaded["image"]] == [(8, 8)] * 3


def dataset_of(hugging_face: Any) -> Any:
    return hugging_face.Dataset.from_dict(
        {
            "image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(3)],
            "text": CAPTIONS,
            "price": [1.5, None, 3.0],
            "tags": [["new"], [], ["a", "b"]],
        },
        features=hugging_face.Features(
            {
                "image": hugging_face.Image(),
                "text": hugging_face.Value("string"),
                "price": hugging_face.Value("float32"),
                "tags": hugging_face.List(hugging_face.Value("string")),
            }
        ),
    )


def save_to_disk(hugging_face: Any, folder: Path) -> None:
    dataset_of(hugging_face).save_to_disk(str(folder), num_shards=2)


def save_splits_to_disk(hugging_face: Any, folder: Path) -> None:
    whole = dataset_of(hugging_face)
    splits = {"train": whole.select([0, 1]), "validation": whole.select([2])}
    hugging_face.DatasetDict(splits).save_to_disk(str(folder))


def to_parquet(hugging_face: Any, folder: Path) -> None:
    dataset_of(hugging_face).to_parquet(str(folder / "products.parquet"))


def hub_repository(hugging_face: Any, folder: Path) -> None:
    """The files that `push_to_hub` uploads."""
    (folder / "data").mkdir()
    whole = dataset_of(hugging_face)
    whole.select([0]).to_parquet(str(folder / "data" / "train-00000-of-00002.parquet"))
    whole.select([1]).to_parquet(str(folder / "data" / "train-00001-of-00002.parquet"))
    whole.select([2]).to_parquet(str(folder / "data" / "validation-00000-of-00001.parquet"))
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")


def image_folder(hugging_face: Any, folder: Path) -> None:
    """Image folders with splits, written from a dataset."""
    rows = list(dataset_of(hugging_face).cast_column("image", hugging_face.Image(decode=False)))
    for split, some in {"test": rows[:1], "train": rows[1:]}.items():
        (folder / split).mkdir()
        for row in some:
            (folder / split / row["image"]["path"]).write_bytes(row.pop("image")["bytes"])
        names = [f"{CAPTIONS.index(row['text'])}.png" for row in some]
        table = [{"file_name": name, **row} for name, row in zip(names, some, strict=True)]
        hugging_face.Dataset.from_list(table).to_json(str(folder / split / "metadata.jsonl"))


LAYOUTS: list[Callable[[Any, Path], None]] = [
    save_to_disk,
    save_splits_to_disk,
    to_parquet,
    hub_repository,
    image_folder,
]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_layouts_of_datasets_are_indexed_with_captions_and_columns(
    hugging_face: Any, tmp_path: Path, catalog: Catalog, write: Any
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(hugging_face, folder)
    rows = list(read_catalog(folder, strict=True))
    assert [(row.text, row.payload) for row in rows] == [
        (CAPTIONS[0], {"price": 1.5, "tags": ["new"]}),
        (CAPTIONS[1], {"tags": []}),
        (CAPTIONS[2], {"price": 3.0, "tags": ["a", "b"]}),
    ]
    assert count_rows(folder) == 3
    report = catalog.add_folder(folder)
    assert (report.added, report.failed) == (3, ())
    assert {hit.text: hit.load_image().getpixel((0, 0)) for hit in catalog.browse()} == {
        text: (70 * n, 20, 200) for n, text in enumerate(CAPTIONS)
    }


def test_a_webdataset_shard_is_read_as_datasets_reads_it(hugging_face: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shop-000.tar", "w") as tar:
        for number, caption in enumerate(CAPTIONS):
            for name, content in {"png": png(number), "txt": caption.encode(), "json": b'{"price": 2}'}.items():
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (theirs,) = hugging_face.load_dataset("webdataset", data_files=str(tmp_path / "shop-000.tar")).values()
    ours = list(read_catalog(tmp_path, strict=True))
    assert [row.text for row in ours] == theirs["txt"] == CAPTIONS
    assert [row.payload for row in ours] == theirs["json"] == [{"price": 2}] * 3
