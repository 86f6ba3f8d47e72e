"""The converters of public datasets on small trees in the published layouts. They have not run on the downloads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.convert import (
    SHARES,
    abo,
    convert,
    deepfashion_inshop,
    fashion200k,
    fashion_iq,
    hm,
    marqo,
    split_of,
)
from unidiff_sdk.datasets.reader import Row, read_catalog
from unidiff_sdk.errors import DataError

PRODUCTS = 40


def color(number: int) -> tuple[int, int, int]:
    return (6 * number, 90, 10)


def write_image(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 12), color(number)).save(file)


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


# --- trees in the published layouts ----------------------------------------------------------------------------------


def make_fashion200k(root: Path) -> None:
    """Two images a product, in the label files of two categories and two splits."""
    labels: dict[str, list[str]] = {}
    for n in range(PRODUCTS):
        kind, plural, sub = (("dress", "dresses", "maxi"), ("top", "tops", "blouses"))[n % 2]
        split = "test" if n % 5 == 0 else "train"
        for view in range(2):
            name = f"women/{plural}/{sub}/{51727804 + n}/{51727804 + n}_{view}.jpeg"
            write_image(root / name, n)
            labels.setdefault(f"{kind}_{split}", []).append(f"{name}\t-{n}.5\tproduct {n}  in blue")
    for name, lines in labels.items():
        write(root / "labels" / f"{name}_detect_all.txt", "\n".join(lines) + "\n")


def make_inshop(root: Path) -> None:
    lines, items = [str(2 * PRODUCTS), "image_name item_id evaluation_status"], []
    for n in range(PRODUCTS):
        gender, item = ("WOMEN/Dresses", "MEN/Denim")[n % 2], f"id_{n:08d}"
        for view in ("1_front", "3_back"):
            name = f"img/{gender}/{item}/02_{view}.jpg"
            write_image(root / "Img" / name, n)
            lines.append(f"{name}   {item}    {('train', 'query', 'gallery')[n % 3]}")
        items.append({"item": item, "color": "Khaki", "description": [f"Item {n}, fitted.", "", "100% cotton"]})
    write(root / "Eval" / "list_eval_partition.txt", "\n".join(lines) + "\n")
    write(root / "Anno" / "list_description_inshop.json", json.dumps(items))


def make_fashion_iq(root: Path) -> None:
    for category, split in (("dress", "train"), ("shirt", "val")):
        entries = []
        for n in range(PRODUCTS // 2):
            target = f"B0{category[:2].upper()}{n:04d}"
            write_image(root / "images" / f"{target}.{'png' if n % 2 else 'jpg'}", n)
            entries.append({"target": target, "candidate": "B000000001", "captions": [f"is {n} longer", "is blue"]})
        write(root / "captions" / f"cap.{category}.{split}.json", json.dumps(entries))
    write(root / "captions" / "cap.dress.test.json", json.dumps([{"candidate": "B000000001", "captions": ["is red"]}]))


def make_abo(root: Path) -> None:
    listings, paths = [], ["image_id,height,width,path"]
    for n in range(PRODUCTS):
        write_image(root / "images" / "small" / f"{n:02x}" / f"{n:08x}.jpg", n)
        paths.append(f"81image{n},12,8,{n:02x}/{n:08x}.jpg")
        names = [{"language_tag": "de_DE", "value": f"Stuhl {n}"}, {"language_tag": "en_US", "value": f"Chair {n}"}]
        listing = {"item_id": f"B07{n:07d}", "item_name": names, "main_image_id": f"81image{n}", "country": "US"}
        listing |= {"brand": [{"language_tag": "en_US", "value": "Rivet"}], "product_type": [{"value": "CHAIR"}]}
        listings += [listing, listing | {"domain_name": "amazon.co.uk"}]  # an item in two marketplaces
    listings.append({"item_id": "B09", "item_name": [{"language_tag": "ja_JP", "value": "x"}], "main_image_id": "none"})
    metadata = root / "listings" / "metadata"
    metadata.mkdir(parents=True)
    with gzip.open(metadata / "listings_0.json.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(listing) + "\n" for listing in listings[:30])
    write(metadata / "listings_1.json", "".join(json.dumps(listing) + "\n" for listing in listings[30:]))
    (root / "images" / "metadata").mkdir()
    (root / "images" / "metadata" / "images.csv.gz").write_bytes(gzip.compress("\n".join(paths).encode()))


def make_hm(root: Path) -> None:
    with io.StringIO() as table:
        columns = ["article_id", "product_code", "prod_name", "product_type_name", "colour_group_name", "detail_desc"]
        writer = csv.writer(table)
        writer.writerow(columns)
        for n in range(PRODUCTS):
            for variant in range(2):
                article = f"0{108775 + n}{15 + variant:03d}"
                write_image(root / "images" / article[:3] / f"{article}.jpg", n)
                writer.writerow([article, f"0{108775 + n}", f"Top {n}", "Vest top", "Black", f'Jersey, "{n}"'])
        writer.writerow(["0999999001", "0999999", "No image", "Vest top", "Black", ""])
        write(root / "articles.csv", table.getvalue())


def make_marqo(root: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the parquet extra")
    from pyarrow import parquet

    rows = []
    for n in range(PRODUCTS):
        for view in ("01_1_front", "01_7_additional"):
            content = io.BytesIO()
            Image.new("RGB", (8, 12), color(n)).save(content, "PNG" if n % 2 else "JPEG")
            rows.append(
                {
                    "image": {"bytes": content.getvalue(), "path": None},
                    "category1": "men",
                    "category2": "denim",
                    "text": f"jeans number {n}",
                    "item_ID": f"MEN-Denim-id_{n:08d}-{view}",
                }
            )
    (root / "data").mkdir(parents=True)
    for shard in range(2):
        part = pa.Table.from_pylist(rows[shard::2])
        parquet.write_table(part, root / "data" / f"data-0000{shard}-of-00002.parquet")


MAKERS: dict[str, tuple[Callable[[Path], None], Any]] = {
    "fashion200k": (make_fashion200k, fashion200k),
    "deepfashion-inshop": (make_inshop, deepfashion_inshop),
    "fashion-iq": (make_fashion_iq, fashion_iq),
    "abo": (make_abo, abo),
    "hm": (make_hm, hm),
    "marqo": (make_marqo, marqo),
}
# The row of product 3: its text, and some of its columns.
EXPECTED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fashion200k": (
        2 * PRODUCTS,
        "product 3 in blue",
        {"category": "tops", "subcategory": "blouses", "published_split": "train", "detection_score": -3.5},
    ),
    "deepfashion-inshop": (
        2 * PRODUCTS,
        "Item 3, fitted. 100% cotton",
        {"gender": "men", "category": "Denim", "garment": "MEN-Denim-id_00000003", "color": "Khaki"},
    ),
    "fashion-iq": (PRODUCTS, "is 3 longer and is blue", {"candidate": "B000000001"}),
    "abo": (PRODUCTS, "Chair 3", {"product_type": "CHAIR", "brand": "Rivet", "country": "US"}),
    "hm": (2 * PRODUCTS, 'Top 3, black. Jersey, "3"', {"product_code": "0108778", "product_type": "Vest top"}),
    "marqo": (2 * PRODUCTS, "jeans number 3", {"category1": "men", "category2": "denim"}),
}


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(name: str, tmp_path: Path) -> Path:
    MAKERS[name][0](tmp_path / "source")
    return tmp_path / "source"


def test_command_writes_every_pair_with_its_image(name: str, source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["dataset", "convert", name, str(source), str(tmp_path / "out")])
    assert result.exit_code == 0 and "Skipped" not in result.output, result.output
    pairs, text, columns = EXPECTED[name]
    rows: dict[str, list[Row]] = {split: list(read_catalog(tmp_path / "out" / split, strict=True)) for split in SHARES}
    assert sum(map(len, rows.values())) == pairs and all(rows.values())
    found = [row for part in rows.values() for row in part if row.text == text]
    assert found and all(columns.items() <= row.payload.items() for row in found)
    for row in found:
        red = Image.open(row.source).convert("RGB").getpixel((4, 4))[0]  # type: ignore[arg-type,index]
        assert abs(red - color(3)[0]) < 4


def test_product_is_in_one_split(name: str, source: Path) -> None:
    pairs = list(MAKERS[name][1](source))
    by_text: dict[str, set[str]] = {}
    for pair in pairs:
        by_text.setdefault(pair.text, set()).add(split_of(pair.group))
    if name != "fashion-iq":  # whose texts are not those of one product
        assert len(by_text) == PRODUCTS and all(len(splits) == 1 for splits in by_text.values())
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_missing_files_are_errors(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        list(MAKERS[name][1](tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        list(MAKERS[name][1](tmp_path / "empty"))


def test_missing_images_are_skipped(name: str, source: Path, tmp_path: Path) -> None:
    if name == "marqo":
        pytest.skip("the images are in the table")
    image = sorted(file for file in source.rglob("*") if file.suffix in (".jpg", ".jpeg", ".png"))[0]
    image.unlink()
    result = convert(MAKERS[name][1](source), tmp_path / "out", source=name)
    assert sum(result.counts.values()) == EXPECTED[name][0] - 1
    if name != "hm":  # where articles without an image are expected
        assert len(result.invalid) == 1 and "there is no such image" in result.invalid[0].reason


def test_inshop_has_the_splits_of_the_multimodal_dataset(tmp_path: Path) -> None:
    make_inshop(tmp_path)
    groups = {pair.group for pair in deepfashion_inshop(tmp_path)}  # type: ignore[union-attr]
    assert "MEN-Denim-id_00000001" in groups  # as `deepfashion_multimodal` names the garment


def test_names_of_listings_follow_the_language(tmp_path: Path) -> None:
    make_abo(tmp_path)
    texts = [pair.text for pair in abo(tmp_path, "de")]  # type: ignore[union-attr]
    assert len(texts) == PRODUCTS and texts[3] == "Stuhl 3"


def test_path_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    write_image(tmp_path / "secret" / "1_0.jpeg", 1)
    source = tmp_path / "source"
    write(source / "labels" / "dress_train_detect_all.txt", "../secret/x/y/1_0.jpeg\t-1.0\ta dress\nbroken\n")
    (first, second) = fashion200k(source)
    assert "there is no such image" in str(first) or "expected women/" in str(first)
    assert "expected women/CATEGORY" in str(second)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("deepfashion-inshop", "Anno/list_description_inshop.json", b"{}", "must hold a list of objects"),
        ("fashion-iq", "captions/cap.dress.train.json", b'{"a": 1}', "must hold a list of objects"),
        ("fashion-iq", "captions/cap.dress.train.json", b"[", "cap.dress.train.json"),
        ("abo", "listings/metadata/listings_0.json.gz", b"\x1f\x8b\x08nothing", "cannot be read"),
        ("abo", "listings/metadata/listings_1.json", b"[1]\n", "must hold a JSON object"),
        (
            "abo",
            "images/metadata/images.csv.gz",
            gzip.compress(b"a,b\n", mtime=0),
            "must have the columns image_id and path",
        ),
        ("hm", "articles.csv", b"id,name\n1,a\n", "has no column 'article_id'"),
        ("fashion200k", "labels/dress_train_detect_all.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_damaged_files_are_data_errors(source: Path, name: str, file: str, content: bytes, message: str) -> None:
    (source / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(MAKERS[name][1](source))
