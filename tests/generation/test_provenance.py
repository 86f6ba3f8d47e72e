"""The file of a generated image records how to generate it again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, Generation, ImageError, OptionError
from unidiff_sdk.cli.output.contact_sheet import contact_sheet
from unidiff_sdk.generation.provenance import read_recipe, save
from unidiff_sdk.inference.encoder import Encoder

DIGITAL_SOURCE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Catalog(":memory:", make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")) as catalog:
        catalog.add([Image.new("RGB", (16, 16), c) for c in ("red", "blue")], ["red", "blue"], ["r", "b"])
        yield catalog


def digital_source(file: Path) -> str:
    packet = Image.open(file).info["xmp"].decode()
    description = ElementTree.fromstring(re.sub(r"<\?xpacket.*?\?>", "", packet))[0][0]
    return description.attrib[DIGITAL_SOURCE].rpartition("/")[2]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_recipe_generates_the_image_again(catalog: Catalog, tmp_path: Path, suffix: str) -> None:
    generation = catalog.generate('boots & "laces" <b>', n=3, seed=41, steps=3, sampler="euler_a", guidance_scale=2)
    assert sorted(result.seed for result in generation) == [41, 42, 43]
    for result in generation:
        file = tmp_path / f"{result.seed}{suffix}"
        result.save(file)
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(result.image))
        recipe = read_recipe(file)
        assert recipe.bundle == catalog.bundle.fingerprint and not recipe.replaced
        (again,) = catalog.generate(**recipe.arguments)
        assert np.abs(np.asarray(again.image).astype(int) - np.asarray(result.image)).max() <= 1
        assert again.recipe == result.recipe
        assert digital_source(file) == "trainedAlgorithmicMedia"


def test_recipe_of_an_edited_image_names_its_sources(catalog: Catalog, tmp_path: Path) -> None:
    hit, mask = catalog.get("r"), Image.new("L", (16, 16), 255)
    assert hit
    (result,) = catalog.generate("boots", like=hit, mask=mask, strength=0.8, seed=3)
    result.save(tmp_path / "x.png")
    recipe = read_recipe(tmp_path / "x.png")
    assert recipe.like == hit.sha256 and recipe.mask and recipe.arguments["strength"] == 0.8
    assert digital_source(tmp_path / "x.png") == "compositeWithTrainedAlgorithmicMedia"
    with pytest.raises(OptionError, match="give that image as like="):
        catalog.generate(**recipe.arguments)
    again = catalog.generate(**recipe.arguments, like=hit, mask=mask)[0]
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(result.image))


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1), negative=st.text(), seed=st.integers(0, 2**63 - 1))
def test_recipe_keeps_any_text(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str, seed: int) -> None:
    file = tmp_path_factory.getbasetemp() / "words.png"
    given_ = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "bundle": "ab"}
    save(Image.new("RGB", (4, 4)), given_, file)
    recipe = read_recipe(file)
    assert {**recipe.arguments, "bundle": recipe.bundle} == given_


def test_read_recipe_refuses_files_without_one(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ImageError, match=r"plain.png: holds no recipe"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ImageError, match=r"text.png: cannot be read as a PNG or WebP"):
        read_recipe(tmp_path / "text.png")
    with pytest.raises(ImageError, match=r"none.png: cannot be read"):
        read_recipe(tmp_path / "none.png")
    with pytest.raises(OptionError, match=r"x.jpg: an image is saved with its recipe as .png or .webp"):
        save(Image.new("RGB", (4, 4)), {"bundle": "ab"}, tmp_path / "x.jpg")


def test_search_can_exclude_generated_images(catalog: Catalog) -> None:
    generated = catalog.generate("red boots", n=2, seed=0)
    ids = catalog.add(generated)
    try:
        assert {hit.id for hit in catalog.search("red")} == {"r", "b", *ids}
        assert {hit.id for hit in catalog.search("red", where={"not": {"generated": True}})} == {"r", "b"}
        assert json.loads(json.dumps(generated[0].payload)) == generated[0].payload
        copied = catalog.generate("red boots", n=2, seed=0)
        assert all(result.nearest and result.nearest.score == pytest.approx(1, abs=1e-4) for result in copied)
        with pytest.warns(UserWarning, match="3 exceeded max_similarity=-1"):
            none = catalog.generate("red boots", n=2, seed=0, max_similarity=-1, budget=3)
        assert len(none) == 0 and none.generated == 3 and none.rejected["max_similarity"] == 3
    finally:
        catalog.delete(ids)


def test_safety_rejects_and_replaces(catalog: Catalog, tmp_path: Path) -> None:
    """A rejected image is generated anew. A replacement is scored, marked, and recorded in the file."""
    received: list[Image.Image] = []
    gray = Image.new("RGB", (16, 16), "gray")

    def safety(image: Image.Image) -> Image.Image | None:
        received.append(image)
        return {1: None, 2: gray}.get(len(received), image)

    generation = catalog.generate("red boots", n=2, seed=11, steps=2, safety=safety)
    assert len(generation) == 2 and generation.generated == len(received) == 3 and generation.rejected["safety"] == 1
    (replaced,) = [result for result in generation if result.replaced]
    (kept,) = [result for result in generation if not result.replaced]
    assert (replaced.seed, kept.seed) == (12, 13)  # that of the seed 11 was rejected
    np.testing.assert_array_equal(np.asarray(replaced.image), np.asarray(gray))
    encoder = Encoder(catalog.bundle)
    assert replaced.score == pytest.approx(
        float(encoder.encode_images([gray])[0] @ encoder.encode_texts(["red boots"])[0])
    )
    replaced.save(tmp_path / "replaced.png")
    assert read_recipe(tmp_path / "replaced.png").replaced


def test_generate_supports_several_prompts(catalog: Catalog) -> None:
    seen: list[tuple[int, int]] = []
    generation = catalog.generate(
        ["red boots", "a coat"], n=2, best_of=3, seed=5, steps=2, callback=lambda *at: seen.append(at)
    )
    assert [result.prompt for result in generation] == ["red boots"] * 2 + ["a coat"] * 2
    assert generation[0].score >= generation[1].score and generation[2].score >= generation[3].score
    assert generation.generated == 6 and seen[-1] == (12, 12)
    alone = catalog.generate("a coat", n=1, seed=generation[2].seed, steps=2)[0]
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(generation[2].image)).max() <= 1
    with pytest.raises(OptionError, match="prompt is ' '"):
        catalog.generate(["coat", " "])


def test_unreadable_source_is_named(catalog: Catalog) -> None:
    with pytest.raises(ImageError, match=r"^mask: .*not an image"):
        catalog.generate("x", like=Image.new("RGB", (9, 9)), mask=b"no")
    with pytest.raises(ImageError, match=r"^like: nowhere\.png"):
        catalog.generate("x", like="nowhere.png")


def test_contact_sheet_shows_each_image(catalog: Catalog) -> None:
    generation = catalog.generate("red boots " * 30, n=5, seed=5, steps=1)
    sheet = np.asarray(contact_sheet(generation))
    assert sheet.shape[1] < 5 * 256  # four in a row
    enlarged = np.asarray(generation[0].image.resize((256, 256), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(sheet[12 : 12 + 256, 12 : 12 + 256], enlarged)
    assert contact_sheet(Generation((), 0.0, 0, {})).width > 0
