"""Stable Diffusion 3 from training to images: the checkpoint in diffusers, its adapters, and the exported bundle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from safetensors import safe_open
from support.pipeline_folders import change_json
from support.random_sd3 import make_random_sd3
from support.tuned_pipelines import changed_tensors, generated_by

from unidiff_export import export_bundle
from unidiff_export.verification import psnr_db
from unidiff_sdk import Catalog
from unidiff_sdk.errors import CheckpointError, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.training import PriorConfig, TrainingConfig, Validator, distill, evaluate, train
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

PROMPT = "a red dress"
LORA: dict[str, Any] = {"lora_unet": 4, "lora_text": 4, "lora_image": 4}
SETTINGS: dict[str, Any] = {"batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 1}
ABSENT = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sd3(tmp_path_factory.mktemp("base") / "sd3")


@pytest.fixture(scope="module")
def with_third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a T5."""
    return make_random_sd3(tmp_path_factory.mktemp("base") / "third", third=True)


@pytest.fixture(scope="module")
def tuned(base: Path, small_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned by adapters with ITC, IS, score consistency and the reward on hard negatives."""
    rsc = {"lambda_rsc_encoder": 0.3, "lambda_rsc_generator": 0.3, "lambda_rsc_reward": 0.1, "rsc_reward_steps": 2}
    rsc |= {"rsc_warmup_steps": 0}
    config = TrainingConfig(steps=4, hard_negatives=1, **SETTINGS, **LORA, **rsc)
    out = tmp_path_factory.mktemp("runs") / "lora"
    validator = Validator(small_catalog, steps=2, prompts=[PROMPT])
    result = train(
        small_catalog, base, out, config, device="cpu", on_validate=validator, latents=out.parent / "latents"
    )
    assert set(result.losses) == {"itc", "is", "rsc_encoder", "rsc_generator", "rsc_reward"}
    return out


def pipeline_of(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    absent = {} if (folder / "text_encoder_3").is_dir() else ABSENT
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(width: int = 32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 16, 16, width // 2), dtype=np.float32)


def test_checkpoint_is_a_pipeline_of_diffusers_with_the_trained_weights(base: Path, tuned: Path) -> None:
    """The text encoder keeps sharing CLIP's text side, with its adapted projection."""
    checkpoint, pipeline = load_checkpoint(tuned), pipeline_of(tuned)
    assert checkpoint.second and checkpoint.third is None and pipeline.tokenizer_2.pad_token == "!"
    assert checkpoint.shared and checkpoint.text_encoder.text_projection is checkpoint.clip.text_projection
    parts = {
        "transformer": (pipeline.transformer, checkpoint.unet),
        "text_encoder": (pipeline.text_encoder, checkpoint.text_encoder),
        "text_encoder_2": (pipeline.text_encoder_2, checkpoint.second.model),
    }
    before = pipeline_of(base)
    for name, (theirs, ours) in parts.items():
        changed = changed_tensors(theirs, ours, getattr(before, name))
        assert changed, name
        assert ("text_projection.weight" in changed) is (name == "text_encoder")
    card = (tuned / "README.md").read_text(encoding="utf-8")
    assert 'StableDiffusion3Pipeline.from_pretrained("CHECKPOINT", text_encoder_3=None, tokenizer_3=None)' in card


@pytest.mark.slow
def test_bundle_of_the_tuned_model_generates_the_images_of_diffusers(
    tuned: Path, base: Path, small_catalog: Path, tmp_path: Path
) -> None:
    """Train, export, generate; also at another aspect ratio."""
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    change_json("unidiff.json", captions=[PROMPT, "a blue coat"])(copy)  # of 16 in the run: seconds instead of a minute
    export = export_bundle(copy, tmp_path / "bundle")
    bundle = Bundle.open(export.path, threads=1)
    assert bundle.manifest.embedding.shared_text_encoder
    for options in ({}, {"width": 48, "height": 32}):
        latents = noise(options.get("width", 32))
        (ours,) = Generator(bundle).generate(PROMPT, latents=latents, steps=4, guidance_scale=5.0, **options)
        theirs, untuned = (generated_by(pipeline_of(folder), PROMPT, latents, **options) for folder in (tuned, base))
        assert psnr_db(np.asarray(ours), theirs) > 50
        assert psnr_db(theirs, untuned) < 40, "training changed the images"
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(small_catalog)
        assert len(catalog.search(PROMPT, limit=4, rerank=3)) == 4


def test_adapters_load_into_the_base_by_diffusers(base: Path, tuned: Path) -> None:
    """With them, the base generates the images of the tuned checkpoint. The format of kohya is not written."""
    from peft import PeftModel

    adapters = tuned / "adapters"
    assert {file.name for file in adapters.iterdir()} == {
        *("pytorch_lora_weights.safetensors", "clip", "text_encoder_2", "transformer")
    }
    with safe_open(adapters / "pytorch_lora_weights.safetensors", "pt") as tensors:
        assert {key.partition(".")[0] for key in tensors.keys()} == {"transformer", "text_encoder", "text_encoder_2"}  # noqa: SIM118
    pipeline = pipeline_of(base)
    plain = generated_by(pipeline, PROMPT, noise())
    pipeline.load_lora_weights(adapters)
    adapted, expected = generated_by(pipeline, PROMPT, noise()), generated_by(pipeline_of(tuned), PROMPT, noise())
    assert psnr_db(adapted, expected) > 50 > 40 > psnr_db(plain, expected)
    merged = PeftModel.from_pretrained(pipeline_of(base).transformer, adapters / "transformer").merge_and_unload()
    for name, tensor in pipeline_of(tuned).transformer.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)


def test_interrupted_run_resumes_bit_for_bit(with_third: Path, small_catalog: Path, tmp_path: Path) -> None:
    """All weights are tuned except those of the T5, which the checkpoint keeps."""
    config = TrainingConfig(steps=4, save_every=2, **SETTINGS)
    train(small_catalog, with_third, tmp_path / "whole", config, device="cpu")

    def interrupt(report: Any) -> None:
        if report.step == 2:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, with_third, tmp_path / "parts", config, device="cpu", on_step=interrupt)
    train(small_catalog, with_third, tmp_path / "parts", config, device="cpu", resume=True)
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "clip"):
        (file,) = (tmp_path / "whole" / part).glob("*.safetensors")
        assert file.read_bytes() == (tmp_path / "parts" / part / file.name).read_bytes(), part
    before, after = pipeline_of(with_third), pipeline_of(tmp_path / "parts")
    for name, tensor in before.text_encoder_3.state_dict().items():
        assert torch.equal(tensor, after.text_encoder_3.state_dict()[name])
    assert before.tokenizer_3(PROMPT).input_ids == after.tokenizer_3(PROMPT).input_ids
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        start, end = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start), part
    assert generated_by(after, PROMPT, noise()).shape == (32, 32, 3)
    index = json.loads((tmp_path / "parts" / "model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"] and "unet" not in index
    card = (tmp_path / "parts" / "README.md").read_text(encoding="utf-8")
    assert 'StableDiffusion3Pipeline.from_pretrained("CHECKPOINT")' in card
    again = load_checkpoint(tmp_path / "parts")
    assert again.third is not None and again.shared


def test_tuned_checkpoint_is_evaluated_and_trained_again(tuned: Path, small_catalog: Path, tmp_path: Path) -> None:
    """And generates its own prior."""
    figures = evaluate(tuned, small_catalog, device="cpu", prompts=2, per_prompt=1, steps=2).figures
    assert figures["generation"]["sampler"] == "flow_euler"
    assert 0 <= figures["retrieval"]["text_to_image"]["R@1"] <= 1
    prior = PriorConfig(tmp_path / "prior", (PROMPT,), pairs=2)
    config = TrainingConfig(steps=1, patience=1, wise_ft=True, **SETTINGS)
    result = train(
        small_catalog,
        tuned,
        tmp_path / "again",
        config,
        device="cpu",
        prior=prior,
        on_validate=Validator(small_catalog),
    )
    assert "prior" in result.losses and {"early_stopping", "wise_ft"} <= result.chosen.keys()


def test_min_snr_weights_are_refused_before_work_starts(base: Path, tmp_path: Path) -> None:
    config = TrainingConfig(steps=1, min_snr_gamma=3.0)
    with pytest.raises(OptionError, match=r"min_snr_gamma has no effect: .* is trained by flow matching"):
        train(tmp_path / "none", base, tmp_path / "run", config, device="cpu")  # not that there is no data


def test_distillation_is_refused(base: Path, small_catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is Stable Diffusion 3, which can be trained but not distilled"):
        distill(base, small_catalog, tmp_path / "fast", device="cpu")
