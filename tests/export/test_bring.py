"""Exports of models as people have them: the bundle generates the images of diffusers, from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from support.lora_files import make_lora

from unidiff_export import export_bundle
from unidiff_export.cli import main
from unidiff_export.verification import psnr_db
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

PROMPTS = ["a red striped dress", "green dotted boots"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*changes the text encoder"),
]


def worst_psnr(bundle: Path, pipeline: Any, *, steps: int = 4, guidance_scale: float = 5.0) -> float:
    """PSNR of the worst image that the bundle generates from the latents of the pipeline, by DDIM."""
    latents = np.random.default_rng(0).standard_normal((2, 4, 16, 16), dtype=np.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=torch.from_numpy(latents), num_inference_steps=steps, guidance_scale=guidance_scale
    ).images
    ours = Generator(Bundle.open(bundle, threads=1)).generate(
        PROMPTS, latents=latents, sampler="ddim", steps=steps, guidance_scale=guidance_scale
    )
    return min(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def test_bundle_with_loras_and_vae_equals_diffusers(random_checkpoint: Path, tmp_path: Path) -> None:
    files = [tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"]
    make_lora(random_checkpoint, files[0], form="kohya", text=False)
    make_lora(random_checkpoint, files[1], form="peft", seed=1)
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(random_checkpoint / "vae"), scaling_factor=0.3)
    vae.save_pretrained(tmp_path / "vae")
    loras = [f"{files[0]}:0.8", f"{files[1]}:0.5"]
    export_bundle(random_checkpoint, tmp_path / "bundle", lora=loras, vae=tmp_path / "vae")
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint, vae=vae.eval())
    assert worst_psnr(tmp_path / "bundle", pipeline) < 30  # the LoRAs change the images
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.8, 0.5])
    pipeline.fuse_lora()
    assert worst_psnr(tmp_path / "bundle", pipeline) > 50

    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert "`kohya.safetensors` (weight 0.8), `peft.safetensors` (weight 0.5)." in card and "VAE: `vae`." in card

    # Search is that of the base: its text tower and image tower are unchanged.
    bundle, clip = Bundle.open(tmp_path / "bundle", threads=1), load_checkpoint(random_checkpoint)
    tokens = clip.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        features = clip.clip.get_text_features(**tokens)
        features = getattr(features, "pooler_output", features)
    theirs = torch.nn.functional.normalize(features, dim=-1).numpy()
    assert (Encoder(bundle).encode_texts(PROMPTS) * theirs).sum(axis=1).min() > 0.99999
    assert bundle.manifest.embedding and not bundle.manifest.embedding.shared_text_encoder


@pytest.mark.slow
def test_command_exports_a_variant_with_a_lora(random_checkpoint: Path, tmp_path: Path) -> None:
    half, lora = tmp_path / "half", tmp_path / "a.safetensors"
    StableDiffusionPipeline.from_pretrained(random_checkpoint, torch_dtype=torch.float16).save_pretrained(
        half, variant="fp16", max_shard_size="50KB"
    )
    make_lora(random_checkpoint, lora, text=False)
    command = [
        str(half),
        "--clip",
        str(random_checkpoint / "clip"),
        "-o",
        str(tmp_path / "bundle"),
        "--variant",
        "fp16",
    ]
    result = CliRunner().invoke(main, [*command, "--lora", f"{lora}:0.5"])
    assert result.exit_code == 0, result.output
    pipeline = StableDiffusionPipeline.from_pretrained(half, variant="fp16", torch_dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert worst_psnr(tmp_path / "bundle", pipeline) > 50


def test_loaded_checkpoint_takes_no_additions(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="already loaded, so nothing can be added"):
        export_bundle(load_checkpoint(random_checkpoint), tmp_path / "bundle", variant="fp16")
