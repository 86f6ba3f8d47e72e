"""Textual inversion for Stable Diffusion XL: a token with vectors for both text encoders, as diffusers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from safetensors.torch import load_file, save_file
from support.random_checkpoint import CAPTIONS, WIDTH
from support.random_sdxl import LARGER, make_random_sdxl

from unidiff_export import export_bundle
from unidiff_export.verification import psnr_db
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions

PROMPTS = ["a red glow dress", "green boots"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Only prompts know the added tokens"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_random_sdxl(tmp_path_factory.mktemp("checkpoint") / "xl")
    (folder / "unidiff.json").write_text(json.dumps({"captions": list(CAPTIONS)}), encoding="utf-8")
    return folder


def vectors(first: int = 2, second: int = 2) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = {"clip_l": (first, WIDTH), "clip_g": (second, LARGER)}
    return {name: 0.5 * torch.randn(size, generator=random) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inversion") / "glow.safetensors"
    save_file(vectors(), file)
    return file


def by_diffusers(folder: Path, file: Path | None) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if file is not None:
        tensors = load_file(file)
        for name, number in (("clip_l", ""), ("clip_g", "_2")):
            own = {part: getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(tensors[name], token="glow", **own)
    return pipeline


def test_tokens_and_vectors_are_those_of_diffusers(folder: Path, file: Path) -> None:
    loaded = load_base(folder, options=BaseOptions.of(textual_inversion=[file]))
    pipeline = by_diffusers(folder, file)
    assert loaded.second is not None
    for ours, theirs in ((loaded.tokenizer, pipeline.tokenizer), (loaded.second.tokenizer, pipeline.tokenizer_2)):
        assert ours.get_vocab() == theirs.get_vocab() and "glow_1" in ours.get_vocab()
    for model, reference in (
        (loaded.text_encoder, pipeline.text_encoder),
        (loaded.second.model, pipeline.text_encoder_2),
    ):
        expected = reference.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert "glow" not in loaded.clip_tokenizer.get_vocab(), "search keeps its vocabulary"
    assert loaded.meta["textual_inversions"] == [{"name": "glow.safetensors", "token": "glow"}]


def test_bundle_generates_the_images_of_diffusers(folder: Path, file: Path, tmp_path: Path) -> None:
    export = export_bundle(folder, tmp_path / "bundle", textual_inversion=[file])
    generator = Generator(Bundle.open(export.path, threads=1))
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 16), dtype=np.float32)
    settings: dict[str, Any] = {"guidance_scale": 4.0}
    ours = generator.generate(PROMPTS, latents=latents, steps=3, sampler="euler", **settings)
    settings |= {"latents": torch.from_numpy(latents), "num_inference_steps": 3}
    theirs, plain = (by_diffusers(folder, each)(PROMPTS, **settings).images for each in (file, None))
    images = [[np.asarray(image) for image in each] for each in (ours, theirs, plain)]
    for image, expected in zip(*images[:2], strict=True):
        assert psnr_db(image, expected) >= 40
    assert psnr_db(images[0][0], images[2][0]) < 40, "the token must change the image of the prompt that has it"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"<shoe>": torch.ones(WIDTH)},
            r"it holds vectors for one text encoder, but SDXL has two \(clip_l and clip_g\)",
        ),
        (vectors(1, 2), "it has 2 in clip_g and 1 in clip_l"),
        (vectors() | {"clip_g": torch.ones(2, LARGER + 1)}, f"but the text encoder has width {LARGER}"),
        (vectors() | {"clip_l": torch.full((2, WIDTH), torch.nan)}, "not finite"),
        (vectors() | {"other": torch.ones(2)}, "it holds 3 tensors instead of one, or of clip_l and clip_g"),
    ],
    ids=["one-encoder", "other-counts", "other-width", "nan", "more"],
)
def test_files_that_do_not_fit_are_refused(folder: Path, tensors: dict, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_base(folder, options=BaseOptions.of(textual_inversion=[tmp_path / "bad.safetensors"]))
