"""The frozen judge: accuracy on new renderings, accepted inputs, and the check of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.datasets import synthetic
from unidiff_sdk.errors import CheckpointError, OptionError
from unidiff_sdk.training.evaluation.judge import FOLDER, Judge, attribute_accuracy
from unidiff_sdk.training.evaluation.metrics import cmmd, kid
from unidiff_sdk.training.recipes import judge as recipe_module

FRESH_SEED = 980_000  # used neither for training nor for any choice


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def fresh() -> tuple[list[synthetic.Product], list[Image.Image]]:
    """300 products: every catalog, val combinations and unseen ones."""
    chosen = [
        product
        for name in synthetic.CATALOGS
        for split, n in (("val", 80), ("test-unseen", 20))
        for product in synthetic.products(name, n, FRESH_SEED, split)
    ]
    return chosen, [synthetic.render(product, 64) for product in chosen]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_on_new_renderings(judge: Judge, fresh) -> None:
    products, images = fresh
    accuracy = attribute_accuracy(judge.attributes(images), [p.attributes for p in products])

    assert accuracy["type"] >= 0.97
    assert accuracy["colour"] >= 0.97
    stated = judge.record["accuracy_on_fresh_renderings"]
    assert {name: share for name, share in accuracy.items() if share < stated[name] - 0.05} == {}


def test_accuracy_on_blurred_and_noisy_images(judge: Judge, fresh) -> None:
    products, images = fresh
    random = np.random.default_rng(0)
    flawed = []
    for image in images:
        soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32) / 255
        flawed.append(np.clip(soft + random.normal(0.0, 0.03, soft.shape), 0.0, 1.0))
    accuracy = attribute_accuracy(judge.attributes(flawed), [p.attributes for p in products])

    assert accuracy["type"] >= 0.95
    assert accuracy["colour"] >= 0.95


@pytest.mark.parametrize("size", [96, 160])
def test_accuracy_on_larger_renderings(judge: Judge, fresh, size: int) -> None:
    products = fresh[0][::6]
    predicted = judge.attributes(synthetic.render(product, size) for product in products)
    accuracy = attribute_accuracy(predicted, [p.attributes for p in products])

    assert accuracy["type"] >= 0.95
    assert accuracy["colour"] >= 0.95


def test_it_knows_every_label_of_every_catalog(judge: Judge) -> None:
    for attributes in synthetic.ATTRIBUTES.values():
        for name, values in attributes.items():
            assert set(values) <= set(judge.labels[name])


def test_its_distances_tell_real_from_other(judge: Judge, fresh) -> None:
    """Two halves of the real images stand at the floor; ruined ones and another mix of products far above it."""
    products, images = fresh
    features = judge.features(images)
    ruined = judge.features(image.filter(ImageFilter.GaussianBlur(4)) for image in images[::2])
    women = features[[p.catalog == "fashion-woman" for p in products]]
    men = features[[p.catalog == "fashion-man" for p in products]]
    for distance in (kid, cmmd):
        floor = abs(distance(features[::2], features[1::2]))
        assert distance(ruined, features[1::2]) > 10 * floor
        assert distance(women, men) > 10 * floor


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def test_features_have_a_known_shape_and_scale(judge: Judge, fresh) -> None:
    features = judge.features(fresh[1])
    assert features.shape == (300, 128)
    assert features.dtype == np.float32
    assert np.mean(features.var(axis=0)) == pytest.approx(1.0, abs=0.25)
    assert judge.features([]).shape == (0, 128)
    assert judge.attributes([]) == {name: [] for name in judge.labels}


def test_result_does_not_depend_on_the_batch(judge: Judge, fresh) -> None:
    images = fresh[1][:20]
    together = judge.features(images)

    np.testing.assert_allclose(judge.features(images, batch_size=1), together, atol=1e-4)
    np.testing.assert_allclose(judge.features(images[::-1], batch_size=7), together[::-1], atol=1e-4)
    assert judge.attributes(images, batch_size=3) == judge.attributes(images)


def test_result_does_not_depend_on_the_image_type(judge: Judge, fresh) -> None:
    image = fresh[1][0]
    array = np.asarray(image)
    forms = [image, image.convert("RGBA"), array, (array / 255).astype(np.float32), array / 255.0]
    features = judge.features(forms)
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (31, 77), (64, 65), (512, 300)])
def test_any_image_size_is_accepted(judge: Judge, size: tuple[int, int]) -> None:
    assert np.isfinite(judge.features([Image.new("RGB", size, "red")])).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"\[h, w, 3\], not \(64, 64\)"),
        (np.zeros((3, 64, 64), np.uint8), r"not \(3, 64, 64\)"),
        (np.zeros((0, 4, 3), np.uint8), r"not \(0, 4, 3\)"),
        (np.full((8, 8, 3), 255.0), "Clip the values first"),
        (np.full((8, 8, 3), np.nan), "Clip the values first"),
        (np.zeros((8, 8, 3), np.int32), "not int32"),
    ],
)
def test_invalid_images_are_refused(judge: Judge, image: np.ndarray, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        judge.features([image])


def test_attribute_accuracy_counts_only_the_attributes_of_a_product() -> None:
    predicted = {"type": ["mug", "dress", "dress"], "fit": ["slim", "slim", "loose"], "height": ["low", "low", "low"]}
    expected = [
        {"type": "mug", "height": "low", "brand": "Kilnworks"},
        {"type": "dress", "fit": "loose"},
        {"type": "dress", "fit": "loose"},
    ]
    assert attribute_accuracy(predicted, expected) == pytest.approx(
        {"type": 1.0, "fit": 0.5, "height": 1.0, "all": 2 / 3}
    )
    with pytest.raises(OptionError, match="each of the 2 products"):
        attribute_accuracy(predicted, expected[:2])


# --- frozen weights --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in (FOLDER / "judge.json", FOLDER / "judge.safetensors"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_changed_weights_are_refused(copy: Path) -> None:
    Judge.load(copy)
    weights = copy / "judge.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed judge do not compare\. Restore"):
        Judge.load(copy)


@pytest.mark.parametrize("name", ["judge.json", "judge.safetensors"])
def test_missing_or_broken_files_are_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=r"recipes\.judge train"):
        Judge.load(copy)
    (copy / "judge.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds no usable judge"):
        Judge.load(copy)


def test_size_and_seeds(judge: Judge) -> None:
    assert judge.record["parameters"] <= 250_000
    assert (FOLDER / "judge.safetensors").stat().st_size < 600_000
    assert FRESH_SEED not in (judge.record["recipe"]["seed"], judge.record["check_seed"])
    assert min(judge.record["recipe"]["seed"], judge.record["check_seed"]) >= recipe_module.FIRST_SEED


def test_recipe_is_deterministic_and_states_the_accuracy_of_the_saved_weights(tmp_path: Path) -> None:
    recipe = recipe_module.Recipe(renderings=48, epochs=1, batch=16)
    stated = [recipe_module.train(recipe, tmp_path / name, check_renderings=24) for name in ("once", "again")]
    records = [json.loads((tmp_path / name / "judge.json").read_text()) for name in ("once", "again")]

    assert records[0] == records[1]
    assert records[0]["recipe"]["renderings"] == 48
    assert recipe_module.check(Judge.load(tmp_path / "once"), n=24)[0] == stated[0]
