"""The frozen judge on renderings that it has never seen, and its refusal of any but the committed weights."""

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
from unidiff_sdk.training.evaluation import judge as judging
from unidiff_sdk.training.evaluation.judge import Judge, attribute_accuracy
from unidiff_sdk.training.evaluation.metrics import cmmd, kid

FRESH_SEED = 980_000  # neither trained on nor used to choose anything


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


# --- is it right? ----------------------------------------------------------------------------------------------------


def test_it_is_right_about_fresh_renderings(judge: Judge, fresh) -> None:
    products, pictures = fresh
    accuracy = attribute_accuracy(judge.attributes(pictures), [p.attributes for p in products])

    assert accuracy["type"] >= 0.97
    assert accuracy["colour"] >= 0.97
    stated = judge.record["accuracy_on_fresh_renderings"]
    assert {name: share for name, share in accuracy.items() if share < stated[name] - 0.05} == {}


def test_it_is_fair_to_pictures_with_the_flaws_of_a_generator(judge: Judge, fresh) -> None:
    products, pictures = fresh
    random = np.random.default_rng(0)
    flawed = []
    for picture in pictures:
        soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8)), np.float32) / 255
        flawed.append(np.clip(soft + random.normal(0.0, 0.03, soft.shape), 0.0, 1.0))
    accuracy = attribute_accuracy(judge.attributes(flawed), [p.attributes for p in products])

    assert accuracy["type"] >= 0.95
    assert accuracy["colour"] >= 0.95


@pytest.mark.parametrize("size", [96, 160])
def test_it_judges_larger_renderings_as_well(judge: Judge, fresh, size: int) -> None:
    products = fresh[0][::6]
    answers = judge.attributes(synthetic.render(product, size) for product in products)
    accuracy = attribute_accuracy(answers, [p.attributes for p in products])

    assert accuracy["type"] >= 0.95
    assert accuracy["colour"] >= 0.95


def test_it_knows_every_label_of_every_catalog(judge: Judge) -> None:
    for attributes in synthetic.ATTRIBUTES.values():
        for name, values in attributes.items():
            assert set(values) <= set(judge.labels[name])


def test_its_distances_tell_real_from_other(judge: Judge, fresh) -> None:
    """Two halves of the real pictures stand at the floor; ruined ones and another mix of products far above it."""
    products, pictures = fresh
    features = judge.features(pictures)
    ruined = judge.features(picture.filter(ImageFilter.GaussianBlur(4)) for picture in pictures[::2])
    women = features[[p.catalog == "fashion-woman" for p in products]]
    men = features[[p.catalog == "fashion-man" for p in products]]
    for distance in (kid, cmmd):
        floor = abs(distance(features[::2], features[1::2]))
        assert distance(ruined, features[1::2]) > 10 * floor
        assert distance(women, men) > 10 * floor


# --- what it takes and gives -----------------------------------------------------------------------------------------


def test_features_have_a_known_shape_and_scale(judge: Judge, fresh) -> None:
    features = judge.features(fresh[1])
    assert features.shape == (300, 128)
    assert features.dtype == np.float32
    assert np.mean(features.var(axis=0)) == pytest.approx(1.0, abs=0.25)
    assert judge.features([]).shape == (0, 128)
    assert judge.attributes([]) == {name: [] for name in judge.labels}


def test_a_picture_is_judged_alike_alone_and_in_any_batch(judge: Judge, fresh) -> None:
    pictures = fresh[1][:20]
    together = judge.features(pictures)

    np.testing.assert_allclose(judge.features(pictures, batch_size=1), together, atol=1e-4)
    np.testing.assert_allclose(judge.features(pictures[::-1], batch_size=7), together[::-1], atol=1e-4)
    assert judge.attributes(pictures, batch_size=3) == judge.attributes(pictures)


def test_the_same_picture_in_any_container_is_the_same(judge: Judge, fresh) -> None:
    picture = fresh[1][0]
    array = np.asarray(picture)
    forms = [picture, picture.convert("RGBA"), array, (array / 255).astype(np.float32), array / 255.0]
    features = judge.features(forms)
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (31, 77), (64, 65), (512, 300)])
def test_any_size_is_taken(judge: Judge, size: tuple[int, int]) -> None:
    assert np.isfinite(judge.features([Image.new("RGB", size, "red")])).all()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"\[h, w, 3\], not \(64, 64\)"),
        (np.zeros((3, 64, 64), np.uint8), r"not \(3, 64, 64\)"),
        (np.zeros((0, 4, 3), np.uint8), r"not \(0, 4, 3\)"),
        (np.full((8, 8, 3), 255.0), "clip them first"),
        (np.full((8, 8, 3), np.nan), "clip them first"),
        (np.zeros((8, 8, 3), np.int32), "not int32"),
    ],
)
def test_what_is_no_picture_is_refused(judge: Judge, picture: np.ndarray, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        judge.features([picture])


def test_accuracy_counts_only_what_a_product_has() -> None:
    answers = {"type": ["mug", "dress", "dress"], "fit": ["slim", "slim", "loose"], "height": ["low", "low", "low"]}
    expected = [
        {"type": "mug", "height": "low", "brand": "Kilnworks"},
        {"type": "dress", "fit": "loose"},
        {"type": "dress", "fit": "loose"},
    ]
    assert attribute_accuracy(answers, expected) == pytest.approx(
        {"type": 1.0, "fit": 0.5, "height": 1.0, "all": 2 / 3}
    )
    with pytest.raises(OptionError, match="each of the 2 products"):
        attribute_accuracy(answers, expected[:2])


# --- is it frozen? ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in (judging.FOLDER / "judge.json", judging.FOLDER / "judge.safetensors"):
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
def test_a_missing_or_broken_record_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match="judge train` makes one"):
        Judge.load(copy)
    (copy / "judge.json").write_text("{")
    with pytest.raises(CheckpointError, match="No usable judge"):
        Judge.load(copy)


def test_it_is_small_and_its_seeds_are_its_own(judge: Judge) -> None:
    assert judge.record["parameters"] <= 250_000
    assert (judging.FOLDER / "judge.safetensors").stat().st_size < 600_000
    assert FRESH_SEED not in (judge.record["recipe"]["seed"], judge.record["check_seed"])
    assert min(judge.record["recipe"]["seed"], judge.record["check_seed"]) >= judging.FIRST_SEED


def test_the_recipe_is_deterministic_and_stores_what_it_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_check = judging.check
    monkeypatch.setattr(judging, "check", lambda judge: full_check(judge, n=24))  # as the real one, on fewer pictures
    recipe = judging.Recipe(renderings=48, epochs=1, batch=16)
    stated = [judging.train(recipe, tmp_path / name) for name in ("once", "again")]
    records = [json.loads((tmp_path / name / "judge.json").read_text()) for name in ("once", "again")]

    assert records[0] == records[1]
    assert records[0]["recipe"]["renderings"] == 48
    assert full_check(Judge.load(tmp_path / "once"), n=24)[0] == stated[0]
