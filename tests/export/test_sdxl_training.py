"""Stable Diffusion XL from training to images: the checkpoint in diffusers, its adapters, and the exported bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from safetensors import safe_open
from support.random_sdxl import make_random_sdxl
from support.tuned_pipelines import changed_tensors, generated_by

from unidiff_export import export_bundle
from unidiff_export.verification import psnr_db
from unidiff_sdk import Catalog
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.training import DistillationConfig, TrainingConfig, Validator, distill, evaluate, train
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

PROMPT = "a red dress"
LORA: dict[str, Any] = {"lora_unet": 4, "lora_text": 4, "lora_image": 4}
SETTINGS: dict[str, Any] = {"batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sdxl(tmp_path_factory.mktemp("base") / "xl")


@pytest.fixture(scope="module")
def tuned(base: Path, small_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned by adapters with ITC, IS and score consistency on hard negatives."""
    consistency = {"lambda_rsc_encoder": 0.3, "lambda_rsc_generator": 0.3, "hard_negatives": 1, "rsc_warmup_steps": 0}
    config = TrainingConfig(steps=4, **SETTINGS, **LORA, **consistency)
    out = tmp_path_factory.mktemp("runs") / "lora"
    validator = Validator(small_catalog, steps=2, prompts=[PROMPT])
    result = train(
        small_catalog, base, out, config, device="cpu", on_validate=validator, latents=out.parent / "latents"
    )
    assert set(result.losses) == {"itc", "is", "rsc_encoder", "rsc_generator"}
    return out


def pipeline_of(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(width: int = 32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 4, 16, width // 2), dtype=np.float32)


def test_checkpoint_is_a_pipeline_of_diffusers_with_the_trained_weights(base: Path, tuned: Path) -> None:
    checkpoint, pipeline = load_checkpoint(tuned), pipeline_of(tuned)
    assert checkpoint.second and checkpoint.second.zero_negative and checkpoint.shared
    assert pipeline.config.force_zeros_for_empty_prompt and pipeline.tokenizer_2.pad_token == "!"
    parts = {
        "unet": (pipeline.unet, checkpoint.unet),
        "text_encoder": (pipeline.text_encoder, checkpoint.text_encoder),
        "text_encoder_2": (pipeline.text_encoder_2, checkpoint.second.model),
    }
    before = pipeline_of(base)
    for name, (theirs, ours) in parts.items():
        assert changed_tensors(theirs, ours, getattr(before, name)), name


@pytest.mark.slow
def test_bundle_of_the_tuned_model_generates_the_images_of_diffusers(
    tuned: Path, base: Path, small_catalog: Path, tmp_path: Path
) -> None:
    """Train, export, generate; also at another aspect ratio. The export itself is verified with the run's captions."""
    export = export_bundle(tuned, tmp_path / "bundle")
    bundle = Bundle.open(export.path, threads=1)
    for options in ({}, {"width": 48, "height": 32}):
        latents = noise(options.get("width", 32))
        (ours,) = Generator(bundle).generate(PROMPT, latents=latents, steps=4, guidance_scale=5.0, **options)
        theirs, untuned = (generated_by(pipeline_of(folder), PROMPT, latents, **options) for folder in (tuned, base))
        assert psnr_db(np.asarray(ours), theirs) > 50
        assert psnr_db(theirs, untuned) < 40, "training changed the images"
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(small_catalog)
        assert len(catalog.search(PROMPT, limit=4, rerank=3)) == 4


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_adapters_load_into_the_base_by_diffusers(base: Path, tuned: Path, file: str) -> None:
    """With them, the base generates the images of the tuned checkpoint."""
    adapters = tuned / "adapters" / file
    with safe_open(adapters, "pt") as tensors:
        keys = set(tensors.keys())
    parts = (
        ("lora_unet_", "lora_te1_", "lora_te2_") if "kohya" in file else ("unet.", "text_encoder.", "text_encoder_2.")
    )
    assert {next(part for part in parts if key.startswith(part)) for key in keys} == set(parts)
    pipeline = pipeline_of(base)
    plain = generated_by(pipeline, PROMPT, noise())
    pipeline.load_lora_weights(adapters)
    adapted, expected = generated_by(pipeline, PROMPT, noise()), generated_by(pipeline_of(tuned), PROMPT, noise())
    assert psnr_db(adapted, expected) > 50 > 40 > psnr_db(plain, expected)


def test_interrupted_run_resumes_bit_for_bit(base: Path, small_catalog: Path, tmp_path: Path) -> None:
    """All weights are tuned, those of both text encoders as well."""
    config = TrainingConfig(steps=4, save_every=2, **SETTINGS)
    train(small_catalog, base, tmp_path / "whole", config, device="cpu")

    def interrupt(report: Any) -> None:
        if report.step == 2:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, base, tmp_path / "parts", config, device="cpu", on_step=interrupt)
    train(small_catalog, base, tmp_path / "parts", config, device="cpu", resume=True)
    for part in ("unet", "text_encoder", "text_encoder_2", "clip"):
        (file,) = (tmp_path / "whole" / part).glob("*.safetensors")
        assert file.read_bytes() == (tmp_path / "parts" / part / file.name).read_bytes(), part
    start = pipeline_of(base).text_encoder_2.state_dict()
    after = pipeline_of(tmp_path / "parts").text_encoder_2.state_dict()
    assert all(not torch.equal(start[name], after[name]) for name in ("text_projection.weight", next(iter(start))))
    index = json.loads((tmp_path / "parts" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionXLPipeline" and "safety_checker" not in index
    card = (tmp_path / "parts" / "README.md").read_text(encoding="utf-8")
    assert "StableDiffusionXLPipeline.from_pretrained" in card


def test_tuned_checkpoint_is_evaluated_and_distilled(tuned: Path, small_catalog: Path, tmp_path: Path) -> None:
    figures = evaluate(tuned, small_catalog, device="cpu", prompts=0).figures
    assert 0 <= figures["retrieval"]["text_to_image"]["R@1"] <= 1
    config = DistillationConfig(steps=2, batch_size=2, trajectories=2, teacher_steps=4, student_steps=2)
    student = distill(tuned, small_catalog, tmp_path / "fast", config, device="cpu")
    pipeline = pipeline_of(student.path)
    assert generated_by(pipeline, PROMPT, noise()).shape == (32, 32, 3)
    before, after = (load_checkpoint(path) for path in (tuned, student.path))
    assert after.sampler_defaults["steps"] == 2
    assert before.second and after.second
    ours = after.second.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in before.second.model.state_dict().items())
