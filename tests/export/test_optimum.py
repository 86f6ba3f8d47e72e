"""Our bundles in optimum's pipelines, and optimum's exports in our runtime. Run with `make test-optimum`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx; run make test-optimum")

import torch
from diffusers import DDIMScheduler
from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionPipeline

from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.encoder import load_tokenizer, token_ids

CHECKPOINT = TINY.parents[1] / "training" / "recipes" / "tiny_checkpoint"
PROMPTS = ["a red striped dress", "purple dotted boots"]
STEPS, GUIDANCE = 10, 4.0
EQUAL_DB = 40.0


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    bundle = Bundle.open("tiny")
    latent = bundle.manifest.latent
    shape = (len(PROMPTS), latent.channels, latent.size, latent.size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported by optimum."""
    folder = tmp_path_factory.mktemp("optimum") / "tiny"
    ORTStableDiffusionPipeline.from_pretrained(str(CHECKPOINT), export=True).save_pretrained(folder)
    return folder


def ours(bundle: Bundle, noise: np.ndarray) -> list[np.ndarray]:
    images = Generator(bundle).generate(PROMPTS, latents=noise, steps=STEPS, guidance_scale=GUIDANCE, sampler="ddim")
    return [np.asarray(image) for image in images]


def theirs(pipeline: Any, noise: np.ndarray) -> list[np.ndarray]:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        PROMPTS, latents=torch.from_numpy(noise), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pil"
    )
    return [np.asarray(image) for image in result.images]


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    mean_square = float(np.mean((a.astype(float) - b) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def assert_equal_images(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.std() > 5  # not a plain color
        assert psnr_db(a, b) >= EQUAL_DB
    assert psnr_db(first[0], second[1]) < 30  # another prompt with other noise


@pytest.mark.parametrize("pipeline_class", [ORTDiffusionPipeline, ORTStableDiffusionPipeline])
def test_optimum_generates_with_our_bundle(pipeline_class: Any, noise: np.ndarray) -> None:
    """optimum's pipelines pass one timestep for all samples, float32[1]; our UNet expands it to the batch."""
    pipeline = pipeline_class.from_pretrained(str(TINY))
    assert isinstance(pipeline, ORTStableDiffusionPipeline)
    assert_equal_images(ours(Bundle.open("tiny"), noise), theirs(pipeline, noise))


def test_our_runtime_generates_with_an_export_of_optimum(exported: Path, noise: np.ndarray) -> None:
    bundle = Bundle.open(exported)
    assert_equal_images(ours(bundle, noise), ours(Bundle.open("tiny"), noise))
    assert_equal_images(ours(bundle, noise), theirs(ORTStableDiffusionPipeline.from_pretrained(str(exported)), noise))


def test_both_vae_encoders_agree(exported: Path) -> None:
    pixels = {"sample": np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)}
    a, b = (Bundle.open(path).session("vae_encoder").run(pixels)["latent_sample"] for path in (exported, TINY))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_tokens_agree_with_transformers(exported: Path) -> None:
    """optimum writes a vocabulary and merges instead of tokenizer.json."""
    from transformers import CLIPTokenizerFast

    texts = [*PROMPTS, "", "Ünïcode — 日本", "don't   SHOUT", "long " * 60]
    bundle = Bundle.open(exported)
    assert not (exported / "tokenizer" / "tokenizer.json").exists()
    tokens = CLIPTokenizerFast.from_pretrained(exported / "tokenizer")(
        texts, padding="max_length", max_length=bundle.prompt_tokens, truncation=True, return_tensors="np"
    )
    tokenizer = load_tokenizer(exported / "tokenizer", bundle.prompt_tokens)
    np.testing.assert_array_equal(token_ids(tokenizer, texts), tokens["input_ids"])


def test_clip_graphs_have_the_names_of_optimum() -> None:
    """Transformers.js expects the same names: `input_ids` -> `text_embeds`, `pixel_values` -> `image_embeds`.

    Neither passes an `attention_mask` to a graph without one, which a causal tower does not need.
    """
    from optimum.exporters.onnx.model_configs import CLIPOnnxConfig, CLIPTextWithProjectionOnnxConfig
    from transformers import CLIPConfig

    both = CLIPOnnxConfig(CLIPConfig(), task="feature-extraction")
    text = CLIPTextWithProjectionOnnxConfig(CLIPConfig().text_config)
    encoders = {name: Bundle.open("tiny").session(name) for name in ("text_encoder", "image_encoder")}
    inputs = {name: list(session.inputs) for name, session in encoders.items()}
    outputs = {name: list(session.outputs) for name, session in encoders.items()}
    assert inputs["text_encoder"] == list(text.inputs) == ["input_ids"]
    assert set(outputs["text_encoder"]) == set(text.outputs) == {"text_embeds", "last_hidden_state"}
    assert inputs["image_encoder"] == ["pixel_values"] and "pixel_values" in both.inputs
    assert outputs["image_encoder"] == ["image_embeds"] and "image_embeds" in both.outputs
