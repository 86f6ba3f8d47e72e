"""NaFlex variants of SigLIP 2: images of any aspect ratio as lists of patches, equal to transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from PIL import Image
from support.odd_images import odd_images
from support.siglip import PATCH, PATCHES, make_naflex, make_naflex_base

from unidiff_export import export_bundle
from unidiff_sdk import Catalog
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Patches
from unidiff_sdk.inference.preprocessing import patch_grid
from unidiff_sdk.training import TrainingConfig, train
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model

TEXTS = ["a red dress", "", "word " * 50]
SMALL = Patches(PATCH, PATCHES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_naflex(tmp_path_factory.mktemp("siglip2") / "naflex")


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    export = export_bundle(None, tmp_path_factory.mktemp("export") / "bundle", clip=folder)
    return Bundle.open(export.path, threads=1)


def one_patch_wide(image: Image.Image, patches: Patches = SMALL) -> bool:
    """Whether an image becomes a column of patches. torch interpolates the positions of these in another way."""
    _, columns = patch_grid(*image.size, patches)
    return columns == 1


def test_preprocessing_equals_the_image_processor(bundle: Bundle, folder: Path) -> None:
    from transformers import AutoImageProcessor

    processor, encoder = AutoImageProcessor.from_pretrained(folder), Encoder(bundle)
    shapes = set()
    for image in odd_images(40):
        expected = processor(image, return_tensors="np")
        packed = encoder.pixels(image)
        np.testing.assert_allclose(packed[:, :-2], expected.pixel_values[0], atol=1e-6)
        np.testing.assert_array_equal(packed[:, -1] > 0, expected.pixel_attention_mask[0])
        np.testing.assert_array_equal(packed[0, -2:], expected.spatial_shapes[0])
        shapes.add(tuple(expected.spatial_shapes[0].tolist()))
    assert len(shapes) > 5 and (1, PATCHES) in shapes


def test_embeddings_equal_those_of_transformers(bundle: Bundle, folder: Path) -> None:
    images = [image for image in odd_images(60) if not one_patch_wide(image)]
    assert len(images) > 30
    assert smallest_cosine(bundle, folder, images) > 0.9999


@pytest.mark.slow
def test_embeddings_at_the_published_size_equal_those_of_transformers(tmp_path: Path) -> None:
    folder = make_naflex_base(tmp_path / "naflex")
    export = export_bundle(None, tmp_path / "bundle", clip=folder)
    images = [image for image in odd_images(40) if not one_patch_wide(image, Patches(16, 256))]
    assert len(images) > 20
    assert smallest_cosine(Bundle.open(export.path, threads=1), folder, images) > 0.9999


def smallest_cosine(bundle: Bundle, folder: Path, images: list[Image.Image]) -> float:
    """Between the embeddings of the SDK and of transformers, of `TEXTS` and images."""
    from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    tokenizer, encoder = PreTrainedTokenizerFast.from_pretrained(folder), Encoder(bundle)
    length = bundle.max_tokens
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids)
        features = model.get_image_features(**processor(images, return_tensors="pt"))
    cosines = []
    for ours, theirs in ((encoder.encode_texts(TEXTS), texts), (encoder.encode_images(images), features)):
        expected = torch.nn.functional.normalize(getattr(theirs, "pooler_output", theirs), dim=-1).numpy()
        cosines.append((ours * expected).sum(axis=1).min())
    return float(min(cosines))


def test_catalog_searches_with_it(bundle: Bundle, tmp_path: Path) -> None:
    images = [
        Image.new("RGB", size, color) for size, color in (((80, 20), "red"), ((20, 90), "blue"), ((50, 50), "teal"))
    ]
    with Catalog(tmp_path / "shop.catalog", bundle=bundle.path) as catalog:
        catalog.add(images, ["red", "blue", "teal"], ["wide", "tall", "square"])
        for image, id in zip(images, ("wide", "tall", "square"), strict=True):
            assert catalog.search(image=image, limit=1)[0].id == id


def test_manifest_states_the_patches(bundle: Bundle) -> None:
    assert bundle.image_patches == Patches(PATCH, PATCHES, "bilinear")
    inputs = bundle.manifest.graphs["image_encoder"].inputs
    assert {name: spec.shape[1:] for name, spec in inputs.items()} == {
        "pixel_values": (PATCHES, 3 * PATCH**2),
        "pixel_attention_mask": (PATCHES,),
        "spatial_shapes": (2,),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, "patch_size 16 of the image preprocessing must be 8"),
        ({"do_resize": False}, "do_resize False"),
        ({"max_num_patches": 10**9}, "max_num_patches 1000000000"),
        ({"image_processor_type": "SiglipImageProcessor"}, "is for another model"),
    ],
)
def test_preprocessing_that_is_not_followed_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_search_model(make_naflex(tmp_path / "naflex", **change))


def test_training_is_refused_by_name(folder: Path, small_catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NaFlex variant of SigLIP 2, which can be exported but not trained"):
        train(small_catalog, folder, tmp_path / "out", TrainingConfig(lambda_is=0), device="cpu")
