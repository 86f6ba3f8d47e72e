"""The converters of public datasets, on fixtures with the documented layouts. They have not run on the downloads."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.convert import (
    SHARES,
    convert,
    deepfashion_multimodal,
    m5product,
    split_of,
)
from unidiff_sdk.datasets.convert.m5product import read_members
from unidiff_sdk.datasets.reader import InvalidRow, read_catalog
from unidiff_sdk.errors import DataError

NAME = "{}-{}-id_{:08d}-{:02d}_{}.jpg"


@pytest.fixture
def deepfashion(tmp_path: Path) -> Path:
    """Forty garments each of men and women, with two views each and labels for all."""
    source = tmp_path / "deepfashion"
    for folder in ("images", "labels/shape", "labels/texture"):
        (source / folder).mkdir(parents=True)
    captions, shape, fabric, pattern = {}, [], [], []
    for gender, category in (("MEN", "Denim"), ("WOMEN", "Tees_Tanks")):
        for garment in range(40):
            for view in ("1_front", "7_additional"):
                name = NAME.format(gender, category, garment, 1, view)
                Image.new("RGB", (30, 44), (garment, 90, 10)).save(source / "images" / name)
                captions[name] = f"This person wears garment {garment}."
                shape.append(f"{name} 3 4 3 0 4 2 2 2 4 4 2 1")
                fabric.append(f"{name} 0 7 7")
                pattern.append(f"{name} 3 7 6")
    (source / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    (source / "labels/shape/shape_anno_all.txt").write_text("\n".join(shape) + "\n", encoding="utf-8")
    (source / "labels/texture/fabric_ann.txt").write_text("\n".join(fabric) + "\n", encoding="utf-8")
    (source / "labels/texture/pattern_ann.txt").write_text("\n".join(pattern) + "\n", encoding="utf-8")
    return source


@pytest.fixture
def m5(tmp_path: Path) -> Path:
    source = tmp_path / "m5"
    (source / "images").mkdir(parents=True)
    products = {
        str(600000000000 + n): {
            "title": f"泡泡玛特 收纳 {n}",
            "label": "收纳箱",
            "url": f"https://example.com/{n}.jpg",
            "video": "",
            "pv": "品牌#:#甲#;#颜色#:#红色#;#颜色#:#蓝色#;#坏的",
        }
        for n in range(30)
    }
    (source / "product1m_product5m_id_label.json").write_text(json.dumps(products, ensure_ascii=False), "utf-8")
    for id in list(products)[:20]:
        Image.new("RGB", (20, 20), "red").save(source / "images" / f"{id}.jpg")
    return source


def rows(folder: Path) -> dict[str, list[Any]]:
    return {split: list(read_catalog(folder / split, strict=True)) for split in SHARES}


def test_deepfashion_is_converted_to_three_folders(deepfashion: Path, tmp_path: Path) -> None:
    result = convert(deepfashion_multimodal(deepfashion, "women"), tmp_path / "out", source="deepfashion")
    read = rows(tmp_path / "out")
    assert {split: len(found) for split, found in read.items()} == result.counts and not result.invalid
    assert sum(result.counts.values()) == 80 and all(result.counts.values())
    garments = {split: {row.payload["garment"] for row in found} for split, found in read.items()}
    assert sum(map(len, garments.values())) == len(set().union(*garments.values())) == 40, "no garment is in two splits"

    row = read["train"][0]
    assert row.payload == {
        "id": row.image().stem,
        "gender": "women",
        "category": "Tees_Tanks",
        "garment": row.payload["garment"],
        "colour": "01",
        "view": row.payload["view"],
        "sleeve_length": "long",
        "hat": "no",
        "neckline": "lapel",
        "covers_navel": "yes",
        "upper_fabric": "denim",
        "upper_pattern": "pure color",
        "outer_pattern": "color block",
    }
    assert Image.open(row.image()).size == (30, 44)
    assert json.loads((tmp_path / "out" / "split.json").read_text())["seed"] == 0


def test_published_splits_do_not_change() -> None:
    """A change would make published results incomparable."""
    groups = [f"WOMEN-Dresses-id_{n:08d}" for n in range(12)]
    assert " ".join(map(split_of, groups)) == "train test val train train train val train test train train train"
    assert split_of(groups[0], seed=1) != split_of(groups[0]) or split_of(groups[1], seed=1) != split_of(groups[1])
    shares = [split_of(str(n)) for n in range(5000)]
    assert {split: shares.count(split) / 5000 for split in SHARES} == pytest.approx(SHARES, abs=0.02)


def test_part_of_a_dataset_has_the_splits_of_the_whole(deepfashion: Path, tmp_path: Path) -> None:
    convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / "whole", source="deepfashion")
    captions = json.loads((deepfashion / "captions.json").read_text())
    half = {name: text for number, (name, text) in enumerate(captions.items()) if number % 3}
    (deepfashion / "captions.json").write_text(json.dumps(half))
    convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / "part", source="deepfashion")
    whole, part = rows(tmp_path / "whole"), rows(tmp_path / "part")
    for split in SHARES:
        assert {row.payload["id"] for row in part[split]} <= {row.payload["id"] for row in whole[split]}
    assert len(part["train"]) < len(whole["train"])


def test_smaller_n_is_a_subset_of_larger_n(deepfashion: Path, tmp_path: Path) -> None:
    chosen = {}
    for n in (5, 20):
        convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / str(n), source="deepfashion", n=np.int64(n))
        chosen[n] = {row.payload["id"] for row in rows(tmp_path / str(n))["train"]}
        assert len(chosen[n]) == n
    assert chosen[5] < chosen[20]


def test_invalid_pairs_are_skipped_or_raise(deepfashion: Path, tmp_path: Path) -> None:
    captions = json.loads((deepfashion / "captions.json").read_text())
    (deepfashion / "images" / NAME.format("MEN", "Denim", 3, 1, "1_front")).unlink()
    captions |= {NAME.format("MEN", "Denim", 4, 1, "1_front"): " ", "holiday.jpg": "a beach"}
    (deepfashion / "captions.json").write_text(json.dumps(captions))
    result = convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / "out", source="deepfashion")
    assert sum(result.counts.values()) == 78
    reasons = {row.file_name: row.reason for row in result.invalid}
    assert len(reasons) == 3 and "does not have the form MEN-Denim" in reasons["holiday.jpg"]
    assert "no such image" in " ".join(reasons.values()) and "caption is missing" in " ".join(reasons.values())
    with pytest.raises(DataError, match="no such image"):
        convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / "strict", source="deepfashion", strict=True)
    assert not (tmp_path / "strict").exists()


def test_labels_are_optional_but_must_be_valid(deepfashion: Path, tmp_path: Path) -> None:
    (deepfashion / "labels/texture/fabric_ann.txt").write_text("MEN-Denim-id_00000000-01_1_front.jpg 0 8 1\n")
    with pytest.raises(DataError, match=r"fabric_ann\.txt, line 1: .*Expected a file name and 3 numbers"):
        list(deepfashion_multimodal(deepfashion, "men"))
    for file in deepfashion.rglob("*_ann*.txt"):
        file.unlink()
    pair = next(deepfashion_multimodal(deepfashion, "men"))
    assert not isinstance(pair, InvalidRow)
    assert set(pair.columns) == {"gender", "category", "garment", "colour", "view"}


def test_other_layouts_are_errors(tmp_path: Path, deepfashion: Path) -> None:
    with pytest.raises(DataError, match=r"captions\.json: there is no such file"):
        list(deepfashion_multimodal(tmp_path / "nowhere", "men"))
    (deepfashion / "captions.json").write_text("[]")
    with pytest.raises(DataError, match="must hold an object"):
        list(deepfashion_multimodal(deepfashion, "men"))
    (deepfashion / "captions.json").write_text("{}")
    with pytest.raises(DataError, match="no valid pair"):
        convert(deepfashion_multimodal(deepfashion, "men"), tmp_path / "out", source="deepfashion")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        convert([], tmp_path / "out", source="deepfashion")
    with pytest.raises(DataError, match="found 0"):
        list(m5product(tmp_path))


def test_m5product_converts_products_with_an_image(m5: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(m5 / "images" / "17.jpg")
    result = convert(m5product(m5), tmp_path / "out", source="m5product")
    assert sum(result.counts.values()) == 20
    assert [(row.file_name, row.reason) for row in result.invalid] == [
        ("17.jpg", "product1m_product5m_id_label.json has no such product")
    ]
    row = rows(tmp_path / "out")["train"][0]
    assert row.text.startswith("泡泡玛特 收纳")
    assert row.payload["label"] == "收纳箱"
    assert row.payload["attributes"] == {"品牌": ["甲"], "颜色": ["红色", "蓝色"]}


def test_truncated_annotations_are_an_error(m5: Path) -> None:
    file = m5 / "product1m_product5m_id_label.json"
    file.write_text(file.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(DataError, match="truncated or not valid JSON"):
        list(m5product(m5))
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(DataError, match="must hold a JSON object"):
        list(m5product(m5))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    content=st.dictionaries(st.text(), json_values, max_size=6),
    indent=st.sampled_from([None, 2]),
    chunk=st.integers(1, 40),
)
def test_reading_in_chunks_equals_reading_at_once(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], indent: int | None, chunk: int
) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert dict(read_members(file, chunk)) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"1": {"title": "\\xff"}}', "not valid JSON"),
        (b'{"1": {"title": "\xff"}}', "is not UTF-8 text"),
        (b'{"1": ' + b"9" * 5000 + b"}", "an integer has 5,000 digits"),
        (b'{"1": ' + b"[" * 5000 + b"}", "truncated or not valid JSON|nested more than"),
        (b'{"1": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 100 levels"),
        (b'{"1": "\\ud800"}', "has a lone surrogate"),
        (b"{1: 2}", "has the key 1"),
        (b"[]", "must hold a JSON object"),
        (b"", "must hold a JSON object"),
        (b'{"1": 2', "truncated"),
    ],
)
def test_damaged_annotations_are_a_data_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_members(tmp_path / "a.json", 7))


@pytest.mark.parametrize("content", [b"\xff", b"a.jpg x 1 2", b"\n", b"a.jpg " + b"9" * 5000])
def test_damaged_labels_are_a_data_error(deepfashion: Path, content: bytes) -> None:
    (deepfashion / "labels/shape/shape_anno_all.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"is not UTF-8 text|Expected a file name and"):
        list(deepfashion_multimodal(deepfashion, "men"))


def test_convert_commands(deepfashion: Path, m5: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    arguments = ["dataset", "convert", "deepfashion-multimodal", str(deepfashion), str(tmp_path / "men")]
    incomplete = run(main, arguments)
    assert incomplete.exit_code == 2 and "--gender" in incomplete.stderr
    done = run(main, [*arguments, "--gender", "men", "--n", "10"])
    assert done.exit_code == 0 and "10 train" in done.stdout, done.output
    done = run(main, ["dataset", "convert", "m5product", str(m5), str(tmp_path / "m5-out")])
    assert done.exit_code == 0 and "Next: unidiff-train" in done.stdout, done.output
    again = run(main, ["dataset", "convert", "m5product", str(m5), str(tmp_path / "m5-out")])
    assert again.exit_code == 1 and again.stderr.startswith("Error: ") and "exists already" in again.stderr
    help_text = run(main, ["dataset", "--help"]).stdout
    assert "render" in help_text and "convert" in help_text
    rendered = run(main, ["dataset", "--n", "3", "fashion-man", str(tmp_path / "rendered")])
    assert rendered.exit_code == 0 and "3 synthetic products" in rendered.stdout


@pytest.mark.parametrize(
    "content",
    [
        b'{"1": {"title": "x", "pv": ' + b"9" * 5000 + b"}}",
        b'{"1": {"title": "\xff"}}',
        b'{"1": ' + b"[" * 100_000,
        b'{"1": {"title": NaN, "pv": 1e999}',
        b"\x00" * 100,
        b"",
    ],
    ids=["digits", "not UTF-8", "depth", "truncated", "NUL", "empty"],
)
def test_damaged_annotations_are_data_errors(m5: Path, content: bytes) -> None:
    (m5 / "product1m_product5m_id_label.json").write_bytes(content)
    with pytest.raises(DataError):
        list(m5product(m5))


@pytest.mark.parametrize("name", ["captions.json", "labels/shape/shape_anno_all.txt", "labels/texture/fabric_ann.txt"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"\n\n", b"[1]", b"a " + b"9" * 5000])
def test_damaged_captions_and_labels_are_data_errors(deepfashion: Path, name: str, content: bytes) -> None:
    (deepfashion / name).write_bytes(content)
    with pytest.raises(DataError):
        list(deepfashion_multimodal(deepfashion, "men"))


def test_annotations_are_regular_files(deepfashion: Path, m5: Path) -> None:
    for folder, file, read in (
        (m5, "product1m_product5m_id_label.json", lambda: m5product(m5)),
        (deepfashion, "labels/texture/fabric_ann.txt", lambda: deepfashion_multimodal(deepfashion, "men")),
    ):
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/zero")
        with contextlib.suppress(DataError):  # and does not read forever
            assert list(read())
