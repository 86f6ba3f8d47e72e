"""The synthetic catalogs are deterministic and disjoint, and their images show what the captions say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk.datasets.drawing import COLORS
from unidiff_sdk.datasets.synthetic import (
    ATTRIBUTES,
    CATALOGS,
    SPLITS,
    brief_caption,
    products,
    render,
    write_catalog,
)
from unidiff_sdk.errors import DataError, OptionError


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", CATALOGS)
def test_every_value_of_every_attribute_occurs(name: str) -> None:
    chosen = products(name, 1500)
    assert len(ATTRIBUTES[name]["type"]) >= 8 and len(ATTRIBUTES[name]["colour"]) == 10
    assert len(ATTRIBUTES[name]["pattern"]) == 5 and len(ATTRIBUTES[name]) == 6
    for column, values in ATTRIBUTES[name].items():
        assert {p.attributes[column] for p in chosen} == set(values)


@pytest.mark.parametrize("name", CATALOGS)
def test_unseen_combinations_occur_in_no_other_split(name: str) -> None:
    def combinations(split: str) -> set[tuple[str, ...]]:
        chosen = products(name, 1500, split=split)
        return {tuple(p.attributes[c] for c in ("type", "colour", "pattern")) for p in chosen}

    unseen = combinations("test-unseen")
    assert 30 <= len(unseen) <= 70  # one in eight of 8 types x 10 colors x 5 patterns
    for split in SPLITS[:3]:
        assert not unseen & combinations(split)


def test_product_depends_only_on_its_stream_and_index() -> None:
    assert products("fashion-man", 3) == products("fashion-man", 9)[:3]
    streams = [(name, seed, split) for name in CATALOGS for seed in (0, 1) for split in SPLITS]
    images = {render(products(name, 1, seed, split)[0]).tobytes() for name, seed, split in streams}
    assert len(images) == len(streams)


def test_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    first, again = (write_catalog("fashion-woman", tmp_path / f, n=5, seed=3, split="val") for f in "ab")
    assert _digest(first) == _digest(again)
    assert _digest(first) != _digest(write_catalog("fashion-woman", tmp_path / "c", n=5, seed=4, split="val"))


def test_metadata_rows_have_image_caption_and_attributes(tmp_path: Path) -> None:
    folder = write_catalog("ecommerce-product", tmp_path / "out", n=6, size=96)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6
    for row, product in zip(rows, products("ecommerce-product", 6), strict=True):
        assert Image.open(folder / row["file_name"]).size == (96, 96)
        assert {column: row[column] for column in product.attributes} == product.attributes
        assert row["text"] == product.caption and row["price"] > 0 and row["brand"]


def test_captions_vary_and_name_the_colors() -> None:
    chosen = products("fashion-woman", 800)
    assert len({p.caption for p in chosen}) > 700
    openings = Counter(p.caption.split()[0] for p in chosen)
    assert len(openings) >= 12
    for product in chosen:
        if product.attributes["colour"] not in ("red", "purple", "teal"):  # these have synonyms
            assert product.attributes["colour"] in product.caption
        if product.attributes["colour2"] != "none":
            assert product.attributes["colour2"] in product.caption


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(CATALOGS),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([64, 100, 128, 256]),
)
def test_main_color_covers_more_than_the_pattern(name: str, seed: int, size: int) -> None:
    """For every pose and pattern, the main color covers more of the image than the color of the pattern."""
    product = products(name, 1, seed)[0]
    pixels = np.asarray(render(product, size), np.float32).reshape(-1, 3)
    assert pixels.shape == (size * size, 3)

    def near(color: str) -> float:
        return float((np.linalg.norm(pixels - np.asarray(COLORS[color], np.float32), axis=1) < 45).mean())

    second = product.attributes["colour2"]
    assert near(product.attributes["colour"]) > 0.015
    if second not in ("none", "white"):  # the studio is white, too
        assert near(product.attributes["colour"]) > near(second)


def test_rendering_at_another_size_gives_the_same_image() -> None:
    product = products("ecommerce-product", 1, 7)[0]
    small = np.asarray(render(product, 64), np.float32)
    large = np.asarray(render(product, 256).resize((64, 64), Image.Resampling.BOX), np.float32)
    assert np.abs(small - large).mean() < 4


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({"name": "fashion-child"}, "fashion-man, fashion-woman, ecommerce-product"),
        ({"name": "fashion-man", "split": "dev"}, "train, val, test, test-unseen"),
        ({"name": "fashion-man", "n": 0}, "n is 0; give an integer of at least 1"),
        ({"name": "fashion-man", "size": 32}, "64 to 512"),
    ],
)
def test_invalid_arguments_raise_and_list_the_valid_ones(tmp_path: Path, arguments: dict, accepted: str) -> None:
    with pytest.raises(OptionError, match=accepted):
        write_catalog(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_existing_catalog_is_not_overwritten(tmp_path: Path) -> None:
    write_catalog("fashion-man", tmp_path, n=1)
    with pytest.raises(DataError, match="already contains a catalog"):
        write_catalog("fashion-man", tmp_path, n=2)


@given(name=st.sampled_from(CATALOGS), index=st.integers(0, 50), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_brief_caption_describes_only_its_columns(name: str, index: int, seed: int) -> None:
    product = products(name, index + 1)[index]
    text, columns = brief_caption(product, seed)
    assert (text, columns) == brief_caption(product, seed)
    assert "type" in columns and columns <= set(product.attributes) and len(columns) < len(product.attributes)
    if "colour" not in columns and product.attributes["colour"] != product.attributes["colour2"]:
        assert product.attributes["colour"] not in text.split()
