"""Encoders without a generator: preprocessing as in transformers, and folders that are refused by what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra")

from support.odd_images import odd_images
from support.siglip import SIZE, TOKENS, make_siglip, write_gemma_tokenizer

from unidiff_sdk._internal.images import load_image
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.inference.preprocessing import preprocess
from unidiff_sdk.training.checkpoints.encoders.image_preprocessing import image_input, image_processor_class
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model
from unidiff_sdk.training.checkpoints.encoders.siglip import siglip_tokenizer

SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip") / "published")


@pytest.mark.parametrize(
    ("kind", "steps", "resize"),
    [
        ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, None),
        ("CLIP", {"size": {"shortest_edge": 39}, "crop_size": SQUARE, "resample": 2}, Resize(39, False, "bilinear")),
        ("CLIP", {"size": {"shortest_edge": 27}, "crop_size": SQUARE}, Resize(27)),  # padded with black
        ("CLIP", {"size": SQUARE, "do_center_crop": False, "resample": 1}, Resize(32, True, "lanczos")),
        ("CLIP", {"size": {"height": 41, "width": 41}, "crop_size": SQUARE}, Resize(41, True)),
        ("Bit", {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "do_normalize": False}, None),
        ("Siglip", {"size": SQUARE, "rescale_factor": 1 / 127.5}, Resize(32, True)),
        ("ViT", {"size": SQUARE, "image_std": [0.2, 0.3, 0.4]}, Resize(32, True, "bilinear")),
        ("ViT", {"size": SQUARE, "resample": 0, "do_rescale": False}, Resize(32, True, "nearest")),
    ],
)
def test_pixels_equal_those_of_transformers(kind: str, steps: dict[str, Any], resize: Resize | None) -> None:
    processor = image_processor_class(f"{kind}ImageProcessor")(**steps)
    image = image_input(processor, 32)
    assert (image.size, image.resize) == (32, resize)
    mean, std = np.float32(image.mean), np.float32(image.std)
    for each in odd_images(160):
        given = each if processor.do_convert_rgb else load_image(each)  # ViT's leaves the conversion to the caller
        expected = processor(given, return_tensors="np")["pixel_values"][0]
        actual = preprocess(load_image(each), 32, mean, std, resize=image.resize)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=str(each))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize False of the image preprocessing is not supported, only True"),
        ({"do_pad": True}, "do_pad True"),
        ({"size": {"shortest_edge": 24, "longest_edge": 48}}, r"size \{.*longest_edge.* is not supported: images must"),
        ({"size": {"height": 24, "width": 20}}, "an equal width"),
        ({"size": {"height": 9000, "width": 9000}}, "must be 1 to 4,096 pixels"),
        ({"size": {"shortest_edge": 24}}, r"returns \{'shortest_edge': 24\}, but the image encoder takes"),
        ({"size": {"height": 28, "width": 28}}, r"returns \{'height': 28, .* but the image encoder takes"),
        ({"resample": 9}, "resample 9 of the image preprocessing is not a filter"),
        ({"image_std": [0, 1, 1]}, "image_std .* must be above 0"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "'ConvNextImageProcessor' is not supported, only that of"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "'Siglip2ImageProcessor' is for another model"),
    ],
)
def test_preprocessing_that_is_not_followed_is_named(
    siglip: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "model"))
    with pytest.raises(CheckpointError, match=message):
        load_search_model(changed(folder, "preprocessor_config.json", change))


def test_siglip_is_loaded(siglip: Path) -> None:
    model = load_search_model(siglip)
    assert model.is_siglip and (model.dim, model.image_size, model.name) == (32, SIZE, "published")
    assert model.image_input().resize == Resize(SIZE, squash=True)
    ids = model.tokenizer(["A photo, of a DRESS!"], padding="max_length", truncation=True).input_ids
    assert ids == [[2, 5, 6, 2, 4, 1, 1, 1, 1, 1]]


def test_tokenizer_of_siglip_2_is_kept(siglip: Path, tmp_path: Path) -> None:
    """A tokenizer of Gemma: what the export writes and the runtime reads returns the tokens of transformers."""
    from transformers import AutoTokenizer

    from unidiff_sdk.inference.encoder import load_tokenizer, token_ids

    write_gemma_tokenizer(Path(shutil.copytree(siglip, tmp_path / "model")))
    tokenizer = siglip_tokenizer(tmp_path / "model")
    tokenizer.model_max_length = TOKENS
    tokenizer.save_pretrained(tmp_path / "written")
    texts = ["a Red dress, 日 ☃", "", "red " * 30, "<eos> a"]
    reference = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = reference(texts, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    assert token_ids(load_tokenizer(tmp_path / "written", TOKENS), texts).tolist() == expected


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "siglip2"}, "'SiglipImageProcessor' is for another model"),
        ("config.json", {"model_type": "blip"}, "model_type is 'blip', but only clip and siglip"),
        ("config.json", {"text_config": None}, "has no text_config"),
        ("config.json", {"text_config": {"projection_size": 7}}, "returns 7 dimensions and the image encoder 32"),
        ("config.json", {"vision_config": {"vision_use_head": False}}, r"no pooling head \(vision_use_head is false\)"),
        (
            "config.json",
            {"vision_config": {"image_size": [24, 32]}},
            r"image_size is \[24, 32\]; only models for",
        ),
        (
            "tokenizer_config.json",
            {"padding_side": "left"},
            "padding_side is 'left', but texts are padded",
        ),
        ("tokenizer_config.json", {"pad_token": None}, "names no pad_token"),
        ("tokenizer.json", None, r"has no tokenizer\.json\. A SentencePiece model alone is not read"),
        ("preprocessor_config.json", None, "Missing: preprocessor_config.json"),
        ("config.json", None, r"has no config\.json\. Name the folder of a CLIP or SigLIP"),
    ],
)
def test_siglip_that_is_not_supported_is_refused(
    siglip: Path, tmp_path: Path, file: str, change: dict[str, Any] | None, message: str
) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "model"))
    with pytest.raises(CheckpointError, match=message):
        load_search_model(changed(folder, file, change))


@pytest.mark.parametrize("place", ["", "0_CLIPModel"])
def test_clip_of_sentence_transformers_is_found(random_checkpoint: Path, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "clip-ViT"
    shutil.copytree(random_checkpoint / "clip", folder / place)
    write_modules(folder, ("sentence_transformers.models.CLIPModel", place), ("sentence_transformers.Normalize", "1"))
    model = load_search_model(folder)
    assert (model.name, model.dim, model.folder) == ("clip-ViT", 32, folder / place)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("sentence_transformers.models.Transformer", "")], "lists the modules Transformer, but only CLIPModel can"),
        ([("models.CLIPModel", ""), ("models.Dense", "2_Dense")], "lists the modules CLIPModel, Dense"),
        ([("models.CLIPModel", "../other")], r"names the folder '\.\./other', which is not a plain path"),
        ([], "lists the modules , but"),
    ],
)
def test_other_modules_of_sentence_transformers_are_refused(
    tmp_path: Path, modules: list[tuple[str, str]], message: str
) -> None:
    write_modules(tmp_path, *modules)
    with pytest.raises(CheckpointError, match=message):
        load_search_model(tmp_path)


def changed(folder: Path, file: str, change: dict[str, Any] | None) -> Path:
    """The folder after a change of sections of a file, which is deleted for None."""
    if change is None:
        (folder / file).unlink()
        return folder
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    for name, value in change.items():
        section = content.get(name)
        nested = name.endswith("_config") and isinstance(value, dict)
        content[name] = section | value if nested else value
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_modules(folder: Path, *modules: tuple[str, str]) -> None:
    content = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(content), encoding="utf-8")
